"""masked_lse in tiles of (ROWS, COLUMNS) scores, in one fixed grid that backward goes through again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastret.backends import phi
from fastret.backends.centers import Centers
from fastret.backends.pairs import Block, Gradients, Head, Need
from fastret.backends.rows import PackedRows, accumulation_dtype, pack_rows, poison

ROWS = COLUMNS = 1024

Grads = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Tile:
    """One block of the pair matrix; ``x`` and ``y`` are its rows and columns, packed, by feature width.

    With centres a column is a class, and ``members`` are its rows of y; else they are ``columns``.
    """

    block: Block
    rows: slice
    columns: slice
    members: slice
    x: dict[int | None, PackedRows]
    y: dict[int | None, PackedRows]
    centers: Centers | None

    def products(self, width: int | None) -> Tensor:
        return self.x[width].rows @ self.y[width].rows.T

    def scores(self, products: Tensor) -> Tensor:
        return products if self.centers is None else self.centers.reduce(products)

    def slopes(self, slopes: Tensor, products: Tensor) -> Tensor:
        """dL/d(products) from dL/d(scores)."""
        return slopes if self.centers is None else self.centers.expand(slopes, products)

    def side(self, axis: str) -> slice:
        """Where the results of a head lie."""
        return self.rows if axis == "row" else self.columns


def tiles(
    x: Tensor,
    y: Tensor,
    widths: set[int | None],
    normalize: bool,
    first_column: int,
    centers: Centers | None = None,
) -> Iterator[Tile]:
    """The pair matrix in tiles, rows by rows; the same grid for every op and direction."""

    def pack(rows: Tensor) -> dict[int | None, PackedRows]:
        order = torch.arange(len(rows), device=rows.device)
        return {width: pack_rows(rows[:, :width], order, normalize) for width in widths}

    group = 1 if centers is None else centers.count
    classes, step = len(y) // group, max(1, COLUMNS // group)
    for i in range(0, len(x), ROWS):
        rows = slice(i, min(len(x), i + ROWS))
        packed = pack(x[rows])
        for j in range(0, classes, step):
            columns = slice(j, min(classes, j + step))
            members = slice(group * j, group * columns.stop)
            block = Block(i, rows.stop - i, j, columns.stop - j, first_column)
            yield Tile(block, rows, columns, members, packed, pack(y[members]), centers)


def _logits(scores: Tensor, head: Head, b: Block) -> Tensor:
    logits = scores * head.scale
    if head.row_bias is not None:
        logits += b.of_rows(head.row_bias)
    if head.column_bias is not None:
        logits += b.of_columns(head.column_bias)
    return logits


def _allowed(logits: Tensor, scores: Tensor, head: Head, b: Block) -> Tensor:
    """Logits with -inf where the mask forbids."""
    mask = head.mask.block(b, scores)
    return logits if mask is None else torch.where(mask, logits, -torch.inf)


def _only(values: Tensor, scores: Tensor, head: Head, b: Block) -> Tensor:
    """Values with 0 where the mask forbids."""
    mask = head.mask.block(b, scores)
    return values if mask is None else torch.where(mask, values, 0)


def _target(scores: Tensor, head: Head, b: Block, columns: int) -> Tensor | None:
    """Y of a tile, smoothed; None where it is all zeros."""
    if head.target is None and not head.smoothing:
        return None
    y = torch.zeros_like(scores) if head.target is None else head.target.block(b, scores).to(scores.dtype)
    return y * (1 - head.smoothing) + head.smoothing / columns if head.smoothing else y


def forward(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    *,
    normalize: bool,
    first_column: int,
    columns: int,
    centers: Centers | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(lse, t) of each head as backends/reference defines them."""
    gallery = x if y is None else y
    sizes = {"row": len(x), "column": len(gallery) // (1 if centers is None else centers.count)}
    empty = torch.zeros((), dtype=accumulation_dtype(x.dtype), device=x.device)
    start = [-torch.inf if h.reduce == "lse" else 0.0 for h in heads]
    results = [
        (empty.new_full((sizes[h.axis],), first), empty.new_zeros(sizes[h.axis]))
        for h, first in zip(heads, start, strict=True)
    ]
    for tile in tiles(x, gallery, {h.width for h in heads}, normalize, first_column, centers):
        for width in tile.x:
            scores = tile.scores(tile.products(width))
            for head, (lse, t) in zip(heads, results, strict=True):
                if head.width != width:
                    continue
                side, over = tile.side(head.axis), 1 if head.axis == "row" else 0
                logits = _logits(scores, head, tile.block)
                target = _target(scores, head, tile.block, columns)
                if target is not None:
                    t[side] += (logits * target).sum(over)
                if head.reduce == "lse":
                    part = _allowed(logits, scores, head, tile.block).logsumexp(over)
                    lse[side] = torch.logaddexp(lse[side], part)
                else:
                    lse[side] += _only(phi.value(head.reduce, logits), scores, head, tile.block).sum(over)
    nothing = poison(x, gallery)
    return [(lse + nothing, t + nothing) for lse, t in results]


def backward(
    grads: Grads,
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    lses: Sequence[Tensor],
    *,
    normalize: bool,
    first_column: int,
    columns: int,
    need: Need,
    centers: Centers | None = None,
) -> Gradients:
    """Gradients from those (g, h) of (lse, t) of each head."""
    gallery = x if y is None else y
    wide = accumulation_dtype(x.dtype)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device) if need.x else None
    dy = dx if y is None else torch.zeros(y.shape, dtype=wide, device=x.device) if need.y else None
    nothing = poison(x, gallery)

    def zeros(wanted: bool, like: list[float | Tensor | None]) -> list[Tensor | None]:
        return [torch.zeros_like(t) + nothing if wanted and isinstance(t, Tensor) else None for t in like]

    result = Gradients(
        dx,
        dy,
        zeros(need.scale, [h.scale for h in heads]),
        zeros(need.row_bias, [h.row_bias for h in heads]),
        zeros(need.column_bias, [h.column_bias for h in heads]),
    )
    for tile in tiles(x, gallery, {h.width for h in heads}, normalize, first_column, centers):
        for width in tile.x:
            products = tile.products(width)
            scores = tile.scores(products)
            slope = torch.zeros_like(scores)
            for k, head in enumerate(heads):
                if head.width == width:
                    weight = _pair_weights(scores, head, tile, grads[k], lses[k], columns)
                    _add_scalars(result, k, weight, scores, tile)
                    slope += weight.mul_(head.scale)
            slope = tile.slopes(slope, products)
            if dx is not None:
                u, v = tile.x[width], tile.y[width]
                dx[tile.rows, :width] += u.gradient(slope @ v.rows, wide)
            if dy is not None:
                u, v = tile.x[width], tile.y[width]
                dy[tile.members, :width] += v.gradient(slope.T @ u.rows, wide)
    return result._replace(
        x=None if dx is None else dx.add_(nothing).to(x.dtype),
        y=None if dy is None or y is None else dy.add_(nothing).to(y.dtype),
    )


