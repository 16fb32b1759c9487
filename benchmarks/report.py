"""Runs as text: the latest as a table for the README, and the latest against the commit before it."""

from collections.abc import Iterable, Mapping

from benchmarks import history
from benchmarks.history import PEAK, RATIO, TIME, Record
from benchmarks.registry import Figures, Op


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def mebibytes(value: float) -> str:
    """A tenth is about as well as the peak of a process is known."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def machine(record: Record) -> str:
    """What the figures of a record were taken on."""
    where = record.cpu if record.device == "cpu" else record.device
    threads = f"{record.threads} thread{'s' if record.threads > 1 else ''}"
    isa = f", {record.isa}" if record.isa else ""
    return f"{where}, {threads}{isa}"


def table(op: Op, records: list[Record]) -> str:
    """Markdown of the latest run: a line per variant, a column per size.

    Raises:
        ValueError: there is no run.
    """
    records = history.latest(records)
    if not records:
        raise ValueError(f"{op.name}: no run in the history")
    values = sorted({record.dimensions[op.axis] for record in records})
    axis = op.axis.upper()
    cells = {(r.variant, r.dimensions[op.axis], r.metric): r for r in records}
    lines = [
        f"| {op.name}, {op.passes} | " + " | ".join(f"{axis} = {value:,}" for value in values) + " |",
        "|---|" + "---:|" * len(values),
        f"| {op.floor_name} | " + " | ".join(f"{number(_floor(records, op, value))} ms" for value in values) + " |",
    ]
    measured = {record.variant for record in records}
    variants = [variant for variant in op.variants if variant.name in measured]
    for variant in variants:
        lines.append(f"| {variant.name} | " + " | ".join(_cell(cells, variant.name, v) for v in values) + " |")
    first = records[0]
    fixed = ", ".join(f"{name.upper()} = {value}" for name, value in op.fixed.items())
    dtype = str(op.dtype).removeprefix("torch.")
    lines += [
        "",
        f"{fixed}, {dtype}; {machine(first)}; torch {first.torch}, fastret {first.fastret}, commit {first.commit}, "
        f"{first.date[:10]}. Median time (times the first line of the same run) and peak memory beyond inputs and "
        f"{'gradients' if op.gradients else 'results'}.",
    ]
    at = values if first.device == "cpu" else []
    reasons = {v.name: {reason for n in at if (reason := v.unfit(op.size(n)))} for v in variants}
    notes = [(v.name, "; ".join(filter(None, (v.note, *sorted(reasons[v.name]))))) for v in variants]
    lines += [f"- {name}: {note}." for name, note in notes if note]
    return "\n".join(lines)


def _floor(records: list[Record], op: Op, value: int) -> float:
    return next(r.floor_ms for r in records if r.dimensions[op.axis] == value and r.floor_ms is not None)


def _cell(cells: dict[tuple[str, int, str], Record], variant: str, value: int) -> str:
    time = cells.get((variant, value, TIME))
    if time is None:
        return "-"
    text = f"{number(time.value)} ms ({number(cells[variant, value, RATIO].value)}x)"
    peak = cells.get((variant, value, PEAK))
    return text if peak is None else f"{text}, {mebibytes(peak.value)} MiB"


def compare(op: Op, records: list[Record]) -> str:
    """The latest run beside the last figures of an earlier commit, taken on the same machine with as many threads.

    Raises:
        ValueError: there is no run, or none to compare it with.
    """
    now = history.latest(records)
    if not now:
        raise ValueError(f"{op.name}: no run in the history")
    before = {_key(r): r for r in records if r.commit != now[0].commit and _place(r) == _place(now[0])}
    pairs = [(before[_key(r)], r) for r in now if _key(r) in before]
    if not pairs:
        raise ValueError(f"{op.name}: no figure of another commit on {machine(now[0])} to compare with")
    lines = ["| variant | size | metric | before | now | change | commit before |", "|---|---|---|---:|---:|---:|---|"]
    lines += [_change(op, old, new) for old, new in pairs]
    return "\n".join([*lines, "", f"Now: commit {now[0].commit}; {machine(now[0])}."])


def _change(op: Op, old: Record, new: Record) -> str:
    size = f"{op.axis.upper()} = {new.dimensions[op.axis]:,}"
    change = f"{new.value / old.value - 1:+.1%}" if old.value else "-"
    shown = mebibytes if new.metric == PEAK else number
    figures = f"{shown(old.value)} | {shown(new.value)} | {change}"
    return f"| {new.variant} | {size} | {new.metric} | {figures} | {old.commit} |"


def _key(record: Record) -> tuple[str, str, str]:
    return record.variant, record.size, record.metric


def _place(record: Record) -> tuple[str, str, int]:
    return record.cpu, record.device, record.threads


def figures_text(figures: Mapping[str, Figures]) -> str:
    """A line a size."""
    lines = []
    for size, values in figures.items():
        shown = (
            f"{name} {value}" if isinstance(value, str) else f"{name} {value:.3f}" for name, value in values.items()
        )
        lines.append(f"{size}: {', '.join(shown)}")
    return "\n".join(lines)


def listing(ops: Iterable[Op], device: str) -> str:
    """Ops, their sizes and variants, and why a variant cannot run here."""
    lines = []
    for op in ops:
        lines.append(f"{op.name}: {op.axis.upper()} = {', '.join(map(str, op.sizes))}; floor: {op.floor_name}")
        for variant in op.variants:
            reason = variant.missing(device)
            remark = f"not here: {reason}" if reason else variant.note
            lines.append(f"  {variant.name}" + (f" ({remark})" if remark else ""))
    return "\n".join(lines)
