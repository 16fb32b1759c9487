"""topk in the tiles of ``fastret.backends.tiled.masked_lse``: the best so far compete with each tile's scores."""

import torch
from torch import Tensor

from fastret.backends.pairs import PairMask
from fastret.backends.rows import accumulation_dtype
from fastret.backends.tiled.masked_lse import Tile, tiles


def forward(x: Tensor, y: Tensor, k: int, mask: PairMask, *, metric: str, first_column: int) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first, as backends/reference defines them."""
    sign = -1 if metric == "l2" else 1
    values = torch.full((len(x), k), -torch.inf, dtype=accumulation_dtype(x.dtype), device=x.device)
    indices = torch.full((len(x), k), -1, device=x.device)
    for tile in tiles(x, y, {None}, metric == "cosine", first_column):
        scores = _distances(tile) if metric == "l2" else tile.scores(None)
        allowed = mask.block(tile.block, scores)
        number = ~scores.isnan()
        candidates = torch.where(number if allowed is None else number & allowed, scores * sign, -torch.inf)
        # what was found before stands first: lower columns
        both = torch.cat([values[tile.rows], candidates], 1)
        columns = tile.block.column(x.device).expand(len(both), -1)
        place = _best(both, k)
        values[tile.rows] = both.gather(1, place)
        indices[tile.rows] = torch.cat([indices[tile.rows], columns], 1).gather(1, place)
    return values * sign, torch.where(values == -torch.inf, -1, indices)


def _distances(tile: Tile) -> Tensor:
    x, y = tile.x[None].rows, tile.y[None].rows
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return (squares - 2 * tile.scores(None)).clamp_min(0)


def _best(values: Tensor, k: int) -> Tensor:
    """(rows, k) places of the greatest in descending order, the first of equals first; no NaN."""
    if values.dtype != torch.float32:
        return values.argsort(dim=1, descending=True, stable=True)[:, :k]
    # One integer for value and place has no equals, so that a selection, which alone is fast, has no choice. Both zeros
    # are one value; the bits of negative numbers, but for the sign, ascend as they descend.
    bits = (values + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    place = torch.arange(values.shape[1], device=values.device)
    keys = ascending * 2**32 + (2**32 - 1 - place)
    return 2**32 - 1 - (keys.topk(k, dim=1).values & (2**32 - 1))