def _pair_weights(
    scores: Tensor, head: Head, tile: Tile, grads: tuple[Tensor, Tensor], lse: Tensor, columns: int
) -> Tensor:
    """W_ij of one head."""
    over = 1 if head.axis == "row" else 0
    g, h, total = (t[tile.side(head.axis)].unsqueeze(over) for t in (*grads, lse))
    logits = _logits(scores, head, tile.block)
    if head.reduce == "lse":
        none = total == -torch.inf
        probability = _allowed(logits, scores, head, tile.block).sub_(torch.where(none, 0, total)).exp_()
        weight = probability.mul_(torch.where(none, 0, g))
    else:
        weight = _only(phi.slope(head.reduce, logits) * g, scores, head, tile.block)
    target = _target(scores, head, tile.block, columns)
    return weight if target is None else weight.addcmul_(target, h.expand_as(target))


def _add_scalars(result: Gradients, k: int, weight: Tensor, scores: Tensor, tile: Tile) -> None:
    """The tile's part of the gradients of scale and biases."""
    for gradient, part, where in (
        (result.scale[k], lambda: (weight * scores).sum(), ...),
        (result.row_bias[k], lambda: weight.sum(1), tile.rows),
        (result.column_bias[k], lambda: weight.sum(0), tile.columns),
    ):
        if gradient is not None:
            gradient[where] += part()
