"""topk in the tiles of ``fastret.backends.tiled.masked_lse``: the best so far compete with each tile's scores."""

import torch
from torch import Tensor

from fastret.backends.pairs import PairMask
from fastret.backends.rows import accumulation_dtype
from fastret.backends.selection import best
from fastret.backends.tiled.masked_lse import Tile, tiles


def forward(x: Tensor, y: Tensor, k: int, mask: PairMask, *, metric: str, first_column: int) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first, as backends/reference defines them."""
    sign = -1 if metric == "l2" else 1
    values = torch.full((len(x), k), -torch.inf, dtype=accumulation_dtype(x.dtype), device=x.device)
    indices = torch.full((len(x), k), -1, device=x.device)
    for tile in tiles(x, y, {None}, metric == "cosine", first_column):
        scores = _distances(tile) if metric == "l2" else tile.products(None)
        allowed = mask.block(tile.block, scores)
        number = ~scores.isnan()
        candidates = torch.where(number if allowed is None else number & allowed, scores * sign, -torch.inf)
        # what was found before stands first: lower columns
        both = torch.cat([values[tile.rows], candidates], 1)
        columns = tile.block.column(x.device).expand(len(both), -1)
        place = best(both, k)
        values[tile.rows] = both.gather(1, place)
        indices[tile.rows] = torch.cat([indices[tile.rows], columns], 1).gather(1, place)
    return values * sign, torch.where(values == -torch.inf, -1, indices)


def _distances(tile: Tile) -> Tensor:
    x, y = tile.x[None].rows, tile.y[None].rows
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return (squares - 2 * tile.products(None)).clamp_min(0)
