"""Which pairs (row, column) of a pair matrix count, and which of them are targets: small, immutable, never N x M.

Columns may come in pieces. Column *numbers* (an index, an offset, a period) are those of the whole matrix; what stands
one per column (labels, ids, biases, dense targets) is given for the M columns of the piece, as the rows of y are.
``block`` methods give the (rows, columns) part that an implementation works on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows [first_row, first_row + rows) and columns [first_column, first_column + columns) of those given, of which
    the first has the number ``offset`` in the whole matrix."""

    first_row: int
    rows: int
    first_column: int
    columns: int
    offset: int = 0

    def row(self, device: torch.device) -> Tensor:
        """(rows, 1) numbers."""
        return torch.arange(self.first_row, self.first_row + self.rows, device=device)[:, None]

    def column(self, device: torch.device) -> Tensor:
        """(1, columns) numbers in the whole matrix."""
        first = self.offset + self.first_column
        return torch.arange(first, first + self.columns, device=device)[None, :]

    def of_rows(self, values: Tensor) -> Tensor:
        """(rows, 1) of one value per row."""
        return values[self.first_row : self.first_row + self.rows, None]

    def of_columns(self, values: Tensor) -> Tensor:
        """(1, columns) of one value per column."""
        return values[None, self.first_column : self.first_column + self.columns]


