"""The history of all runs: one CSV in long format, a line per figure, only ever appended to."""

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.registry import Size

HISTORY = Path(__file__).with_name("history.csv")
RESULTS = Path(__file__).with_name("results")

TIME, RATIO, PEAK = "time_ms", "time_ratio", "peak_mib"


@dataclass(frozen=True)
class Record:
    """A figure; fields are the columns.

    Attributes:
        date: of the run (UTC, to the second).
        size: JSON.
        metric: "time_ms"; "time_ratio", the time over the floor of the same run; "peak_mib", memory at the peak beyond
            inputs and what is returned.
        value: the median for times.
        p20, p80: percentiles, for times.
        floor_ms: the floor's median, for times.
        isa, gemm: instruction set and multiplier that fastret's C++ used or would have used.
    """

    date: str
    commit: str
    op: str
    variant: str
    size: str
    metric: str
    value: float
    p20: float | None
    p80: float | None
    floor_ms: float | None
    cpu: str
    threads: int
    isa: str
    gemm: str
    device: str
    torch: str
    fastret: str

    @property
    def dimensions(self) -> Size:
        dimensions: Size = json.loads(self.size)
        return dimensions


COLUMNS = tuple(field.name for field in fields(Record))


def size_text(size: Size) -> str:
    return json.dumps(size, sort_keys=True)


def append(records: Iterable[Record], path: Path = HISTORY) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in asdict(record).items()} for record in records)


def read(op: str, path: Path = HISTORY) -> list[Record]:
    """Records of an op, in the order they were written; none where there is no history.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name}: expected the columns {', '.join(COLUMNS)}")
        return [_record(row) for row in reader if row["op"] == op]


def latest(records: list[Record]) -> list[Record]:
    """Records of the latest run."""
    date = max((record.date for record in records), default="")
    return [record for record in records if record.date == date]


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _record(row: dict[str, str]) -> Record:
    numbers = {name: float(row[name]) if row[name] else None for name in ("p20", "p80", "floor_ms")}
    return Record(**{**row, **numbers, "value": float(row["value"]), "threads": int(row["threads"])})  # type: ignore[arg-type]
