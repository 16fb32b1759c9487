"""pq_topk as it is defined: every query against what every code stands for, sorted."""

import torch
from torch import Tensor


def forward(
    query: Tensor, codebook: Tensor, codes: Tensor, k: int, *, metric: str, first_index: int
) -> tuple[Tensor, Tensor]:
    """(scores, indices), best first: of equal scores the first; +-inf and -1 where there are no more."""
    books, _, width = codebook.shape
    decoded = codebook[torch.arange(books, device=codes.device), codes.long()]  # (N, M, L)
    parts = query.view(len(query), books, width)
    scores = torch.stack([_scores(q, decoded, metric) for q in parts]) if len(parts) else query.new_empty(0, len(codes))
    sign = 1 if metric == "dot" else -1
    candidates = torch.where(scores.isnan(), -torch.inf, scores * sign)
    # k places that are nobody's stand last
    candidates = torch.cat([candidates, candidates.new_full((len(query), k), -torch.inf)], 1)
    values, places = candidates.sort(dim=1, descending=True, stable=True)
    values, places = values[:, :k], places[:, :k]
    return values * sign, torch.where(values == -torch.inf, -1, places + first_index)


def _scores(query: Tensor, decoded: Tensor, metric: str) -> Tensor:
    if metric == "dot":
        return (query * decoded).sum((1, 2))
    squares = (query - decoded).square().sum(2)
    return (squares.sqrt() if metric == "l21" else squares).sum(1)
