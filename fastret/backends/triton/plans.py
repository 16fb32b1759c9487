"""Fused kernels or strips: how masked_lse, pair sums, row extrema and rank sums go through their pair matrix on a GPU.

"fused": tiles of S are multiplied where they are used, and multiplied again for every slice of features that a program
accumulates in registers. "strip": PyTorch multiplies a block of S into a workspace of bounded size, one kernel reads
it, in backward another turns it into pair weights in place, and PyTorch multiplies these by the rows: 4 matmuls forward
and backward, at the vendor library's speed, and 4 to 6 passes over the stored scores. ``plan`` decides.

FASTRET_TRITON_PLAN=fused|strip decides otherwise, for measuring. FASTRET_WORKSPACE is the bound: bytes, or a number
with KiB, MiB or GiB; 128MiB where it is not set.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastret.backends.pairs import Block
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton import products
from fastret.backends.triton.rows import padded
from fastret.kernels.triton import config

PLANS = ("auto", "fused", "strip")
UNITS = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}
ENOUGH = 512  # rows with which a product is limited by arithmetic: fewer, and the columns are divided instead
RESIDENT = 4  # programs of a kernel that only reads and computes, of which a multiprocessor has room for as many

_chosen = os.environ.get("FASTRET_TRITON_PLAN") or "auto"
_workspace = os.environ.get("FASTRET_WORKSPACE") or "128MiB"


def workspace() -> int:
    """Bytes for a block of scores and its weights.

    Raises:
        ValueError: FASTRET_WORKSPACE is no such number.
    """
    match = re.fullmatch(rf"(\d+) ?({'|'.join(UNITS)})", _workspace)
    if match is None or int(match[1]) == 0:
        raise ValueError(
            f"FASTRET_WORKSPACE: expected a positive number of bytes, or one with KiB, MiB or GiB, got {_workspace!r}"
        )
    return int(match[1]) << UNITS[match[2]]


def chosen() -> str:
    """What FASTRET_TRITON_PLAN asks for.

    Raises:
        ValueError: there is no such plan.
    """
    if _chosen not in PLANS:
        raise ValueError(f"FASTRET_TRITON_PLAN: expected one of {', '.join(PLANS)}, got {_chosen!r}")
    return _chosen


def plan(width: int, held: int, *, asked: str = "auto", slow_weights: bool = False) -> str:
    """ "fused" while one program holds the gradient of a row, "strip" above.

    Strips multiply S once in each direction, fused kernels once more for every slice of either side.

    Args:
        width: of the rows, padded.
        held: features that a program of the fused gradient holds; by ``config`` 512 of half precision, 128 of float32
            or for many conditions, 32 of float64.
        asked: "auto", or the answer.
        slow_weights: weights cannot be multiplied on tensor cores outside of the fused kernels. Counted in float16
            matmuls, those of float32 taking about 13: strips 28, fused 9 at D = 768 and 21 at D = 4096.
    """
    if asked != "auto":
        return asked
    return "strip" if width > held and not slow_weights else "fused"


def plan_for(rows: Tensor, kind: str) -> str:
    """``plan`` for packed rows whose fused gradient has this kind of tiles."""
    slow = rows.dtype == torch.float16 and config.precision(torch.float32) == "ieee"
    held = config.held(kind, rows.device, rows.dtype)
    return plan(padded(rows.shape[1]), held, asked=chosen(), slow_weights=slow)


def grid(n: int, m: int, pairs: int, step: int, *, whole_rows: bool = False) -> tuple[int, int]:
    """Rows and columns of a block of at most ``pairs`` scores, multiples of ``step`` as far as there are as many; at
    least ``step`` of both. All columns where ENOUGH rows of them fit, or ``whole_rows`` are asked for."""

    def rounded(fit: int, size: int) -> int:
        return min(size, max(step, fit // step * step))

    fit = pairs // max(m, 1)
    if whole_rows or fit >= min(n, ENOUGH):
        return rounded(fit, n), m
    rows = rounded(min(ENOUGH, pairs // step), n)
    return rows, rounded(pairs // rows, m)


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

    @property
    def half(self) -> bool:
        """Whether weights are rounded to the dtype of the rows, in a place of their own. float16 has too little range
        for gradients: its weights stay float32."""
        return self.u.dtype == torch.bfloat16

    def room(self) -> int:
        """Pairs of a block."""
        return workspace() // (accumulation_dtype(self.u.dtype).itemsize + self.u.dtype.itemsize * self.half)

    def fits(self) -> bool:
        """Whether whole rows do, as many as a block has at the least."""
        return self.room() >= min(config.granularity(self.u.device), len(self.u)) * len(self.v)

    def shape(self) -> tuple[int, int]:
        """Rows and columns of all blocks but the last."""
        step = config.granularity(self.u.device)
        return grid(len(self.u), len(self.v), self.room(), step, whole_rows=self.whole_rows)

    def space_of_weights(self) -> Tensor | None:
        """For those of a block, as far apart as its scores; None where they take the place of the scores."""
        rows, columns = self.shape()
        return torch.empty(rows, padded(columns), dtype=self.u.dtype, device=self.u.device) if self.half else None

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """Every block, rows by rows, and its scores, which the next one overwrites."""
        rows, columns = self.shape()
        space = torch.empty(rows, padded(columns), dtype=accumulation_dtype(self.u.dtype), device=self.u.device)
        for i in range(0, len(self.u), rows):
            for j in range(0, len(self.v), columns):
                b = Block(i, min(rows, len(self.u) - i), j, min(columns, len(self.v) - j))
                scores = space[: b.rows, : b.columns]
                products.multiply(self.u[i : i + b.rows], self.v[j : j + b.columns].T, scores)
                yield b, scores
