"""Benchmarks on a GPU, as far as they can be tested without one: dtypes, floors, what does not fit, kernels' times."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command_line
from benchmarks import gpu, kernels, memory, registry, report, run, timing
from benchmarks.conditions import NOT_TIMED
from benchmarks.gpu import FLOORS, Floor
from benchmarks.ops import clip, smooth_ap
from benchmarks.registry import Inputs, Variant
from benchmarks.run import OUT_OF_MEMORY, Options


def test_inputs_of_another_dtype() -> None:
    op = registry.in_dtype(smooth_ap.OP, torch.bfloat16)
    inputs = op.inputs(op.size(16), 0, "cpu")
    assert (inputs["x"].dtype, inputs["labels"].dtype) == (torch.bfloat16, torch.int64)
    assert (op.name, op.module) == ("smooth_ap bfloat16", smooth_ap.OP.module)
    assert registry.in_dtype(op, torch.bfloat16) is op
    assert registry.in_dtype(smooth_ap.OP, torch.float32) is smooth_ap.OP


def test_a_gpu_need_not_count_the_rows_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, in every arrangement of the batch; on a CPU nothing changes."""
    told: list[object] = []

    def loss(*_: object, samples_per_class: int | None, **__: object) -> Tensor:
        told.append(samples_per_class)
        return torch.zeros(())

    monkeypatch.setattr(smooth_ap, "smooth_ap", loss)
    size = {**smooth_ap.OP.fixed, "n": 16, "d": 2}
    given = smooth_ap.setup(size, 0)

    class OnGpu(Tensor):
        is_cuda = True

    for inputs in (given, smooth_ap.shuffled(given), smooth_ap.with_gallery(given)):
        smooth_ap.fastret(inputs, "triton")
        smooth_ap.fastret({**inputs, "x": inputs["x"].as_subclass(OnGpu)}, "triton")
    assert told == [None, 4] * 3


def test_half_precision_is_measured_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sizes", "16", "--variants", "fastret-tiled", "--budget", "0.001", "--no-memory"]
    assert command_line.main(["run", "clip", "--dtype", "bfloat16", *arguments, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| clip bfloat16, forward + backward |" in out
    assert "D = 128, bfloat16" in out
    (file,) = tmp_path.glob("*.json")
    assert file.name.endswith("-clip-bfloat16.json")
    assert json.loads(file.read_text())["measurements"][0]["variant"] == "fastret-tiled"


def test_a_wrong_variant_in_half_precision_is_found() -> None:
    wrong = Variant("wrong", lambda inputs: 1.1 * clip.fastret(inputs, "tiled"))
    op = dataclasses.replace(registry.in_dtype(clip.OP, torch.bfloat16), variants=(wrong,))
    done = run.run(op, Options((16,), ("wrong",), budget=0.001, memory=False))
    assert [refusal.wrong for refusal in done.refusals] == [True]


def test_what_does_not_fit_gets_no_figure() -> None:
    def too_large(inputs: Inputs) -> Tensor:
        raise torch.OutOfMemoryError

    op = dataclasses.replace(clip.OP, variants=(Variant("too large", too_large), clip.OP.variant("fastret-tiled")))
    done = run.run(op, Options((16,), ("too large", "fastret-tiled"), budget=0.001, memory=False))
    assert [m.variant for m in done.measurements] == ["fastret-tiled"]
    assert [(r.variant, r.reason, r.wrong) for r in done.refusals] == [("too large", OUT_OF_MEMORY, False)]
    assert not run._fits(op, op.variants[0], {})


def test_kernels_for_gpus_are_not_timed_elsewhere() -> None:
    for op in map(registry.load, registry.names()):
        for variant in op.variants:
            if variant.name in ("fastret-triton", "fastret-cuda"):
                assert variant.missing("cpu") == NOT_TIMED
    large = {**smooth_ap.OP.fixed, "n": 1 << 20}
    assert smooth_ap.OP.variant("dense").refusal(large, "cpu") is not None
    assert smooth_ap.OP.variant("dense").refusal(large, "cuda") is None


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: f"{floor.op} {floor.size}")
def test_floors_are_tasks_of_ops(floor: Floor) -> None:
    """Small ones of the same dimensions have inputs; the operations take at least the time that is said."""
    op = floor.load()
    assert op.size(op.sizes[0]) == floor.size
    assert any(variant.name == "fastret-triton" for variant in op.variants)
    assert floor.load(floor.small()).size(floor.small()[op.axis]) == floor.small()
    assert (floor.milliseconds is None) == (gpu.over_floor(1.0, floor) == "-")


def test_measured_over_counted() -> None:
    floor = next(f for f in FLOORS if f.milliseconds == 4.0)
    assert gpu.over_floor(10.0, floor) == "2.5x"
    done = run.run(clip.OP, Options((16,), ("fastret-tiled",), budget=0.001, memory=False))
    (line,) = command_line.floor_lines(floor, done)
    time = done.measurements[0].timing.median
    expected = f"| 4 ms | {floor.predicted()} | {time / 4:.1f}x | - |"
    assert line.endswith(f"| fastret-tiled | {report.number(time)} {expected}")


def test_floors_run_small_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FASTRET_GPU_TESTS", "cpu")
    for slow in ([], ["--slow"]):
        assert command_line.main(["floors", "--budget", "0.001", "--output", str(tmp_path), *slow]) == 0
    out = capsys.readouterr().out
    for floor in FLOORS:
        assert f"| {floor.predicted()} |" in out
    assert len(list(tmp_path.glob("*.json"))) >= len({floor.op for floor in FLOORS})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("arguments", [["floors"], ["kernels"], ["run", "clip", "--device", "cuda"]])
def test_without_a_gpu_it_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(arguments) == 2
    assert "device: there is no CUDA device here" in capsys.readouterr().err


def test_time_of_each_kernel() -> None:
    found = kernels.summed([("a", 1.0), ("b", 5.0), ("a", 3.0), ("b", 5.0)], steps=2)
    assert found == [kernels.Kernel("b", 1, 5.0), kernels.Kernel("a", 1, 2.0)]
    assert kernels.Profile("task", "fastret-triton", found).lines()[0] == ("task, fastret-triton: 7.0 us in 2 launches")


def test_time_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is overwritten before the first event, and nothing but the call is between the two."""
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 20.0

    class Filler:
        def zero_(self) -> None:
            said.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_cache_filler", Filler)
    assert timing._seconds(lambda: said.append("call"), "cuda") == 0.02
    assert said == ["flush", "event", "call", "event", "wait"]


def test_memory_of_prepared_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an allocator counts less what is returned."""
    monkeypatch.setattr(memory, "_start", lambda device: 100 * memory.MIB)
    monkeypatch.setattr(memory, "_peak", lambda device: 110 * memory.MIB)
    op = clip.OP
    inputs = op.inputs({"n": 2048, "d": 128}, 0, "cpu")
    measured = memory.measure_inputs(op, op.variant("fastret-tiled"), inputs, device="cuda")
    assert (measured.raw, measured.total) == (10, 110)
    assert measured.extra == 10 - 2 * 2048 * 128 * 4 / memory.MIB
