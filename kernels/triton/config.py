"""Tiles and launch options, by kind of kernel, bytes per element of the rows, and architecture.

A table, not @triton.autotune: the same call does the same work in every process, and nothing is timed in a training
step. What ``fastret tune`` measured on this machine's GPU takes the place of entries (tuned.py). All entries compile
without register spills (tests/kernels/aot.py); none is timed yet. float32 products are
IEEE unless PyTorch is told otherwise, and run on the ordinary arithmetic units, as float64's, hence their narrower
tiles.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

from fastret.kernels.triton import tuned

Options = tuned.Options


def _options(warps: int, stages: int, **blocks: int) -> Options:
    # Fused multiply-adds are what float32 tiles are made of, and Triton 3.10 stops making them unless asked.
    return {**blocks, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _tile(m: int, n: int, k: int, warps: int, stages: int, **more: int) -> Options:
    return _options(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **more)


def _assign(m: int, n: int, warps: int, width: int) -> Options:
    return _options(warps, 1, BLOCK_M=m, BLOCK_N=n, SLICE=width)


def _strip(m: int, n: int, warps: int) -> Options:
    return _options(warps, 1, BLOCK_M=m, BLOCK_N=n)


def _everywhere(*options: Options) -> dict[str, tuple[Options, ...]]:
    return {"sm_80": options, "gfx942": options}


# scores: tiles of S as they are. FACTORED, for all of rank_sums: sigmoids of bounded scores take one reciprocal, 2: in
# NVIDIA's instruction; 0: an exponential each too.
# sums: reductions along rows of S, for CHUNK positives of a query a sweep.
# gradient: tiles of S, recomputed, times rows; SLICE, ascending: features a program accumulates in registers.
# pair scores, pair gradient: BLOCK_P pairs at a time.
# sampled scores, sampled gradient: BLOCK_S rows of a bank at a time, by the bytes of its elements.
# patchmix: BLOCK_P pieces of BLOCK_W words, by the bytes of a word; of shorter pieces more.
# update rows: BLOCK_D features of a row at a time.
# pack, unpack: BLOCK_R rows of BLOCK_D features, by the bytes of the caller's; of shorter rows more, of few rows fewer.
# assign, assign rows, assign words: soft_assign and its gradients, of books whose widths a SLICE holds;
# float16 rows, the products of which take TF32, as float32.
# strip: stored tiles of S, for all ops; nothing is multiplied.
# lse, lse gradient: as sums and gradient, for masked_lse. lse heavy: both, for many conditions or for thresholds, which
# need the same square tiles everywhere.
# lse two, lse listed: forward of two heads, and with listed targets. lse weights, lse weights sums: tiles of S that are
# stored as pair weights, and sums of these beside them. lse weights heavy: both and forward, where lse heavy is.
# PIECES of the columns of such a tile are gone through by turns.
# Kinds that end in tf32 take the place of the others where float32 products are taken in TF32.
# CUDA architectures ascend; one that is not listed takes the nearest older one.
_TABLE: dict[tuple[str, int], dict[str, tuple[Options, ...]]] = {
    ("scores", 2): {"sm_80": (_tile(64, 64, 64, 8, 3, FACTORED=2),), "gfx942": (_tile(64, 64, 64, 4, 2, FACTORED=1),)},
    ("scores", 4): {"sm_80": (_tile(64, 64, 16, 8, 2, FACTORED=2),), "gfx942": (_tile(64, 64, 16, 4, 2, FACTORED=1),)},
    ("scores", 8): {"sm_80": (_tile(32, 32, 32, 4, 2, FACTORED=1),), "gfx942": (_tile(32, 32, 32, 4, 2, FACTORED=1),)},
    ("sums", 2): {
        "sm_80": (_tile(64, 64, 64, 4, 3, CHUNK=16),),
        "sm_90": (_tile(64, 128, 64, 4, 3, CHUNK=16),),
        "gfx942": (_tile(64, 128, 64, 8, 2, CHUNK=16),),
    },
    ("sums", 4): {"sm_80": (_tile(64, 64, 16, 8, 2, CHUNK=16),), "gfx942": (_tile(64, 64, 16, 4, 2, CHUNK=16),)},
    ("sums tf32", 4): {
        "sm_80": (_tile(64, 64, 32, 4, 3, CHUNK=16),),
        "gfx942": (_tile(64, 64, 32, 4, 2, CHUNK=16),),
    },
    ("sums", 8): {"sm_80": (_tile(32, 32, 32, 4, 2, CHUNK=16),), "gfx942": (_tile(32, 32, 32, 4, 2, CHUNK=16),)},
    ("gradient", 2): {
        "sm_80": (
            _tile(64, 32, 32, 8, 3, SLICE=128),
            _tile(64, 32, 32, 8, 3, SLICE=256),
            _tile(32, 32, 64, 8, 3, SLICE=512),
        ),
        "sm_90": (
            _tile(64, 32, 64, 8, 3, SLICE=128),
            _tile(64, 32, 64, 8, 3, SLICE=256),
            _tile(64, 16, 64, 8, 3, SLICE=512),
        ),
        "sm_100": (
            _tile(64, 32, 64, 8, 3, SLICE=128),
            _tile(64, 32, 64, 8, 3, SLICE=256),
            _tile(64, 32, 64, 8, 3, SLICE=512),
        ),
        "gfx942": (
            _tile(64, 32, 64, 4, 2, SLICE=128),
            _tile(64, 32, 64, 4, 2, SLICE=256),
            _tile(64, 32, 64, 4, 2, SLICE=512),
        ),
    },
    ("strip", 2): _everywhere(_strip(16, 64, 8)),
    ("strip", 4): _everywhere(_strip(16, 64, 8)),
    ("strip", 8): _everywhere(_strip(16, 32, 8)),
    ("pair scores", 2): _everywhere(_options(4, 2, BLOCK_P=16, BLOCK_K=128)),
    ("pair scores", 4): _everywhere(_options(4, 2, BLOCK_P=16, BLOCK_K=64)),
    ("pair scores", 8): _everywhere(_options(4, 2, BLOCK_P=16, BLOCK_K=32)),
    ("pair gradient", 2): _everywhere(_options(4, 2, BLOCK_P=8, SLICE=128)),
    ("pair gradient", 4): _everywhere(_options(4, 2, BLOCK_P=8, SLICE=128)),
    ("pair gradient", 8): _everywhere(_options(4, 2, BLOCK_P=8, SLICE=64)),
    ("sampled scores", 2): _everywhere(_options(4, 1, BLOCK_S=64, BLOCK_D=128)),
    ("sampled scores", 4): _everywhere(_options(4, 1, BLOCK_S=32, BLOCK_D=128)),
    ("sampled scores", 8): _everywhere(_options(4, 1, BLOCK_S=16, BLOCK_D=128)),
    ("sampled gradient", 2): _everywhere(_options(4, 1, BLOCK_S=64, SLICE=128)),
    ("sampled gradient", 4): _everywhere(_options(4, 1, BLOCK_S=32, SLICE=128)),
    ("sampled gradient", 8): _everywhere(_options(4, 1, BLOCK_S=16, SLICE=128)),
    **{("patchmix", size): _everywhere(_options(4, 1, BLOCK_P=8, BLOCK_W=128)) for size in (1, 2, 4, 8)},
    **{("update rows", size): _everywhere(_options(4, 1, BLOCK_D=512)) for size in (2, 4, 8)},
    **{("pack", size): _everywhere(_options(4, 1, BLOCK_R=2, BLOCK_D=1024)) for size in (2, 4)},
    ("pack", 8): _everywhere(_options(8, 1, BLOCK_R=1, BLOCK_D=1024)),
    **{("unpack", size): _everywhere(_options(4, 1, BLOCK_R=2, BLOCK_D=1024)) for size in (2, 4)},
    ("unpack", 8): _everywhere(_options(8, 1, BLOCK_R=1, BLOCK_D=1024)),
    ("lse", 2): {
        "sm_80": (_tile(128, 128, 32, 8, 3, PIECES=4),),
        "sm_90": (_tile(128, 128, 64, 8, 3, PIECES=4),),
        "sm_100": (_tile(128, 64, 64, 8, 3, PIECES=2),),
        "gfx942": (_tile(128, 128, 32, 8, 2, PIECES=4),),
    },
    ("lse", 4): {"sm_80": (_tile(64, 64, 16, 8, 2),), "gfx942": (_tile(64, 64, 16, 4, 2),)},
    ("lse", 8): {"sm_80": (_tile(32, 32, 32, 4, 2),), "gfx942": (_tile(32, 32, 32, 4, 2),)},
    ("lse tf32", 4): {
        "sm_80": (_tile(128, 64, 32, 8, 2, PIECES=2),),
        "sm_90": (_tile(128, 128, 32, 8, 3, PIECES=4),),
        "sm_100": (_tile(128, 64, 32, 8, 2, PIECES=2),),
        "gfx942": (_tile(128, 128, 32, 8, 2, PIECES=4),),
    },
    ("lse two", 2): {
        "sm_80": (_tile(128, 64, 32, 8, 3, PIECES=2),),
        "sm_90": (_tile(128, 64, 64, 8, 3, PIECES=2),),
        "sm_100": (_tile(128, 64, 64, 8, 3, PIECES=4),),
        "gfx942": (_tile(128, 128, 32, 8, 2, PIECES=4),),
    },
    ("lse two", 4): _everywhere(_tile(64, 32, 16, 8, 2)),
    ("lse two tf32", 4): {
        "sm_80": (_tile(128, 64, 32, 8, 2, PIECES=2),),
        "sm_100": (_tile(128, 64, 32, 8, 2, PIECES=4),),
        "gfx942": (_tile(128, 128, 32, 8, 2, PIECES=4),),
    },
    ("lse two", 8): _everywhere(_tile(32, 32, 32, 4, 2)),
    ("lse listed", 2): {
        "sm_80": (_tile(64, 64, 32, 8, 3),),
        "sm_90": (_tile(64, 64, 64, 8, 3),),
        "gfx942": (_tile(64, 64, 64, 4, 2),),
    },
    ("lse listed", 4): {"sm_80": (_tile(64, 64, 16, 8, 2),), "gfx942": (_tile(64, 64, 16, 4, 2),)},
    ("lse listed", 8): {"sm_80": (_tile(32, 32, 32, 4, 2),), "gfx942": (_tile(32, 32, 32, 4, 2),)},
    ("lse weights", 2): {
        "sm_80": (_tile(128, 64, 64, 8, 3, PIECES=2),),
        "sm_90": (_tile(128, 128, 64, 8, 3, PIECES=4),),
        "gfx942": (_tile(128, 128, 32, 8, 2, PIECES=4),),
    },
    ("lse weights", 4): _everywhere(_tile(64, 64, 16, 8, 2)),
    ("lse weights tf32", 4): {
        "sm_80": (_tile(128, 64, 32, 8, 2, PIECES=2),),
        "sm_90": (_tile(128, 128, 32, 8, 3, PIECES=4),),
        "sm_100": (_tile(128, 64, 32, 8, 2, PIECES=2),),
        "gfx942": (_tile(128, 64, 32, 8, 2, PIECES=2),),
    },
    ("lse weights", 8): _everywhere(_tile(32, 32, 16, 8, 2)),
    ("lse weights sums", 2): {
        "sm_80": (_tile(128, 64, 32, 8, 3, PIECES=2),),
        "sm_90": (_tile(128, 64, 64, 8, 3, PIECES=2),),
        "sm_100": (_tile(64, 32, 64, 8, 3),),
        "gfx942": (_tile(64, 64, 64, 8, 2),),
    },
    ("lse weights sums", 4): _everywhere(_tile(64, 64, 16, 8, 2)),
    ("lse weights sums tf32", 4): {
        "sm_80": (_tile(128, 64, 32, 8, 2, PIECES=2),),
        "sm_100": (_tile(128, 64, 32, 8, 2, PIECES=4),),
        "gfx942": (_tile(128, 64, 32, 8, 2, PIECES=4),),
    },
    ("lse weights sums", 8): _everywhere(_tile(32, 32, 16, 8, 2)),
    ("lse weights heavy", 2): {
        "sm_80": (_tile(64, 32, 32, 8, 3),),
        "sm_90": (_tile(64, 32, 64, 8, 3),),
        "gfx942": (_tile(16, 16, 32, 4, 2),),
    },
    ("lse weights heavy", 4): {
        "sm_80": (_tile(16, 16, 16, 8, 2),),
        "sm_90": (_tile(32, 32, 16, 8, 2),),
        "gfx942": (_tile(16, 16, 16, 8, 2),),
    },
    ("lse weights heavy tf32", 4): {
        "sm_80": (_tile(32, 32, 32, 8, 2),),
        "sm_90": (_tile(64, 32, 32, 8, 2),),
        "gfx942": (_tile(16, 16, 16, 8, 2),),
    },
    ("lse weights heavy", 8): {"sm_80": (_tile(32, 32, 16, 8, 2),), "gfx942": (_tile(16, 16, 16, 8, 2),)},
    ("lse gradient", 2): {
        "sm_80": (
            _tile(64, 16, 32, 8, 2, SLICE=128),
            _tile(64, 32, 32, 8, 3, SLICE=256),
            _tile(32, 32, 64, 8, 3, SLICE=512),
        ),
        "sm_90": (
            _tile(64, 32, 64, 8, 3, SLICE=128),
            _tile(64, 32, 64, 8, 3, SLICE=256),
            _tile(64, 16, 64, 8, 3, SLICE=512),
        ),
        "sm_100": (
            _tile(32, 16, 64, 4, 3, SLICE=128),
            _tile(64, 16, 64, 8, 3, SLICE=256),
            _tile(32, 32, 64, 8, 3, SLICE=512),
        ),
        "gfx942": (
            _tile(64, 16, 64, 4, 2, SLICE=128),
            _tile(64, 16, 64, 4, 2, SLICE=256),
            _tile(64, 16, 64, 4, 2, SLICE=512),
        ),
    },
    ("lse gradient", 4): {
        "sm_80": (_tile(64, 16, 32, 8, 2, SLICE=128),),
        "sm_100": (_tile(64, 16, 16, 8, 2, SLICE=128, maxnreg=255),),  # else ptxas spills 8 bytes to go below 129
        "gfx942": (_tile(64, 16, 32, 4, 2, SLICE=128),),
    },
    ("lse gradient tf32", 4): {
        "sm_80": (_tile(64, 32, 32, 8, 2, SLICE=128),),
        "sm_90": (_tile(64, 16, 32, 8, 2, SLICE=128),),
        "sm_100": (_tile(32, 32, 32, 8, 2, SLICE=128),),
        "gfx942": (_tile(64, 16, 32, 4, 2, SLICE=128),),
    },
    ("lse gradient", 8): {
        "sm_80": (_tile(32, 32, 16, 8, 2, SLICE=32),),
        "gfx942": (_tile(32, 32, 16, 8, 2, SLICE=32),),
    },
    ("lse heavy", 2): {
        "sm_80": (_tile(32, 32, 32, 8, 2, SLICE=128),),
        "gfx942": (_tile(16, 16, 32, 4, 2, SLICE=128),),
    },
    ("lse heavy", 4): {
        "sm_80": (_tile(32, 32, 16, 8, 2, SLICE=128),),
        "gfx942": (_tile(16, 16, 16, 8, 2, SLICE=128),),
    },
    ("lse heavy", 8): {
        "sm_80": (_tile(32, 32, 16, 8, 2, SLICE=32),),
        "sm_90": (_tile(16, 16, 16, 4, 2, SLICE=32),),
        "gfx942": (_tile(16, 16, 16, 4, 2, SLICE=32),),
    },
    ("assign", 2): _everywhere(_assign(64, 64, 8, 32), _assign(64, 32, 8, 128)),
    ("assign", 4): _everywhere(_assign(64, 64, 8, 32), _assign(32, 32, 8, 128)),
    ("assign", 8): _everywhere(_assign(32, 32, 4, 32), _assign(16, 16, 4, 128)),
    ("assign rows", 2): {
        "sm_80": (_assign(64, 64, 8, 32), _assign(64, 16, 8, 128)),
        "sm_100": (_assign(64, 64, 8, 32), _assign(32, 16, 8, 128)),
        "gfx942": (_assign(32, 64, 4, 32), _assign(64, 16, 8, 128)),
    },
    ("assign rows", 4): {
        "sm_80": (_assign(64, 32, 8, 32), _assign(32, 16, 8, 128)),
        "sm_90": (_assign(64, 32, 8, 32), _assign(16, 32, 8, 128)),
        "sm_100": (_assign(64, 64, 8, 32), _assign(64, 16, 8, 128)),
        "gfx942": (_assign(32, 64, 4, 32), _assign(32, 16, 8, 128)),
    },
    ("assign rows", 8): {
        "sm_80": (_assign(32, 32, 4, 32), _assign(16, 16, 4, 128)),
        "sm_90": (_assign(16, 32, 4, 32), _assign(16, 16, 4, 128)),
        "gfx942": (_assign(32, 32, 4, 32), _assign(16, 16, 4, 128)),
    },
    ("assign words", 2): {
        "sm_80": (_assign(64, 64, 8, 32), _assign(32, 32, 4, 128)),
        "gfx942": (_assign(64, 32, 4, 32), _assign(32, 32, 4, 128)),
    },
    ("assign words", 4): {
        "sm_80": (_assign(32, 16, 4, 32), _assign(16, 32, 8, 128)),
        "gfx942": (_assign(32, 32, 4, 32), _assign(16, 16, 8, 128)),
    },
    ("assign words", 8): {
        "sm_80": (_assign(16, 16, 4, 32), _assign(16, 16, 8, 128)),
        "gfx942": (_assign(32, 32, 4, 32), _assign(16, 16, 4, 128)),
    },
    ("gradient", 4): {
        "sm_80": (_tile(64, 16, 32, 8, 2, SLICE=128),),
        "sm_100": (_tile(32, 32, 32, 8, 2, SLICE=128),),
        "gfx942": (_tile(64, 16, 32, 8, 2, SLICE=128),),
    },
    ("gradient tf32", 4): {
        "sm_80": (_tile(64, 32, 32, 8, 2, SLICE=128),),
        "sm_90": (_tile(64, 16, 32, 8, 2, SLICE=128),),
        "gfx942": (_tile(64, 16, 32, 8, 2, SLICE=128),),
    },
    ("gradient", 8): {
        "sm_80": (_tile(32, 32, 16, 8, 2, SLICE=32),),
        "gfx942": (_tile(32, 32, 16, 8, 2, SLICE=32),),
    },
}

# For Triton's interpreter, small: small tests then have several tiles, and a rest, on every axis.
_INTERPRETED: dict[str, Options] = {
    "pair scores": _options(1, 1, BLOCK_P=8, BLOCK_K=32),
    "pair gradient": _options(1, 1, BLOCK_P=4, SLICE=32),
    "strip": _strip(16, 16, 1),
    "sampled scores": _options(1, 1, BLOCK_S=16, BLOCK_D=32),
    "sampled gradient": _options(1, 1, BLOCK_S=16, SLICE=32),
    "patchmix": _options(1, 1, BLOCK_P=4, BLOCK_W=16),
    "update rows": _options(1, 1, BLOCK_D=32),
    "pack": _options(1, 1, BLOCK_R=32, BLOCK_D=256),
    "unpack": _options(1, 1, BLOCK_R=32, BLOCK_D=256),
    "lse": _tile(16, 16, 32, 1, 1, PIECES=2),
    "lse two": _tile(16, 16, 32, 1, 1, PIECES=2),
    "lse listed": _tile(16, 16, 32, 1, 1),
    "lse gradient": _tile(16, 16, 32, 1, 1, SLICE=32),
    "lse heavy": _tile(16, 16, 32, 1, 1, SLICE=32),
    "lse weights": _tile(32, 16, 32, 1, 1, PIECES=4),
    "lse weights sums": _tile(16, 16, 32, 1, 1, PIECES=2),
    "lse weights heavy": _tile(16, 16, 32, 1, 1),  # numpy's bits follow from where in a tile a row lies
    "assign": _assign(16, 16, 1, 128),
    "assign rows": _assign(16, 16, 1, 128),
    "assign words": _assign(16, 16, 1, 128),
    "scores": _tile(16, 16, 32, 1, 1, FACTORED=1),
    "sums": _tile(16, 16, 32, 1, 1, CHUNK=4),
    "gradient": _tile(16, 16, 32, 1, 1, SLICE=32),
}
_INTERPRETED_PROCESSORS = 8

# Of float64 on NVIDIA. Without a limit ptxas spills a few bytes to go below 64, 80 or 128 registers; told that all may
# be used, it does not.
_ALL_REGISTERS = {"maxnreg": 255}

_overrides: dict[str, Options] = {}


@contextlib.contextmanager
def overriding(name: str, options: Options) -> Iterator[None]:
    """Within the block, in any thread, an entry (``tuned.name``) is this one: for measuring it."""
    before = dict(_overrides)
    _overrides[name] = options
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_90 or gfx942, for example; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choices(kind: str, architecture: str, itemsize: int, tf32: bool = False) -> tuple[Options, ...]:
    """All that ``lookup`` may choose from for an architecture; tf32: for products in TF32."""
    if architecture == "interpreter":
        return (_INTERPRETED[kind],)
    entry = _TABLE[kind, itemsize]
    if tf32:
        entry = _TABLE.get((f"{kind} tf32", itemsize), entry)
    if architecture.startswith("gfx"):
        return entry["gfx942"]
    older = [name for name in entry if name.startswith("sm_") and int(name[3:]) <= int(architecture[3:])]
    found = entry[older[-1] if older else "sm_80"]
    return tuple({**options, **_ALL_REGISTERS} for options in found) if itemsize == 8 else found


def lookup(kind: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> Options:
    """Options of a kernel over rows of this dtype: with the smallest SLICE that holds the width, else the largest."""
    tf32 = precision(dtype) == "tf32"
    found = choices(kind, architecture(device), dtype.itemsize, tf32)
    if tf32 and (f"{kind} tf32", dtype.itemsize) in _TABLE:
        kind = f"{kind} tf32"
    if device.type != "cpu":
        found = tuned.applied(tuned.of_device(device, architecture(device)), kind, dtype.itemsize, found)
    options = next((options for options in found if options.get("SLICE", width) >= width), found[-1])
    return _overrides.get(tuned.name(kind, dtype.itemsize, options), options) if _overrides else options


def entries(architecture: str) -> list[tuple[str, int, Options]]:
    """Kind, bytes per element and options of every entry for an architecture."""
    return [(kind, itemsize, options) for kind, itemsize in _TABLE for options in choices(kind, architecture, itemsize)]


def held(kind: str, device: torch.device, dtype: torch.dtype) -> int:
    """How many features of a gradient one program of this kind holds; the interpreter stands for sm_80."""
    name = architecture(device)
    return choices(kind, "sm_80" if name == "interpreter" else name, dtype.itemsize)[-1]["SLICE"]


def plan_of_wide_rows(kind: str, device: torch.device, dtype: torch.dtype) -> tuple[str, int] | None:
    """What ``fastret tune`` measured on this GPU to be faster than fused kernels of this kind, and from which width."""
    if device.type == "cpu":
        return None
    if precision(dtype) == "tf32":
        kind = f"{kind} tf32"
    return tuned.plan_of_wide_rows(tuned.of_device(device, architecture(device)), kind, dtype.itemsize)


def granularity(device: torch.device) -> int:
    """What the sides of a strip are a multiple of: its tiles, and on GPUs those of the library that multiplies."""
    return 16 if architecture(device) == "interpreter" else 128


def precision(dtype: torch.dtype) -> str:
    """How products of these rows are taken, as PyTorch takes its own: "tf32" for float32 where
    ``torch.set_float32_matmul_precision`` says "high" or "medium", or torch.backends.cuda.matmul.fp32_precision
    "tf32"; else "ieee". The only place that asks."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def parts(device: torch.device, programs: int, tiles: int, resident: int = 1) -> int:
    """Into how many parts to divide sums over ``tiles`` tiles so that few ``programs`` occupy every multiprocessor,
    which holds ``resident`` of them.

    It follows from shapes and device alone, so that sums are equal from run to run. No part is empty.
    """
    share = -(-tiles // max(1, min(tiles, resident * processors(device) // programs)))
    return -(-tiles // share)


def processors(device: torch.device) -> int:
    """How many programs run beside each other, if one occupies a multiprocessor."""
    if device.type == "cpu":
        return _INTERPRETED_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
