"""pq_topk as it is defined: every query against what every code stands for, sorted."""

import torch
from torch import Tensor

from fastret.backends import half_tables


def forward(
    query: Tensor,
    codebook: Tensor,
    codes: Tensor,
    k: int,
    *,
    metric: str,
    first_index: int,
    table_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first: of equal scores the first; +-inf and -1 where there are no more."""
    books, _, width = codebook.shape
    chosen = torch.arange(books, device=codes.device), codes.long()  # (N, M)
    decoded = codebook[chosen]  # (N, M, L)

    def score(query: Tensor) -> Tensor:
        if table_dtype != torch.float16:
            return _parts(query, decoded, metric).sum(1)
        table = _parts(query[:, None], codebook, metric)  # (M, K)
        power = half_tables.power(half_tables.greatest(table, (0, 1)))
        return half_tables.rounded(table, power)[chosen].sum(1) * power

    rows = query.view(len(query), books, width)
    scores = torch.stack([score(row) for row in rows]) if len(rows) else query.new_empty(0, len(codes))
    sign = 1 if metric == "dot" else -1
    candidates = torch.where(scores.isnan(), -torch.inf, scores * sign)
    # k places that are nobody's stand last
    candidates = torch.cat([candidates, candidates.new_full((len(query), k), -torch.inf)], 1)
    values, places = candidates.sort(dim=1, descending=True, stable=True)
    values, places = values[:, :k], places[:, :k]
    return values * sign, torch.where(values == -torch.inf, -1, places + first_index)


def _parts(query: Tensor, words: Tensor, metric: str) -> Tensor:
    """What each of the words (..., L) adds to the score of a query whose parts broadcast with them."""
    if metric == "dot":
        return (query * words).sum(-1)
    squares = (query - words).square().sum(-1)
    return squares.sqrt() if metric == "l21" else squares
