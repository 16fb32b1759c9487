"""How masked_lse, pair sums, row extrema and rank sums go through their pair matrix on a GPU.

"fused": tiles of S are multiplied where they are used, and multiplied again for every slice of features that a program
accumulates in registers. "weights": tiles of S are multiplied where they are used, in backward into pair weights that
are stored block by block in a workspace of bounded size, in the dtype of the rows (masked_lse: in float16 times a power
of two), and PyTorch multiplies these by the rows of either side: 3 matmuls and one for the forward of two heads, and 3
passes over the stored weights. "strip": PyTorch multiplies S into the workspace too: 4 matmuls forward and backward,
all at the vendor library's speed, and 4 to 6 passes over the stored scores. ``plan`` decides.

FASTRET_TRITON_PLAN=fused|weights|strip decides otherwise, for measuring. FASTRET_WORKSPACE is the bound: bytes, or a
number with KiB, MiB or GiB; 128MiB where it is not set.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastret.backends.pairs import Block
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton import products
from fastret.backends.triton.rows import padded
from fastret.backends.workspace import workspace
from fastret.kernels.triton import config

PLANS = ("auto", "fused", "weights", "strip")
# Where tensor cores multiply, by benchmarks/predictions.py: bytes of a row up to which S is multiplied again in the
# time that stored weights take; ranks take their sigmoids again with it, which is longer for any rows. And those above
# which S is read from L2, in each direction, for longer than stored scores take through memory: by the tiles of a kind,
# or of two heads. Ranks of stored scores take more instructions than that saves.
NARROW = {"lse gradient": 96, "lse heavy": 64, "gradient": 0}
WIDE = {"lse gradient": 2048, "lse two": 1024, "lse heavy": 512}
ENOUGH = 512  # rows with which a product is limited by arithmetic: fewer, and the columns are divided instead
RESIDENT = 4  # programs of a kernel that only reads and computes, of which a multiprocessor has room for as many

_chosen = os.environ.get("FASTRET_TRITON_PLAN") or "auto"


def chosen() -> str:
    """What FASTRET_TRITON_PLAN asks for.

    Raises:
        ValueError: there is no such plan.
    """
    if _chosen not in PLANS:
        raise ValueError(f"FASTRET_TRITON_PLAN: expected one of {', '.join(PLANS)}, got {_chosen!r}")
    return _chosen


@contextlib.contextmanager
def overriding(asked: str) -> Iterator[None]:
    """Within the block, in any thread, this plan is asked for: for measuring it."""
    global _chosen
    before = _chosen
    _chosen = asked
    try:
        yield
    finally:
        _chosen = before


def plan(
    width: int,
    held: int,
    *,
    tensor_cores: bool,
    narrow: int = 0,
    wide: int | None = None,
    asked: str = "auto",
    measured: tuple[str, int] | None = None,
) -> str:
    """The plan for rows of a width, by counts (docs/performance.md) or as measured.

    On tensor cores a fused gradient is bound by the rows that its low tiles read again and again, unless they are
    narrow by more than weights cost, and the weights of wide rows by those of theirs; what the ordinary units multiply
    is bound by products, which are fewest, and fastest, in strips once a program does not hold a row's gradient.

    Args:
        width: of the rows, padded.
        held: features that a program of the fused gradient holds; by ``config`` 128 of float32, 32 of float64.
        tensor_cores: whether they multiply these rows.
        narrow: the width up to which they had better multiply them again.
        wide: the width above which they had better not read them again.
        asked: "auto", or the answer.
        measured: the plan of wide rows, and from which width it is faster than "fused" on this GPU.
    """
    if asked != "auto":
        return asked
    if measured is not None:
        faster, least = measured
        return faster if width >= least else "fused"
    if tensor_cores:
        if wide is not None and width > wide:
            return "strip"
        return "weights" if width > narrow else "fused"
    return "strip" if width > held else "fused"


def plan_for(rows: Tensor, kind: str, swept: str = "") -> str:
    """``plan`` for packed rows whose fused gradient has this kind of tiles; ``swept``: WIDE has those of another."""
    size = rows.dtype.itemsize
    tensor_cores = size == 2 or config.precision(rows.dtype) == "tf32"
    held = config.held(kind, rows.device, rows.dtype)
    measured = config.plan_of_wide_rows(kind, rows.device, rows.dtype)
    # weights beside stored scores stay float32 in float16
    wide = None if rows.dtype == torch.float16 or kind not in WIDE else WIDE[swept or kind] // size
    return plan(
        padded(rows.shape[1]),
        held,
        tensor_cores=tensor_cores,
        narrow=NARROW[kind] // size,
        wide=wide,
        asked=chosen(),
        measured=measured,
    )


def _rounded(fit: int, size: int, step: int) -> int:
    """A multiple of ``step`` that fits, or all of ``size``."""
    return min(size, max(step, fit // step * step))


def grid(n: int, m: int, pairs: int, step: int, *, whole_rows: bool = False) -> tuple[int, int]:
    """Rows and columns of a block of at most ``pairs`` scores, multiples of ``step`` as far as there are as many; at
    least ``step`` of both. All columns where ENOUGH rows of them fit, or ``whole_rows`` are asked for."""
    fit = pairs // max(m, 1)
    if whole_rows or fit >= min(n, ENOUGH):
        return _rounded(fit, n, step), m
    rows = _rounded(min(ENOUGH, pairs // step), n, step)
    return rows, _rounded(pairs // rows, m, step)


def square_grid(n: int, m: int, pairs: int, step: int) -> tuple[int, int]:
    """The same for weights: blocks as square as they can be, as the gradients of both sides are read and written once
    for every block along the other."""
    side = math.isqrt(pairs)
    rows = _rounded(max(side, pairs // max(m, 1)), n, step)
    return rows, _rounded(pairs // max(rows, 1), m, step)


@dataclass(frozen=True)
class Strips:
    """The pair matrix of packed rows u (n, D) and v (m, D), block by block.

    A block's scores have the same bits in every op and direction, which masks by threshold need. That relies on
    torch.mm giving the same bits for operands of the same values, shapes, strides and alignment under the same
    settings, on the same machine: the grid follows from sizes alone, operands are always the same slices of rows packed
    the same way, and the workspace is laid out alike in forward and backward.
    """

    u: Tensor
    v: Tensor
    whole_rows: bool = False
    stored: bool = True  # the scores; only weights are where the plan is "weights"
    bounded: bool = True  # the weights, by a number that is known beforehand and not far above them
    norms: Tensor | None = None  # of v, where it is not divided by them

    @property
    def half(self) -> bool:
        """Whether weights are rounded to the dtype of the rows. float16 has too little range for gradients: where its
        weights take the place of scores, or have no bound to scale them by, they stay float32."""
        return self.u.dtype == torch.bfloat16 or (self.u.dtype == torch.float16 and self.bounded and not self.stored)

    def norms_of(self, b: Block) -> Tensor | None:
        """Those of a block's columns."""
        return None if self.norms is None else self.norms[b.first_column :][: b.columns]

    def room(self) -> int:
        """Pairs of a block, which stand ``padded`` columns apart."""
        wide = accumulation_dtype(self.u.dtype).itemsize
        size = self.u.dtype.itemsize * self.half + wide * (self.stored or not self.half)
        return workspace() // size * len(self.v) // max(padded(len(self.v)), 1)

    def fits(self) -> bool:
        """Whether whole rows do, as many as a block has at the least."""
        return self.room() >= min(config.granularity(self.u.device), len(self.u)) * len(self.v)

    def shape(self) -> tuple[int, int]:
        """Rows and columns of all blocks but the last."""
        step = config.granularity(self.u.device)
        if not self.stored:
            return square_grid(len(self.u), len(self.v), self.room(), step)
        return grid(len(self.u), len(self.v), self.room(), step, whole_rows=self.whole_rows)

    def space(self, dtype: torch.dtype) -> Tensor:
        """For the numbers of a block, rows as far apart in every dtype."""
        rows, columns = self.shape()
        return torch.empty(rows, padded(columns), dtype=dtype, device=self.u.device)

    def space_of_weights(self) -> Tensor | None:
        """For those of a block; None where they take the place of the scores."""
        if self.half:
            return self.space(self.u.dtype)
        return None if self.stored else self.space(accumulation_dtype(self.u.dtype))

    def places(self) -> Iterator[Block]:
        """Every block, rows by rows."""
        rows, columns = self.shape()
        for i in range(0, len(self.u), rows):
            for j in range(0, len(self.v), columns):
                yield Block(i, min(rows, len(self.u) - i), j, min(columns, len(self.v) - j))

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """Every block and its scores, which the next one overwrites."""
        space = self.space(accumulation_dtype(self.u.dtype))
        for b in self.places():
            scores = space[: b.rows, : b.columns]
            u, v = self.u[b.first_row :][: b.rows], self.v[b.first_column :][: b.columns]
            products.multiply(u, v.T, scores)
            yield b, scores
