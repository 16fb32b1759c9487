"""row_extrema as it is defined: all scores at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastret.backends.pairs import Block, PairMask
from fastret.backends.reference.masked_lse import score_block
from fastret.backends.rows import poison


def row_extrema(
    x: Tensor, y: Tensor | None, extrema: Sequence[tuple[str, PairMask]], *, normalize: bool, first_column: int
) -> list[tuple[Tensor, Tensor]]:
    """(value, index) of each extremum: of equal scores the first; +-inf and -1 where no pair is allowed."""
    y = x if y is None else y
    nothing = poison(x, y)
    block = Block(0, len(x), 0, len(y), first_column)
    scores = score_block(x, y, None, normalize)
    return [_extremum(scores, kind, mask, block, nothing) for kind, mask in extrema]


def _extremum(scores: Tensor, kind: str, mask: PairMask, b: Block, nothing: Tensor) -> tuple[Tensor, Tensor]:
    worst = torch.inf if kind == "min" else -torch.inf
    allowed = mask.block(b, scores.detach())
    kept = scores if allowed is None else torch.where(allowed, scores, worst)
    if not b.columns:
        return scores.sum(1) + worst + nothing, torch.full((b.rows,), -1, device=scores.device)
    place = kept.argmin(1) if kind == "min" else kept.argmax(1)  # the first of equals, as documented
    value = kept.gather(1, place[:, None])[:, 0]
    return value + nothing, torch.where(value == worst, -1, place + b.offset)
