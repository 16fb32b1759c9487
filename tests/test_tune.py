"""Tables of ``fastret tune``: how one is found, stored, read and refused; and what "auto" prefers on CUDA.

Times come from a function of the options, not from a clock, and the device that is tuned is the interpreter's.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastret import cli, env, tune
from fastret.backends import choices, registry
from fastret.kernels.triton import config, tuned
from fastret.kernels.triton.tuned import Key, Options, Table

KEY = Key("A GPU, 80GB", "sm_90", "3.6.0", "abc")
START = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTRET_TUNED", raising=False)
    tuned.load.cache_clear()


def distance_from(best: Options) -> Callable[[Options], float]:
    """Time that grows with the distance from the best options, in steps of ``neighbours``."""
    return lambda options: (
        1 + sum(abs(options[k] - best[k]) if k == "num_stages" else abs(math.log2(options[k] / best[k])) for k in best)
    )


def once(time: Callable[[Options], float]) -> Callable[[Options], tuple[float, ...]]:
    return lambda options: (time(options),)


def test_a_walk_finds_the_fastest_options() -> None:
    best = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
    found, times = tune.search("lse", START, once(distance_from(best)))
    assert times == (1,)
    assert found == {**START, **best}


def test_options_that_cannot_run_and_noise_change_nothing() -> None:
    assert tune.search("lse", START, lambda options: (math.inf,)) == (START, (math.inf,))
    assert tune.search("lse", START, once(lambda options: 1 - 0.01 * (options != START))) == (START, (1,))
    found, times = tune.search("lse", START, once(lambda o: 2.0 if o["num_warps"] == 4 else math.inf))
    assert (found["num_warps"], times) == (4, (2.0,))


def test_no_size_pays_for_another() -> None:
    """Tiles of 128 rows are twice as fast for large calls and slower for small ones; 4 warps win 10 % at both."""

    def times(options: Options) -> tuple[float, ...]:
        high, few = options["BLOCK_M"] == 128, options["num_warps"] == 4
        return (1 + 0.1 * high) * (1 - 0.1 * few), (1 - 0.5 * high) * (1 - 0.1 * few)

    found, after = tune.search("lse", START, times)
    assert found == {**START, "num_warps": 4, "BLOCK_M": 128}  # both: no size is slower than by default
    assert after == pytest.approx((0.99, 0.45))

    def slower(options: Options) -> tuple[float, ...]:
        high = options["BLOCK_M"] == 128
        return 1 + 0.1 * high, 1 - 0.5 * high

    assert tune.search("lse", START, slower) == (START, (1, 1))
    mixed = tune.search("lse", START, lambda o: (1.0, math.inf) if o != START else (2.0, 2.0))
    assert mixed == (START, (2, 2))  # what cannot run at one size


def test_neighbours_keep_what_must_not_change() -> None:
    heavy = list(tune.neighbours("lse heavy", {**START, "SLICE": 128, "CHUNK": 16}))
    assert all(o["BLOCK_M"] == o["BLOCK_N"] == 64 and o["SLICE"] == 128 and o["CHUNK"] == 16 for o in heavy)
    assert {o["num_stages"] for o in heavy} == {1, 2, 3}
    smallest = [o["BLOCK_M"] for o in tune.neighbours("lse", {**START, "BLOCK_M": 16})]
    assert min(smallest) == 16


def test_stored_tiles_have_an_element_for_every_thread() -> None:
    start = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 16, "num_stages": 1}
    for kind, least in (("strip", 512), ("lse", 256)):
        tiles = [o["BLOCK_M"] * o["BLOCK_N"] for o in tune.neighbours(kind, start) if o["num_warps"] == 16]
        assert min(tiles) == least
    fewer = {**start, "BLOCK_N": 16, "num_warps": 8}
    assert all(o["BLOCK_M"] * o["BLOCK_N"] >= 32 * o["num_warps"] for o in tune.neighbours("strip", fewer))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kind_has_a_workload(architecture: str) -> None:
    """One for both precisions of float32; a workload is of a kind that there is."""
    assert {kind.removesuffix(" tf32") for kind, _, _ in config.entries(architecture)} == set(tune.WORKLOADS)
    assert set(tune.PLANS) == set(tuned.PLANS.values())
    assert set(tuned.PLANS) <= set(tune.WORKLOADS)


def test_a_workload_runs_the_kernels_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever plan its width would have, each looks its kind up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    looked_up: list[str] = []
    plain = config.lookup

    def lookup(kind: str, *arguments: object, **more: object) -> Options:
        looked_up.append(kind)
        return plain(kind, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(config, "lookup", lookup)
    for kind, workload in tune.WORKLOADS.items():
        looked_up.clear()
        call = workload.make(torch.bfloat16, 80, device, 16)
        with tune.plans.overriding(workload.plan):
            call("triton")
        assert kind in looked_up


def test_a_table_is_read_back_and_takes_the_place_of_defaults() -> None:
    (default,) = config.choices("lse", "sm_90", 2)
    better = {**default, "BLOCK_M": 128}
    tuned.save(Table(KEY, {tuned.name("lse", 2, default): better}, {"rank_sums": ["tiled", "triton"]}))
    table = tuned.load(KEY)
    assert table is not None
    assert table.order == {"rank_sums": ["tiled", "triton"]}
    assert tuned.applied(table, "lse", 2, (default,)) == (better,)
    assert tuned.applied(table, "lse", 4, (default,)) == (default,)
    assert tuned.applied(None, "lse", 2, (default,)) == (default,)
    of_another_kernel = Table(KEY, {"lse/2": {"BLOCK_M": 64}})
    assert tuned.applied(of_another_kernel, "lse", 2, (default,)) == (default,)


def test_slices_have_entries_of_their_own() -> None:
    defaults = config.choices("lse gradient", "sm_90", 2)
    names = [tuned.name("lse gradient", 2, options) for options in defaults]
    assert names == ["lse gradient/2/128", "lse gradient/2/256", "lse gradient/2/512"]
    table = Table(KEY, {names[1]: {**defaults[1], "num_warps": 4}})
    assert [o["num_warps"] for o in tuned.applied(table, "lse gradient", 2, defaults)] == [8, 4, 8]


@pytest.mark.parametrize("part", ["device", "architecture", "triton", "source"])
def test_a_table_of_something_else_is_ignored(part: str) -> None:
    other = Key(**{**vars(KEY), part: "another"})
    tuned.save(Table(KEY))
    if part == "device":  # has another file
        assert tuned.load(other) is None
        return
    with pytest.warns(UserWarning, match=f"is ignored, {part} changed since: run fastret tune again"):
        assert tuned.load(other) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.load(other) is None  # said once


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"key": {"device": "x"}, "options": {}, "order": {}}',
        {"options": {"lse/2": {"BLOCK_M": "64"}}},
        {"options": {"lse/2": {"BLOCK_M": -64}}},
        {"options": {"lse/2": {"BLOCK_M": 1 << 20}}},
        {"order": {"rank_sums": "triton"}},
        {"plans": {"plan lse/2": {"weights": "64"}}},
        {"plans": {"plan lse/2": {"weights": 64, "strip": 128}}},
    ],
)
def test_a_bad_file_is_ignored(content: str | dict[str, object]) -> None:
    file = tuned.save(Table(KEY))
    good = json.loads(file.read_text())
    file.write_text(content if isinstance(content, str) else json.dumps({**good, **content}))
    tuned.load.cache_clear()
    with pytest.warns(UserWarning, match="is ignored, it is no table of fastret tune"):
        assert tuned.load(KEY) is None


def test_tables_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save(Table(KEY))
    monkeypatch.setenv("FASTRET_TUNED", "0")
    assert tuned.load(KEY) is None


def test_the_source_of_kernels_is_part_of_the_key() -> None:
    key = tuned.key("GPU", "sm_90")
    assert key.source == tuned.source_hash()
    assert len(key.source) == 16


def test_an_entry_is_overridden_while_it_is_measured() -> None:
    device, dtype = torch.device("cpu"), torch.float32
    default = config.lookup("lse", device, dtype)
    with config.overriding("lse/4", {**default, "BLOCK_M": 32}):
        assert config.lookup("lse", device, dtype)["BLOCK_M"] == 32
        assert config.lookup("lse", device, torch.float64) == default
    assert config.lookup("lse", device, dtype) == default


def test_tune_measures_right_options_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with 4 warps are fast and wrong, those with 3 stages do not fit."""
    errors = pytest.importorskip("triton.runtime.errors")
    device = torch.device("cpu")
    monkeypatch.setattr(config, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(config, "choices", lambda kind, architecture, itemsize, tf32=False: (START,))
    monkeypatch.setattr(config, "entries", lambda architecture: [("lse", 4, START)])
    times = {"triton": 3.0, "tiled": 1.0}
    running: list[str] = []

    def call(impl: str) -> tuple[Tensor, ...]:
        running.append(impl)
        options = config.lookup("lse", device, torch.float32)
        warps = options["num_warps"]
        if options["num_stages"] == 3:
            raise errors.OutOfResources(300, 200, "shared memory")
        return (torch.tensor([1.0, float(warps == 4)]),)

    def timer(run: Callable[[], object]) -> float:
        run()
        options = config.lookup("lse", device, torch.float32)
        if options != START:
            return 0.1 if options["num_warps"] == 4 else distance_from({"BLOCK_M": 128})(options)
        return times.get(running[-1], 2.0)

    monkeypatch.setattr(tune, "WORKLOADS", {"lse": tune.Workload("masked_lse", lambda *_: call)})
    monkeypatch.setattr(tune, "SELECTIONS", ())
    monkeypatch.setattr(tune, "PLANS", {})
    said: list[str] = []
    table = tune.tune(device, timer, dtypes=[torch.float32], report=said.append)
    assert table.options == {"lse/4": {**START, "BLOCK_M": 128}}
    assert table.order["masked_lse"][0] == "tiled"
    assert said[0].startswith("lse/4: 3.000, 3.000 ms by default, 1.000, 1.000 ms with ")


def test_entries_for_tf32_are_measured_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the workload of their kind; afterwards products are what they were."""
    of_sm_90 = config.choices
    monkeypatch.setattr(config, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(config, "choices", lambda kind, architecture, *more: of_sm_90(kind, "sm_90", *more))
    (options,) = config.choices("lse gradient tf32", "sm_90", 4)
    both = [("lse gradient", 4, options), ("lse gradient tf32", 4, options)]
    monkeypatch.setattr(config, "entries", lambda architecture: both)
    precisions: list[str] = []

    def call(impl: str) -> tuple[Tensor, ...]:
        precisions.append(config.precision(torch.float32))
        return (torch.ones(1),)

    def timer(run: Callable[[], object]) -> float:
        used = config.lookup("lse gradient", torch.device("cpu"), torch.float32, 128)
        return 1.0 if used["num_warps"] == 4 else 2.0

    monkeypatch.setattr(tune, "WORKLOADS", {"lse gradient": tune.Workload("masked_lse", lambda *_: call, "fused")})
    monkeypatch.setattr(tuned, "of_device", lambda *_: None)
    table = tune.tune(torch.device("cpu"), timer, dtypes=[torch.float32], kinds=["lse gradient"], report=lambda _: None)
    assert set(precisions) == {"ieee", "tf32"}
    assert {name: found["num_warps"] for name, found in table.options.items()} == {
        "lse gradient/4/128": 4,
        "lse gradient tf32/4/128": 4,
    }
    assert config.precision(torch.float32) == "ieee"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"fused": (1, 2, 8, 12), "weights": (2, 3, 4, 6), "strip": (2, 3, 5, 7)}, {"weights": 512}),
        ({"fused": (1, 2, 8, 12), "weights": (0.5, 3, 9, 9), "strip": (0.5, 1, 5, 7)}, {"strip": 64}),
        ({"fused": (1, 2, 3, 4), "weights": (1, 2, 3, 4), "strip": (0.5, 1, 5, 7)}, {"weights": 769}),
        ({"fused": (1, 2, 3, 4), "weights": (math.inf,) * 4, "strip": (math.inf,) * 4}, None),
    ],
)
def test_the_width_from_which_a_plan_wins(times: dict[str, tuple[float, ...]], expected: dict[str, int] | None) -> None:
    """What cannot run has no time; a plan is measured by the name that is asked for."""
    asked: list[str] = []

    def call(impl: str) -> tuple[Tensor, ...]:
        asked.append(tune.plans.chosen())
        if times[asked[-1]][0] == math.inf:
            raise RuntimeError("no room")
        return (torch.ones(1),)

    def timer(run: Callable[[], object]) -> float:
        return times[asked[-1]][asked.count(asked[-1]) - 1]

    before = tune.plans.chosen()
    assert tune._wide_plan("plan lse/2", [call] * 4, timer, 1e-4, lambda _: None) == expected
    assert tune.plans.chosen() == before


def test_measured_plans_are_read_back_and_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save(Table(KEY, plans={"plan lse/2": {"weights": 512}, "plan lse tf32/4": {"strip": 128}}))
    table = tuned.load(KEY)
    assert tuned.plan_of_wide_rows(table, "lse gradient", 2) == ("weights", 512)
    assert tuned.plan_of_wide_rows(table, "lse gradient tf32", 4) == ("strip", 128)
    for kind, itemsize in (("lse gradient", 4), ("gradient", 2), ("lse heavy", 2), ("gradient tf32", 4)):
        assert tuned.plan_of_wide_rows(table, kind, itemsize) is None
    assert tuned.plan_of_wide_rows(None, "lse gradient", 2) is None
    measured = ("weights", 512)
    planned = [tune.plans.plan(w, 512, tensor_cores=True, measured=measured) for w in (64, 496, 512)]
    assert planned == ["fused", "fused", "weights"]
    assert tune.plans.plan(64, 512, tensor_cores=True, asked="strip", measured=measured) == "strip"
    assert config.plan_of_wide_rows("lse gradient", torch.device("cpu"), torch.float32) is None


def test_the_workload_that_stands_for_an_op_is_its_own() -> None:
    """A few pairs of many rows show how rows are packed, not who should score pairs."""
    first = {workload.op: workload.make for workload in reversed([*tune.WORKLOADS.values()])}
    assert first["pair_dot"] is tune._pairs
    assert first["masked_lse"] in (tune._info_nce, tune._info_nce_forward)


def test_workloads_are_calls_that_every_implementation_takes() -> None:
    """And the same each time, so that results of two configurations can be compared."""
    for make in {workload.make for workload in (*tune.WORKLOADS.values(), *tune.SELECTIONS)}:
        call = make(torch.float32, 16, torch.device("cpu"), 16)
        tiled = call("tiled")
        assert all(t.isfinite().all() for t in tiled)
        assert all(torch.equal(a, b) for a, b in zip(call("tiled"), tiled, strict=True))
        assert all(tune._close(a, b, 1e-4) for a, b in zip(call("reference"), tiled, strict=True))


def test_implementations_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fails, one is wrong and one is slow; what is found is saved after each entry."""
    monkeypatch.setattr(config, "entries", lambda architecture: [])
    monkeypatch.setattr(tune, "WORKLOADS", {})
    monkeypatch.setattr(tune, "PLANS", {})
    running: list[str] = []

    def call(impl: str) -> tuple[Tensor, ...]:
        running.append(impl)
        if impl == "cpu":
            raise RuntimeError("no room")
        return torch.tensor([1.0, 2.0 + (impl == "reference")]), torch.tensor([len(running)])  # ties: any index

    def timer(run: Callable[[], object]) -> float:
        run()
        assert running[-1] in ("tiled", "triton")
        return {"tiled": 3.0, "triton": 1.0}[running[-1]]

    serving = [registry.IMPLEMENTATIONS[name] for name in ("reference", "cpu", "triton", "tiled")]
    monkeypatch.setattr(registry, "candidates", lambda request: serving)
    monkeypatch.setattr(tune, "SELECTIONS", [tune.Workload(op, lambda *_: call) for op in ("masked_lse", "rank_sums")])
    said: list[str] = []
    saved: list[list[str]] = []
    tune.tune(
        *(torch.device("cpu"), timer),
        dtypes=[torch.float32],
        report=said.append,
        save=lambda table: saved.append(sorted(table.order)),
    )
    assert all("reference is left out, its results are others; cpu is left out: no room" in line for line in said)
    assert [line.partition(";")[0].partition(": ")[2] for line in said] == ["triton, tiled"] * 2
    assert [len(ops) for ops in saved] == [1, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("fastret: error: tune: no CUDA device here")


def test_every_op_has_a_choice_with_its_reason() -> None:
    assert set(choices.ON_CUDA) == set(env.OPS)
    for choice in choices.ON_CUDA.values():
        assert choice.source.startswith(("counted: ", "measured: "))
        measured = choice.source.startswith("measured: ")
        assert measured or "not measured on a GPU yet" in choice.source
        assert measured or "cuda" not in choice.order  # CUDA C++ kernels wait for a measurement


def test_auto_follows_the_order_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    call = registry.Call("masked_lse", "cuda", torch.float32)
    monkeypatch.setattr(choices, "measured_here", lambda op, index=None: ())
    assert registry.candidates(call)[0].name == "triton"
    monkeypatch.setattr(choices, "measured_here", lambda op, index=None: ("tiled", "of another release"))
    assert registry.candidates(call)[0].name == "tiled"
    assert choices.source("masked_lse") == "measured on this GPU by fastret tune"
    on_cpu = registry.Call("masked_lse", "cpu", torch.float32)
    assert registry.candidates(on_cpu)[0].name == "cpu"


def test_auto_follows_the_gpu_that_holds_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two kinds of GPUs in one machine, each has its table; a call that names none is the current one's."""
    monkeypatch.setattr(choices, "_has_gpu", lambda: True)
    monkeypatch.setattr(choices, "architecture", lambda device: ("sm_80", "sm_90")[device.index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = {"sm_80": ["tiled"], "sm_90": ["triton"]}
    monkeypatch.setattr(tuned, "of_device", lambda device, name: Table(KEY, order={"masked_lse": found[name]}))

    def picked(device: str) -> str:
        return registry.resolve("masked_lse", torch.device(device), torch.float32, None)

    assert [picked(device) for device in ("cuda:0", "cuda:1", "cuda")] == ["tiled", "triton", "triton"]
