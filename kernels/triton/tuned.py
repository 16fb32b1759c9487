"""Tables that ``fastret tune`` measured on this machine, one file a GPU in the user's cache folder.

A table counts only for the GPU, Triton and kernel sources it was measured with; another is ignored, and that is said
once. Nothing is measured here, and without a table nothing changes. FASTRET_TUNED=0 ignores all tables.

A file is JSON: {"key": {...}, "options": {"lse/2": {"BLOCK_M": 64, ...}}, "order": {"rank_sums": ["triton", ...]},
"plans": {"plan lse/2": {"weights": 128}}}.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

Options = Mapping[str, int]

_LARGEST = 1024  # of a block, and far beyond that of warps and stages
# Entries of plans, by the kind of kernel that holds the gradients of narrow rows. "lse heavy" has none: masks by
# threshold need the same scores from every op, by the one plan that is counted for all of them.
PLANS = {"lse gradient": "plan lse", "gradient": "plan ranks"}


@dataclass(frozen=True)
class Key:
    """What a measured time depends on.

    Attributes:
        device: name of the GPU.
        architecture: sm_90 or gfx942, for example.
        triton: its version.
        source: of the kernels and of the configurations they have by default, hashed.
    """

    device: str
    architecture: str
    triton: str
    source: str


@dataclass(frozen=True)
class Table:
    """What was measured to be fastest.

    Attributes:
        options: of kernels, by ``name``.
        order: implementations of an op, the fastest first.
        plans: by ``name`` of a plan's entry, the plan of wide rows and the width from which it was faster than "fused".
    """

    key: Key
    options: dict[str, dict[str, int]] = field(default_factory=dict)
    order: dict[str, list[str]] = field(default_factory=dict)
    plans: dict[str, dict[str, int]] = field(default_factory=dict)


def name(kind: str, itemsize: int, options: Options) -> str:
    """Of an entry: a kind of kernel, bytes per element of its rows, features in registers where kernels hold some."""
    return "/".join([kind, str(itemsize), *([str(options["SLICE"])] if "SLICE" in options else [])])


def folder() -> Path:
    """$XDG_CACHE_HOME/fastret, by default ~/.cache/fastret."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastret"


def path(device: str) -> Path:
    """Where the table of a GPU of this name is."""
    return folder() / f"triton-{''.join(c if c.isalnum() else '-' for c in device.lower())}.json"


@functools.cache
def source_hash() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def key(device: str, architecture: str) -> Key:
    """Of this process."""
    return Key(device, architecture, _triton_version(), source_hash())


def _triton_version() -> str:
    for package in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def save(table: Table) -> Path:
    """Writes a table whole, in place of an older one; returns its path."""
    file = path(table.key.device)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(json.dumps(asdict(table), indent=1) + "\n")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    load.cache_clear()
    of_device.cache_clear()
    return file


@functools.cache
def load(expected: Key) -> Table | None:
    """The table of this key; None, after a warning, where the file holds another or none."""
    file = path(expected.device)
    if os.environ.get("FASTRET_TUNED") == "0" or not file.exists():
        return None
    try:
        table = _parsed(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{file} is ignored, it is no table of fastret tune: {error}", stacklevel=2)
        return None
    if table.key != expected:
        changed = [part for part, value in asdict(expected).items() if getattr(table.key, part) != value]
        what = " and ".join(changed)
        warnings.warn(f"{file} is ignored, {what} changed since: run fastret tune again", stacklevel=2)
        return None
    return table


def _parsed(content: dict[str, dict[str, dict[str, int]]]) -> Table:
    key = Key(**content["key"])  # type: ignore[arg-type]
    for entry, options in content["options"].items():
        for option, value in options.items():
            if not isinstance(value, int) or not 0 <= value <= _LARGEST:
                raise ValueError(f"{entry}: {option} is {value!r}")
    for op, names in content["order"].items():
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"order of {op}: {names!r}")
    for entry, widths in content["plans"].items():
        if len(widths) != 1 or not all(isinstance(w, int) and w > 0 for w in widths.values()):
            raise ValueError(f"{entry}: {widths!r}")
    return Table(key, content["options"], content["order"], content["plans"])  # type: ignore[arg-type]


@functools.cache
def of_device(device: torch.device, architecture: str) -> Table | None:
    """The table of a GPU."""
    return load(key(torch.cuda.get_device_name(device), architecture))


def applied(table: Table | None, kind: str, itemsize: int, defaults: tuple[Options, ...]) -> tuple[Options, ...]:
    """Defaults, each replaced by what was measured for it; an entry with other option names is not for this kernel."""
    if table is None:
        return defaults
    measured = [table.options.get(name(kind, itemsize, options), options) for options in defaults]
    return tuple(m if m.keys() == d.keys() else d for m, d in zip(measured, defaults, strict=True))


def plan_of_wide_rows(table: Table | None, kind: str, itemsize: int) -> tuple[str, int] | None:
    """The plan that was measured to take the place of "fused" kernels of a kind, which may end in tf32, and the width
    from which it does; None where nothing was."""
    plain = kind.removesuffix(" tf32")
    if table is None or plain not in PLANS:
        return None
    found = table.plans.get(name(PLANS[plain] + kind.removeprefix(plain), itemsize, {}), {})
    return next(iter(found.items()), None)
