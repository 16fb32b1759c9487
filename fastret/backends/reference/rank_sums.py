"""rank_sums as it is defined: every positive pair against every gallery row, (P, M) at once."""

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype, poison, unit_rows


def rank_sums(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor,
    y_labels: Tensor | None,
    *,
    temperature: float | Tensor,
    exclude_self: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """rank_all, rank_pos (P,): for query q and positive i, 1 + sum over j != i of sigmoid((s_qj - s_qi) / tau).

    Differentiable by autograd, twice. Where ``exclude_self``, q is neither positive nor competitor of itself and the
    pair (q, q) holds the constants rank_all = 1, rank_pos = 0.
    """
    dtype = accumulation_dtype(x.dtype)
    x = x.to(dtype)
    y = x if y is None else y.to(dtype)
    y_labels = labels if y_labels is None else y_labels
    if normalize:
        x, y = unit_rows(x), unit_rows(y)
    scores = x @ y.T
    same = labels[:, None] == y_labels[None, :]
    query, positive = same.nonzero(as_tuple=True)
    item = torch.arange(len(y), device=x.device)
    competes = item != positive[:, None]
    if exclude_self:
        competes = competes & (item != query[:, None])
    step = torch.sigmoid((scores[query] - scores[query, positive][:, None]) / temperature)
    step = torch.where(competes, step, 0)
    rank_all = 1 + step.sum(1)
    rank_pos = 1 + (step * same[query]).sum(1)
    if exclude_self:
        own = query == positive
        rank_all, rank_pos = torch.where(own, 1, rank_all), torch.where(own, 0, rank_pos)
    return rank_all + poison(x, y), rank_pos + poison(x, y)
