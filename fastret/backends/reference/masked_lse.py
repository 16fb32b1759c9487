"""masked_lse as it is defined: all logits at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastret.backends import phi
from fastret.backends.centers import Centers
from fastret.backends.pairs import Block, Head
from fastret.backends.rows import accumulation_dtype, poison, unit_rows


def masked_lse(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    *,
    normalize: bool,
    first_column: int,
    columns: int,
    centers: Centers | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(lse, t) of each head: lse = log sum of exp over allowed logits (-inf, and no gradient, where there are none), or
    the sum of the head's phi over them; t = sum of Y l. Differentiable by autograd, twice."""
    y = x if y is None else y
    nothing = poison(x, y)
    block = Block(0, len(x), 0, len(y) if centers is None else len(y) // centers.count, first_column)
    results = []
    for head in heads:
        scores = score_block(x, y, head.width, normalize)
        if centers is not None:
            scores = centers.reduce(scores)
        lse, t = head_of_block(scores, head, block, columns)
        results.append((lse + nothing, t + nothing))
    return results


def score_block(x: Tensor, y: Tensor, width: int | None, normalize: bool) -> Tensor:
    """(N, M) scores of the first ``width`` features."""
    x, y = (rows.to(accumulation_dtype(rows.dtype))[:, :width] for rows in (x, y))
    if normalize:
        x, y = unit_rows(x), unit_rows(y)
    return x @ y.T


def head_of_block(scores: Tensor, head: Head, b: Block, columns: int) -> tuple[Tensor, Tensor]:
    """(lse, t) of one head over the pairs of a block, of a matrix of so many columns in all."""
    over = 1 if head.axis == "row" else 0
    logits = scores * head.scale
    if head.row_bias is not None:
        logits = logits + b.of_rows(head.row_bias)
    if head.column_bias is not None:
        logits = logits + b.of_columns(head.column_bias)
    allowed = head.mask.block(b, scores.detach())
    if allowed is None:
        allowed = torch.ones_like(scores, dtype=torch.bool)
    if head.reduce == "lse":
        reduced = _log_sum_exp(logits, allowed, over)
    else:
        # what is not allowed takes a number whose slope is finite: 0 times infinity would be NaN
        reduced = torch.where(allowed, phi.value(head.reduce, torch.where(allowed, logits, -1)), 0).sum(over)
    t = torch.zeros_like(reduced)
    if head.target is not None:
        t = (logits * head.target.block(b, scores.detach())).sum(over) * (1 - head.smoothing)
    if head.smoothing:
        t = t + head.smoothing / columns * logits.sum(over)
    return reduced, t


def _log_sum_exp(logits: Tensor, allowed: Tensor, over: int) -> Tensor:
    any_allowed = allowed.any(over, keepdim=True)
    # a row without a pair: log 0, and no gradient, rather than 0 / 0
    kept = torch.where(allowed, logits, -torch.inf)
    safe = torch.where(any_allowed, kept, 0).logsumexp(over)
    return torch.where(any_allowed.squeeze(over), safe, -torch.inf)
