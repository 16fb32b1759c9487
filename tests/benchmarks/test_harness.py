"""The benchmark harness: what it measures is right, what is wrong it refuses, what it writes it reads back."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command_line
from benchmarks import history, memory, provenance, registry, report, timing
from benchmarks.check import Checker
from benchmarks.ops import smooth_ap, topk
from benchmarks.registry import Inputs, Op, Variant
from benchmarks.run import Options, Run, run

OP = smooth_ap.OP
QUICK = ("fastret-tiled", "dense")

KNOWN_BYTES = """
import dataclasses
import torch
from benchmarks.ops.smooth_ap import OP as SMOOTH_AP
from benchmarks.registry import Variant

def forward(inputs):
    torch.ones(8 << 20)  # 32 MiB that are freed again
    kept = torch.ones(16 << 20)  # 64 MiB
    return (inputs["x"] ** 2).sum() + kept[0]

OP = dataclasses.replace(SMOOTH_AP, module=__name__, variants=(Variant("64 MiB", forward),))
"""


def quick_run(op: Op = OP, variants: tuple[str, ...] = QUICK, sizes: tuple[int, ...] = (16, 32)) -> Run:
    return run(op, Options(sizes=sizes, variants=variants, budget=0.001, memory=False))


@pytest.fixture(scope="module")
def done() -> Run:
    return quick_run()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"op: expected one of .*smooth_ap.*, got 'nothing'"):
        registry.load("nothing")
    with pytest.raises(ValueError, match="variant: expected one of fastret-cpu,"):
        OP.variant("nothing")


def check(variant: Variant) -> None:
    if (reason := variant.missing("cpu")) is not None:
        pytest.skip(reason)
    agreement = Checker(OP, OP.inputs(OP.size(32), 0, "cpu")).check(variant)
    assert agreement.passed, agreement


@pytest.mark.parametrize("name", ["fastret-cpu", "fastret-cpu shuffled", "fastret-cpu gallery", "fastret-tiled"])
def test_variant_agrees_on_some_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smooth_ap, "PROBE_LIMIT", 16)
    monkeypatch.setattr(smooth_ap, "PROBE_QUERIES", 8)
    check(OP.variant(name))


def right(inputs: Inputs) -> Tensor:
    return smooth_ap.fastret(inputs, "tiled")


@pytest.mark.parametrize(
    "forward",
    [
        lambda inputs: 1.001 * right(inputs),
        lambda inputs: (right(inputs) + right(inputs).detach()) / 2,
        lambda inputs: math.nan * right(inputs),
        lambda inputs: right(inputs) + (inputs["x"].sum() * 0).sqrt(),
    ],
    ids=["loss", "gradient", "NaN loss", "NaN gradient"],
)
def test_wrong_variant_gets_no_figure(forward: object) -> None:
    wrong = Variant("wrong", forward)
    result = quick_run(dataclasses.replace(OP, variants=(*OP.variants, wrong)), ("wrong", "dense"), (16,))
    assert [measurement.variant for measurement in result.measurements] == ["dense"]
    (refusal,) = result.refusals
    assert (refusal.variant, refusal.wrong) == ("wrong", True)
    assert refusal.reason.startswith("wrong: loss off by")
    assert all(record.variant == "dense" for record in result.records())
    assert command_line._print_refusals(result) == 1


def test_op_without_gradients_is_judged_by_what_it_returns() -> None:
    """Indices: others that are worth as much pass, and neighbours in another order do not."""
    right = topk.OP.variant("fastret-tiled")
    other_ties = dataclasses.replace(right, name="other ties", forward=lambda inputs: right.forward(inputs) ^ 1)
    wrong = dataclasses.replace(right, name="wrong", forward=lambda inputs: right.forward(inputs).flip(1))

    def pairs(size: dict[str, int], seed: int) -> Inputs:
        inputs = topk.setup(size, seed)
        return {**inputs, "gallery": inputs["gallery"].repeat_interleave(2, 0)}

    op = dataclasses.replace(topk.OP, variants=(right, other_ties, wrong), setup=pairs)
    result = quick_run(op, (right.name, "other ties", "wrong"), (40,))
    assert [measurement.variant for measurement in result.measurements] == [right.name, "other ties"]
    (refusal,) = result.refusals
    assert (refusal.variant, refusal.wrong) == ("wrong", True)
    assert refusal.reason.startswith("wrong: off by")
    lines = report.table(op, result.records()).splitlines()
    assert lines[0] == "| topk, forward | M = 40 |"
    assert lines[-1].endswith("peak memory beyond inputs and results.")


def test_figures_of_an_op_are_saved_and_shown(tmp_path) -> None:
    op = dataclasses.replace(OP, figures=lambda inputs: {"kind": "small", "rows": float(len(inputs["x"]))})
    result = quick_run(op)
    assert list(result.figures.values()) == [{"kind": "small", "rows": 16.0}, {"kind": "small", "rows": 32.0}]
    saved = json.loads(result.save(tmp_path / "history.csv", tmp_path / "results").read_text())
    assert saved["figures"] == result.figures
    assert report.figures_text(result.figures).splitlines()[1].endswith('"n": 32}: kind small, rows 32.000')
    assert quick_run().figures == {}


def test_variant_that_does_not_fit_is_refused_without_being_run() -> None:
    def forward(inputs: Inputs) -> Tensor:
        raise AssertionError

    unfit = Variant("unfit", forward, unfit=lambda size: f"not at {size['n']}")
    result = quick_run(dataclasses.replace(OP, variants=(unfit,)), ("unfit",), (16,))
    assert result.measurements == []
    assert [(refusal.reason, refusal.wrong) for refusal in result.refusals] == [("not at 16", False)]


def test_turns_are_interleaved() -> None:
    assert timing.interleave({"a": 3, "b": 3}) == ["a", "b"] * 3
    turns = timing.interleave({"often": 9, "rarely": 3})
    assert turns.count("often") == 9
    assert [place // 4 for place, name in enumerate(turns) if name == "rarely"] == [0, 1, 2]


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 200), (1.0, 5), (3.0, 3)])
def test_repetitions(seconds: float, expected: int) -> None:
    assert timing.repetitions(seconds, 2.0) == expected


@pytest.mark.skipif(memory.unsupported("cpu") is not None, reason="needs Linux' /proc")
def test_memory_of_a_known_allocation(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "known_bytes.py").write_text(KNOWN_BYTES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    op = registry.load_module("known_bytes")
    measured = memory.measure(op, op.variants[0], op.size(1024), device="cpu", threads=1, seed=0)
    assert measured.raw - measured.extra == 1024 * 512 * 4 / memory.MIB
    assert measured.extra == pytest.approx(64, abs=4)
    assert measured.raw + 50 < measured.total < measured.raw + 1500  # Python and PyTorch


def test_process_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="measuring memory ended with status 1"):
        memory.measure(OP, OP.variants[0], OP.size(8), device="cpu", threads=1, seed=0)


def test_history_is_appended_and_read_back(done: Run, tmp_path) -> None:
    path = tmp_path / "history.csv"
    assert history.read(OP.name, path) == []
    file = done.save(path, tmp_path / "results")
    again = dataclasses.replace(done, provenance=dataclasses.replace(done.provenance, date="2999-01-01T00:00:00Z"))
    again.save(path, tmp_path / "results")
    records = history.read(OP.name, path)
    assert len(records) == 2 * len(done.records()) == 2 * 2 * len(QUICK) * 2
    assert path.read_text().count("date,") == 1
    for read, written in zip(records, done.records(), strict=False):
        assert read.value == pytest.approx(written.value, rel=1e-5)
        assert dataclasses.replace(read, value=0, p20=0, p80=0, floor_ms=0) == dataclasses.replace(
            written, value=0, p20=0, p80=0, floor_ms=0
        )
    assert history.latest(records) == records[len(done.records()) :]
    assert history.read("another op", path) == []
    saved = json.loads(file.read_text())
    assert [m["variant"] for m in saved["measurements"]] == [m.variant for m in done.measurements]
    assert str(provenance.ROOT) not in file.read_text() + path.read_text()


def test_history_with_other_columns_is_refused(tmp_path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("date,value\n")
    with pytest.raises(ValueError, match=r"history.csv: expected the columns date, commit"):
        history.read(OP.name, path)


def test_table(done: Run) -> None:
    lines = report.table(OP, done.records()).splitlines()
    assert lines[0] == "| smooth_ap, forward + backward | N = 16 | N = 32 |"
    assert lines[2].startswith(f"| {OP.floor_name} |")
    assert [line.split(" | ")[0] for line in lines[3:5]] == [f"| {name}" for name in QUICK]
    assert all(line.count("|") == 4 for line in lines[:5])
    assert "G = 4, D = 512, float32" in lines[6]
    with pytest.raises(ValueError, match="no run in the history"):
        report.table(OP, [])


def test_compare_with_the_commit_before(done: Run) -> None:
    now = [dataclasses.replace(record, commit="now", date="2999") for record in done.records()]
    before = [dataclasses.replace(record, commit="before", value=record.value / 2) for record in done.records()]
    elsewhere = [dataclasses.replace(record, commit="elsewhere", cpu="another") for record in done.records()]
    lines = report.compare(OP, [*before, *elsewhere, *now]).splitlines()
    assert len(lines) == 2 + len(now) + 2
    assert all("| +100.0% | before |" in line for line in lines[2:-2])
    with pytest.raises(ValueError, match="no figure of another commit"):
        report.compare(OP, [*elsewhere, *now])


@pytest.mark.parametrize("with_memory", [False, True])
def test_plot(done: Run, tmp_path, with_memory: bool) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import plot

    records = done.records()
    if with_memory:
        records += [dataclasses.replace(r, metric=history.PEAK) for r in records if r.metric == history.TIME]
    path = tmp_path / "results" / "smooth_ap.png"
    plot(OP, records, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["list"]) == 0
    assert "fastret-cpu" in capsys.readouterr().out
    threads = str(torch.get_num_threads())
    arguments = ["--sizes", "16", "--variants", "dense", "--budget", "0.001", "--no-memory", "--no-save"]
    assert command_line.main(["run", "smooth_ap", *arguments, "--threads", threads]) == 0
    assert "| dense |" in capsys.readouterr().out
    assert command_line.main(["run", "smooth_ap", "--variants", "nothing"]) == 2
    assert "variant: expected one of" in capsys.readouterr().err
