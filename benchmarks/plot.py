"""The latest run as a picture: time, and memory where it was measured, against the size; all axes logarithmic."""

from pathlib import Path
from typing import Any

from benchmarks import history
from benchmarks.history import PEAK, TIME, Record
from benchmarks.registry import Op
from benchmarks.report import machine

SMALLEST_PEAK = 0.1  # MiB; below, the peak of a process is noise

_PANELS = {TIME: "ms, median", PEAK: "MiB at the peak beyond inputs and what is returned"}


def plot(op: Op, records: list[Record], path: Path) -> None:
    """Writes a PNG.

    Raises:
        ValueError: there is no run.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    records = history.latest(records)
    if not records:
        raise ValueError(f"{op.name}: no run in the history")
    metrics = [metric for metric in _PANELS if any(record.metric == metric for record in records)]
    figure = Figure(figsize=(1 + 5 * len(metrics), 4.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _panel(axes, op, [record for record in records if record.metric == metric], metric)
    fixed = ", ".join(f"{name.upper()} = {value}" for name, value in op.fixed.items())
    figure.suptitle(f"{op.name}, {op.passes}, {fixed}: {machine(records[0])}", fontsize=11)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, op: Op, records: list[Record], metric: str) -> None:
    values = sorted({record.dimensions[op.axis] for record in records})
    if metric == TIME:
        floors = {record.dimensions[op.axis]: record.floor_ms for record in records}
        axes.plot(values, [floors[value] for value in values], "k--", label=op.floor_name)
    for place, variant in enumerate(op.variants):
        points = {r.dimensions[op.axis]: r.value for r in records if r.variant == variant.name}
        if points:
            heights = [max(points[value], SMALLEST_PEAK if metric == PEAK else 0) for value in sorted(points)]
            axes.plot(sorted(points), heights, "o-", color=f"C{place}", markersize=4, label=variant.name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.set_xlabel(op.axis.upper())
    axes.set_ylabel(_PANELS[metric])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
