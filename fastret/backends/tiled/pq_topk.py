"""pq_topk by tables of a block of queries; the best so far compete with the scores of a block of codes."""

import torch
from torch import Tensor

from fastret.backends import half_tables
from fastret.backends.selection import best

QUERIES, CODES = 256, 8192
TABLE = 1 << 24  # numbers of a block's tables, as far as one query allows


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
    """(scores, indices), best first, as backends/reference defines them."""
    sign = 1 if metric == "dot" else -1
    values = query.new_full((len(query), k), -torch.inf)
    indices = torch.full((len(query), k), -1, device=query.device)
    rows = max(1, min(QUERIES, TABLE // codebook[:, :, 0].numel()))
    for begin in range(0, len(query), rows):
        block = slice(begin, begin + rows)
        tables = [sign * table for table in _tables(query[block], codebook, metric)]
        power = None
        if table_dtype == torch.float16:
            power = half_tables.power(torch.stack([half_tables.greatest(t, (0,)) for t in tables]).amax(0))
            tables = [half_tables.rounded(t, power) for t in tables]
        for first in range(0, len(codes), CODES):
            words = codes[first : first + CODES].long()
            scores = tables[0].index_select(0, words[:, 0])
            for book in range(1, len(tables)):  # in their order: sums have the bits of any other block's
                scores += tables[book].index_select(0, words[:, book])
            scores = scores if power is None else scores * power
            candidates = torch.where(scores.isnan(), -torch.inf, scores).T
            # what was found before stands first: lower indices
            both = torch.cat([values[block], candidates], 1)
            index = torch.arange(first, first + len(words), device=query.device).expand(len(both), -1)
            place = best(both, k)
            values[block] = both.gather(1, place)
            indices[block] = torch.cat([indices[block], index + first_index], 1).gather(1, place)
    return values * sign, torch.where(values == -torch.inf, -1, indices)


def _tables(query: Tensor, codebook: Tensor, metric: str) -> list[Tensor]:
    """Per book (K, rows): each word's part of the scores. Rows of a table are copied much faster than columns."""
    parts = query.view(len(query), *codebook.shape[::2]).unbind(1)
    if metric == "dot":
        return [words @ part.T for part, words in zip(parts, codebook, strict=True)]
    squares = []
    for part, words in zip(parts, codebook, strict=True):
        total = query.new_zeros(len(words), len(part))
        for column in range(words.shape[1]):
            total += (words[:, column, None] - part[:, column]).square()
        squares.append(total)
    return [square.sqrt() for square in squares] if metric == "l21" else squares