@dataclass(frozen=True)
class PairMask:
    """A conjunction of conditions on a pair (i, j); without any, every pair is allowed. Combine with ``&``.

    Attributes:
        same, different: (row labels (N,), column labels (M,)): equal, or different, labels.
        distinct: (row ids (N,), column ids (M,)): different ids; a second relation beside the labels.
        offset, period: j != i + offset, modulo the period where there is one; offset 0 is "not the row itself".
        above, below: (N,) bounds: s_ij > above_i, s_ij < below_i, of the unscaled score.
    """

    same: tuple[Tensor, Tensor] | None = None
    different: tuple[Tensor, Tensor] | None = None
    distinct: tuple[Tensor, Tensor] | None = None
    offset: int | None = None
    period: int | None = None
    above: Tensor | None = None
    below: Tensor | None = None

    def __and__(self, other: PairMask) -> PairMask:
        """Both conditions.

        Raises:
            ValueError: both state the same one.
        """
        mine = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        theirs = {f.name: getattr(other, f.name) for f in fields(other) if getattr(other, f.name) is not None}
        if twice := sorted(mine.keys() & theirs.keys()):
            raise ValueError(f"PairMask: {', '.join(twice)} stated twice")
        return replace(self, **theirs)

    def of_rows(self, begin: int, end: int) -> PairMask:
        """The mask of rows [begin, end), which then count from 0."""

        def cut(relation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if relation is None else (relation[0][begin:end], relation[1])

        above, below = (None if bound is None else bound[begin:end] for bound in (self.above, self.below))
        offset = None if self.offset is None else self.offset + begin
        return PairMask(cut(self.same), cut(self.different), cut(self.distinct), offset, self.period, above, below)

    def block(self, b: Block, scores: Tensor) -> Tensor | None:
        """(rows, columns) bool, or None where every pair is allowed. ``scores`` are those of the block, unscaled."""
        allowed: list[Tensor] = []
        if self.same is not None:
            allowed.append(b.of_rows(self.same[0]) == b.of_columns(self.same[1]))
        if self.different is not None:
            allowed.append(b.of_rows(self.different[0]) != b.of_columns(self.different[1]))
        if self.distinct is not None:
            allowed.append(b.of_rows(self.distinct[0]) != b.of_columns(self.distinct[1]))
        if self.offset is not None:
            allowed.append(b.column(scores.device) != wrapped(b.row(scores.device) + self.offset, self.period))
        if self.above is not None:
            allowed.append(scores > b.of_rows(self.above))
        if self.below is not None:
            allowed.append(scores < b.of_rows(self.below))
        if not allowed:
            return None
        result = allowed[0]
        for condition in allowed[1:]:
            result = result & condition
        return result


def wrapped(index: Tensor, period: int | None) -> Tensor:
    """Modulo the period where there is one."""
    return index if period is None else index % period


@dataclass(frozen=True)
class Indexed:
    """Y_ij = 1 where j = index_i (N,); a row whose index no column has gets no target."""

    index: Tensor

    def block(self, b: Block, scores: Tensor) -> Tensor:
        """(rows, columns) weights, or bool where all are 0 or 1."""
        return b.column(scores.device) == b.of_rows(self.index)


@dataclass(frozen=True)
class Shifted:
    """Y_ij = 1 where j = i + offset, modulo the period where there is one."""

    offset: int = 0
    period: int | None = None

    def block(self, b: Block, scores: Tensor) -> Tensor:
        return b.column(scores.device) == wrapped(b.row(scores.device) + self.offset, self.period)


@dataclass(frozen=True)
class Masked:
    """Y_ij = weight_i (N,) for every pair the mask allows; 1 / (number of positives) makes their mean."""

    mask: PairMask
    weight: Tensor

    def block(self, b: Block, scores: Tensor) -> Tensor:
        allowed = self.mask.block(b, scores)
        weight = b.of_rows(self.weight).to(scores.dtype).expand(b.rows, b.columns)
        return weight if allowed is None else weight * allowed


@dataclass(frozen=True)
class Circulant:
    """Y_ij = sum over d of weights_d [j = offset + (i + shift_d) mod period], as PatchMix has them."""

    shifts: tuple[int, ...]
    weights: tuple[float, ...]
    period: int
    offset: int = 0

    def block(self, b: Block, scores: Tensor) -> Tensor:
        row, column = b.row(scores.device), b.column(scores.device)
        total = scores.new_zeros(b.rows, b.columns)
        for shift, weight in zip(self.shifts, self.weights, strict=True):
            hit = column == self.offset + (row + shift) % self.period
            total.add_(hit.to(total.dtype), alpha=weight)
        return total


@dataclass(frozen=True)
class Dense:
    """Y (N, M) as it stands."""

    weights: Tensor

    def block(self, b: Block, scores: Tensor) -> Tensor:
        rows = self.weights[b.first_row : b.first_row + b.rows]
        return rows[:, b.first_column : b.first_column + b.columns].to(scores.dtype)


@dataclass(frozen=True)
class Listed:
    """Y_ij = sum of the weights of row i's entries with index j: several labels a row.

    Entries offsets_i to offsets_{i+1} (N + 1,), rising from 0 to P, belong to row i; each has an index and a weight
    (P,). Indices of no column of the piece get no target.
    """

    offsets: Tensor
    index: Tensor
    weight: Tensor

    def block(self, b: Block, scores: Tensor) -> Tensor:
        entries = self.index.shape[0]
        row = torch.repeat_interleave(self.offsets.diff(), output_size=entries) - b.first_row
        column = self.index - (b.offset + b.first_column)
        inside = (row >= 0) & (row < b.rows) & (column >= 0) & (column < b.columns)
        outside = b.rows * b.columns  # one place more, for all that is elsewhere: no size depends on values
        sums = scores.new_zeros(outside + 1)
        place = torch.where(inside, row * b.columns + column, outside)
        sums = sums.index_add(0, place, self.weight.to(scores.dtype))
        return sums[:outside].view(b.rows, b.columns)


Target = Indexed | Shifted | Masked | Circulant | Dense | Listed


@dataclass(frozen=True)
class Head:
    """One log-sum-exp, or sum, over the pair matrix; several share one product of rows.

    Logits l_ij = scale s_ij + row_bias_i + column_bias_j of scores s = <x_i, y_j> (unit rows where normalised).

    Attributes:
        scale: a number, or a 0-dim tensor that receives a gradient.
        reduce: "lse", or a name of ``fastret.backends.phi``: then the sum of phi(l_ij) takes the place of the lse.
        mask: pairs that are reduced; all where none is given. Targets are not restricted by it.
        target: Y; None: t is 0.
        smoothing: Y becomes (1 - smoothing) Y + smoothing / columns, of the whole matrix's number of columns.
        row_bias, column_bias: (N,), (M,) that receive gradients.
        axis: "row": over the columns of each row, (N,) results; "column": over the rows of each column, (M,).
            Y is read as Y_ij in both; a column's target score is sum over i of Y_ij l_ij.
        width: only the first ``width`` features (Matryoshka); norms then are those of the prefix.
    """

    scale: float | Tensor = 1.0
    mask: PairMask = None  # type: ignore[assignment]  # torch.compile traces no default object or factory
    target: Target | None = None
    smoothing: float = 0.0
    row_bias: Tensor | None = None
    column_bias: Tensor | None = None
    axis: str = "row"
    width: int | None = None
    reduce: str = "lse"

    def __post_init__(self) -> None:
        if self.mask is None:
            object.__setattr__(self, "mask", PairMask())


class Need(NamedTuple):
    """Which gradients are wanted. ``y`` is False where y is None: the rows' gradient is then that of both sides."""

    x: bool
    y: bool
    scale: bool
    row_bias: bool
    column_bias: bool


class Gradients(NamedTuple):
    """What was wanted of ``Need``; None, or a list of None, where it was not.

    Attributes:
        x, y: of the shape of the rows.
        scale, row_bias, column_bias: one entry a head, None where the head has no such tensor; 0-dim, (N,), (M,).
    """

    x: Tensor | None
    y: Tensor | None
    scale: list[Tensor | None]
    row_bias: list[Tensor | None]
    column_bias: list[Tensor | None]
