"""row_extrema in the tiles of ``fastret.backends.tiled.masked_lse``: the same scores, bit for bit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastret.backends.pairs import PairMask
from fastret.backends.rows import accumulation_dtype, poison
from fastret.backends.tiled.masked_lse import tiles


def forward(
    x: Tensor, y: Tensor | None, extrema: Sequence[tuple[str, PairMask]], *, normalize: bool, first_column: int
) -> list[tuple[Tensor, Tensor]]:
    """(value, index) of each extremum, as backends/reference defines them."""
    gallery = x if y is None else y
    worst = [torch.inf if kind == "min" else -torch.inf for kind, _ in extrema]
    start = torch.zeros(len(x), dtype=accumulation_dtype(x.dtype), device=x.device)
    results = [(start + w, torch.full((len(x),), -1, device=x.device)) for w in worst]
    for tile in tiles(x, gallery, {None}, normalize, first_column):
        scores = tile.products(None)
        for (kind, mask), (value, index), w in zip(extrema, results, worst, strict=True):
            allowed = mask.block(tile.block, scores)
            kept = scores if allowed is None else torch.where(allowed, scores, w)
            place = kept.argmin(1) if kind == "min" else kept.argmax(1)  # the first of equals, as documented
            best = kept.gather(1, place[:, None])[:, 0]
            before = value[tile.rows]
            better = best < before if kind == "min" else best > before  # equals stay with the earlier column
            value[tile.rows] = torch.where(better, best, before)
            number = place + (first_column + tile.block.first_column)
            index[tile.rows] = torch.where(better, number, index[tile.rows])
    nothing = poison(x, gallery)
    return [(value + nothing, index) for value, index in results]
