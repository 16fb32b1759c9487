"""rank_sums in blocks of queries and chunks of positives: (rows, CHUNK, M) at once, bounded by a fixed budget."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastret.backends.rows import PackedRows, accumulation_dtype, pack_rows, poison
from fastret.backends.segments import Segments

CHUNK = 4  # positives of a query worked at once
BUDGET = 1 << 20  # elements of one temporary


@dataclass(frozen=True)
class _Sweep:
    """Queries sorted by class against the sorted gallery; a pair's invalid slots point one past the last pair."""

    x: PackedRows
    y: PackedRows
    start: Tensor
    count: Tensor
    first: Tensor
    pairs: int
    temperature: float
    exclude_self: bool

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of sorted queries with their scores (rows, M)."""
        n, m = len(self.x.rows), len(self.y.rows)
        rows = max(1, BUDGET // max(1, CHUNK * m))
        for begin in range(0, n, rows):
            block = slice(begin, min(n, begin + rows))
            yield block, self.x.rows[block] @ self.y.rows.T

    def chunks(self, block: slice, scores: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each chunk of positives: their pair numbers and gallery places (rows, c), and the steps (rows, c, M)."""
        rows, m = scores.shape
        start, count, first = (t[block, None] for t in (self.start, self.count, self.first))
        largest = int(count.max()) if rows else 0
        for begin in range(0, largest, CHUNK):
            slot = torch.arange(begin, min(largest, begin + CHUNK), device=scores.device)
            valid = slot < count
            place = (start + slot).clamp_max(m - 1)
            step = scores[:, None, :] - scores.gather(1, place)[:, :, None]
            step = step.div_(self.temperature).sigmoid_()
            pair = torch.where(valid, first + slot, self.pairs)
            if self.exclude_self:
                row = torch.arange(rows, device=scores.device)
                own = row + block.start
                step[row, :, own] = 0
                pair = torch.where(place == own[:, None], self.pairs, pair)
            yield pair, place, step

    def same_class(self, block: slice) -> Tensor:
        """(rows, M) whether a gallery row is a positive."""
        item = torch.arange(len(self.y.rows), device=self.start.device)
        start = self.start[block, None]
        return (item >= start) & (item < start + self.count[block, None])


def _sweep(
    x: Tensor, y: Tensor | None, s: Segments, pairs: int, temperature: float, exclude_self: bool, normalize: bool
) -> _Sweep:
    order = s.order if y is None else torch.argsort(s.start, stable=True)
    packed = pack_rows(x, order, normalize)
    gallery = packed if y is None else pack_rows(y, s.order, normalize)
    first = s.first_pair()
    return _Sweep(packed, gallery, s.start[order], s.count[order], first[order], pairs, temperature, exclude_self)


def forward(
    x: Tensor,
    y: Tensor | None,
    segments: Segments,
    pairs: int,
    *,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """rank_all, rank_pos (P,) as backends/reference defines them."""
    sweep = _sweep(x, y, segments, pairs, temperature, exclude_self, normalize)
    rank_all = torch.ones(pairs + 1, dtype=accumulation_dtype(x.dtype), device=x.device)
    rank_pos = torch.zeros_like(rank_all)  # the excluded slots hold 1 and 0
    for block, scores in sweep.blocks():
        same = sweep.same_class(block)
        for pair, _, step in sweep.chunks(block, scores):
            # j = i is among the summands with sigmoid(0) = 1/2 where the definition counts 1
            rank_all[pair] = 0.5 + step.sum(2)
            rank_pos[pair] = 0.5 + step.mul_(same[:, None, :]).sum(2)
    nothing = poison(x) if y is None else poison(x, y)
    return rank_all[:pairs] + nothing, rank_pos[:pairs] + nothing


def backward(
    grad_all: Tensor,
    grad_pos: Tensor,
    x: Tensor,
    y: Tensor | None,
    segments: Segments,
    *,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and y from those of rank_all and rank_pos (P,)."""
    pairs = grad_all.numel()
    sweep = _sweep(x, y, segments, pairs, temperature, exclude_self, normalize)
    grad_all, grad_pos = (torch.cat([g, g.new_zeros(1)]) for g in (grad_all, grad_pos))
    dx = torch.zeros_like(sweep.x.rows)
    dy = dx if y is None else torch.zeros_like(sweep.y.rows)
    for block, scores in sweep.blocks():
        same = sweep.same_class(block)
        slope = torch.zeros_like(scores)
        for pair, place, step in sweep.chunks(block, scores):
            weight = step.mul_(1 - step).div_(temperature)
            weight *= torch.where(same[:, None, :], (grad_all + grad_pos)[pair][:, :, None], grad_all[pair][:, :, None])
            slope += weight.sum(1)
            slope.scatter_add_(1, place, -weight.sum(2))
        dx[block] += slope @ sweep.y.rows
        if y is None or need_y:
            dy += slope.T @ sweep.x.rows[block]
    return (
        sweep.x.gradient(dx, x.dtype) if need_x else None,
        sweep.y.gradient(dy, y.dtype) if y is not None and need_y else None,
    )
