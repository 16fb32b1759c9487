"""Which implementation "auto" prefers on CUDA, op by op, and why.

A preference is measured or counted, and ``source`` says which; where a preferred implementation is missing or cannot
serve a call, the next one does. What ``fastret tune`` measured on this machine's GPU comes first (kernels/triton/
tuned.py). One order serves all sizes until a measurement shows that sizes differ.
"""

import functools
from dataclasses import dataclass

import torch

from fastret.kernels.triton import tuned
from fastret.kernels.triton.config import architecture


@dataclass(frozen=True)
class Choice:
    """Attributes:
    order: implementations, the preferred first; those it leaves out come after them, as the registry lists them.
    source: where that is from: a result file under benchmarks/results, or what was counted.
    """

    order: tuple[str, ...]
    source: str


_UNTIL_MEASURED = "not measured on a GPU yet; until then the CUDA C++ kernels are taken where they are asked for"

_TILES = Choice(
    ("triton", "tiled"),
    "counted: products of tiles, which tensor cores do at 660 TFLOP/s on an H100 where tiles fit their shapes; "
    f"{_UNTIL_MEASURED}",
)
_GATHERS = Choice(
    ("triton", "tiled"),
    "counted: rows read from anywhere, which PyTorch writes out and reads again; CUDA C++ keeps more loads in flight "
    f"than Triton; {_UNTIL_MEASURED}",
)
_SELECTIONS = Choice(
    ("tiled",),
    "counted: queues of the best k in global or shared memory, which Triton has no means for, save the passes of "
    f"PyTorch's tiles over the scores; {_UNTIL_MEASURED}",
)
_COPIES = Choice(
    ("triton", "tiled"),
    f"counted: one read and one write of every row, where PyTorch's operators take several; {_UNTIL_MEASURED}",
)

ON_CUDA: dict[str, Choice] = {
    "rank_sums": _TILES,
    "masked_lse": _TILES,
    "row_extrema": _TILES,
    "pair_dot": _GATHERS,
    "soft_assign": _TILES,
    "sampled_dot": _GATHERS,
    "topk": _SELECTIONS,
    "pq_topk": _SELECTIONS,
    "knn_vote": _SELECTIONS,
    "segment_mean": _COPIES,
    "patchmix": _COPIES,
    "update_rows": _COPIES,
}


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def measured_here(op: str, index: int | None = None) -> tuple[str, ...]:
    """The order that ``fastret tune`` measured for an op on a GPU, by default the current one; empty where it did
    not. GPUs of one machine may be of two kinds."""
    if not _has_gpu():
        return ()
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    table = tuned.of_device(device, architecture(device))
    return () if table is None else tuple(table.order.get(op, ()))


def order(op: str, index: int | None = None) -> tuple[str, ...]:
    """Implementations on a GPU, by default the current one, the preferred first."""
    counted = ON_CUDA[op].order if op in ON_CUDA else ()
    return tuple(dict.fromkeys((*measured_here(op, index), *counted)))


def source(op: str) -> str:
    """Why that order."""
    if measured_here(op):
        return "measured on this GPU by fastret tune"
    return ON_CUDA[op].source if op in ON_CUDA else "the order of the registry"
