"""topk as it is defined: all scores at once, sorted."""

import torch
from torch import Tensor

from fastret.backends.pairs import Block, PairMask
from fastret.backends.reference.masked_lse import score_block
from fastret.backends.rows import accumulation_dtype


def forward(x: Tensor, y: Tensor, k: int, mask: PairMask, *, metric: str, first_column: int) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first: of equal scores the first; +-inf and -1 where there are no more."""
    with torch.autocast(x.device.type, enabled=False):
        scores = _distances(x, y) if metric == "l2" else score_block(x, y, None, metric == "cosine")
    sign = -1 if metric == "l2" else 1
    allowed = mask.block(Block(0, len(x), 0, len(y), first_column), scores)
    number = ~scores.isnan()
    candidates = torch.where(number if allowed is None else number & allowed, scores * sign, -torch.inf)
    # k places that are nobody's stand last
    candidates = torch.cat([candidates, candidates.new_full((len(x), k), -torch.inf)], 1)
    values, places = candidates.sort(dim=1, descending=True, stable=True)
    values, places = values[:, :k], places[:, :k]
    return values * sign, torch.where(values == -torch.inf, -1, places + first_column)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) sums of squared differences, a row after another."""
    wide, others = (rows.to(accumulation_dtype(rows.dtype)) for rows in (x, y))
    return torch.stack([(others - row).square().sum(1) for row in wide]) if len(x) else wide.new_empty(0, len(y))
