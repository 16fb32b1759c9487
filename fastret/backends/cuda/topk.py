"""topk by strips: a GEMM multiplies some rows by a tile of columns into a bounded workspace, and a kernel in CUDA C++
(csrc/cuda/topk.cu) selects from the strip what is better than the row's k-th best so far.

Rows of bfloat16 or float16 on both sides are multiplied as they are, into float32; a float32 strip follows PyTorch's
setting for float32 products. Memory: results; for each row of a strip and part of its columns 513 keys of 8 bytes, for
k above 256 4,097 (134 MB at ROWS rows); a float a row and column; and the workspace (FASTRET_WORKSPACE), which holds a
strip and the tile of columns converted.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastret.backends.cuda import extension
from fastret.backends.cuda.launch import array, call
from fastret.backends.pairs import PairMask
from fastret.backends.registry import Call
from fastret.backends.rows import row_norms
from fastret.backends.workspace import workspace

ROWS = 4096  # of a strip: a GEMM of so many has nothing to wait for
WARPS = 8192  # that are to share a strip: those of 132 multiprocessors
COLUMNS = 4096  # that a part of a row has at least
_PRODUCT, _SCALED, _DISTANCE = range(3)  # TopkScore of csrc/cuda/topk.h


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    if call.dtype == torch.float64:
        return "the CUDA kernel of topk takes no float64"
    if "long" in call.options:
        return f"the CUDA kernel of topk finds at most {extension().topk_most} a row"
    return None


def forward(x: Tensor, y: Tensor, k: int, mask: PairMask, *, metric: str, first_column: int) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first, as backends/reference defines them."""
    n, m, width, device = len(x), len(y), x.shape[1], x.device
    scores = torch.empty(n, k, dtype=torch.float32, device=device)
    indices = torch.empty(n, k, dtype=torch.int64, device=device)
    if n == 0:
        return scores, indices
    with torch.autocast(device.type, enabled=False):
        wide = x.dtype if x.dtype == y.dtype else torch.float32
        left, right = _side(x, wide, metric), _side(y, wide, metric)
        kind = _DISTANCE if metric == "l2" else _PRODUCT if left.factor is None else _SCALED
        rows, columns = _strip(n, m, width)
        strip = torch.empty(rows, columns, dtype=torch.float32, device=device)
        parts = _parts(rows, columns, k)
        state = torch.empty(rows * parts, extension().topk_state(k), dtype=torch.int64, device=device)
        bounds, _borrowed = _mask(mask)
        search = (n, m, k, bounds, first_column)
        factors = [None if s.factor is None else array(s.factor, "factor") for s in (left, right)]
        for row in range(0, n, rows):
            some = left.part(row, row + rows)
            kept = state[: len(some) * parts]
            for column in range(0, max(m, 1), max(columns, 1)):
                others = right.part(column, column + columns)
                products = strip[: len(some), : len(others)]
                _multiply(some, others, products)
                given = (array(products, "products"), *factors, row, column, kind)
                call("topk_select", device, search, given, parts, column == 0, array(kept, "state"))
            found = (array(t[row : row + rows], name) for t, name in ((scores, "scores"), (indices, "indices")))
            call("topk_finish", device, search, kind == _DISTANCE, parts, array(kept, "state"), *found)
    return scores, indices


def _strip(n: int, m: int, width: int) -> tuple[int, int]:
    """Rows and columns of a strip, which with that many rows of y stays within the workspace; at least 4 columns."""
    numbers = workspace() // 4
    rows = min(n, ROWS, max(1, math.isqrt(numbers)))  # as many rows as columns where there is no room for ROWS
    return rows, min(max(4, numbers // (rows + width) // 4 * 4), -(-m // 4) * 4)


def _parts(rows: int, columns: int, k: int) -> int:
    """Into how many parts the columns of few rows are cut, so that there is work for the whole device."""
    warps = 1 if k <= 256 else 8  # a team's, as in csrc/cuda/topk.cu
    return max(1, min(WARPS // (rows * warps), columns // COLUMNS))


@dataclass(frozen=True)
class _Side:
    """Rows on their way into products.

    Attributes:
        dtype: of what is multiplied.
        multiplier: (n, 1) of the rows before they are multiplied; divisor: likewise.
        factor: (n,) of the products afterwards, or what is added to them.
    """

    rows: Tensor
    dtype: torch.dtype
    multiplier: Tensor | None = None
    divisor: Tensor | None = None
    factor: Tensor | None = None

    def part(self, begin: int, end: int) -> Tensor:
        rows = self.rows[begin:end].to(self.dtype)
        if self.multiplier is not None:
            rows = rows * self.multiplier[begin:end]
        return rows if self.divisor is None else rows / self.divisor[begin:end]


def _side(rows: Tensor, dtype: torch.dtype, metric: str) -> _Side:
    if metric == "dot":
        return _Side(rows, dtype)
    step = max(1, workspace() // 16 // max(1, rows.shape[1]))
    pieces = [rows[begin : begin + step] for begin in range(0, max(1, len(rows)), step)]
    if metric == "l2":
        return _Side(rows, dtype, factor=torch.cat([p.float().square().sum(1) for p in pieces]))
    norms = torch.cat([row_norms(p) for p in pieces])
    if dtype == torch.float32:
        return _Side(rows, dtype, divisor=norms)
    if dtype == torch.float16:
        return _Side(rows, dtype, factor=norms.reciprocal().squeeze(1))
    # A power of two rounds nothing, and products of such rows do not overflow.
    power = torch.ldexp(torch.ones_like(norms), -torch.frexp(norms).exponent)
    return _Side(rows, dtype, multiplier=power.to(dtype), factor=(norms * power).reciprocal().squeeze(1))


def _multiply(x: Tensor, y: Tensor, products: Tensor) -> None:
    if x.dtype == torch.float32:
        torch.mm(x, y.T, out=products)
    elif x.is_cuda:
        torch.mm(x, y.T, out_dtype=torch.float32, out=products)
    else:  # the emulation's: PyTorch has no such product there
        torch.mm(x.float(), y.float().T, out=products)


def _mask(m: PairMask) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The mask as C++ takes it, and the tensors it borrows."""
    above, below = (None if bound is None else bound.float().contiguous() for bound in (m.above, m.below))
    relations, borrowed = [], [above, below]
    for relation, name in ((m.same, "mask.same"), (m.different, "mask.different"), (m.distinct, "mask.distinct")):
        pair = None if relation is None else tuple(labels.to(torch.int64).contiguous() for labels in relation)
        relations.append(None if pair is None else tuple(array(labels, name) for labels in pair))
        borrowed.extend(pair or ())
    bounds = (None if t is None else array(t, name) for t, name in ((above, "mask.above"), (below, "mask.below")))
    return (*relations, m.offset, m.period or 0, *bounds), tuple(borrowed)
