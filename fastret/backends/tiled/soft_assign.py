"""soft_assign, a block of rows at a time: no more than BUDGET scores exist at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

BUDGET = 1 << 20  # elements of one temporary


def forward(
    x: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    codebook: Tensor,
    *,
    soft: bool,
    usage: bool,
    purity: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(soft, lse, codes, usage, purity), None where not asked for."""
    rows = _rows(x, logits)
    books, words, width = codebook.shape
    n = len(rows)
    values = rows.new_empty(n, books * width) if soft else None
    lse = codebook.new_empty(n, books) if soft or usage or purity else None
    codes = torch.empty(n, books, dtype=torch.int64, device=rows.device)
    used = codebook.new_zeros(books, words) if usage else None
    squares = codebook.new_empty(n, books) if purity else None
    for block in _blocks(n, books * words):
        scores = _scores(block, x, keys, bias, logits, codebook)
        codes[block] = scores.argmax(2).T  # the first of equals, as documented
        if lse is None:
            continue
        lse[block] = scores.logsumexp(2).T
        p = scores.softmax(2)
        if values is not None:
            values[block] = torch.bmm(p, codebook).transpose(0, 1).flatten(1).to(values.dtype)
        if used is not None:
            used += p.sum(1)
        if squares is not None:
            squares[block] = p.square().sum(2).T
    return values, lse, codes, None if used is None else used / max(n, 1), squares


def backward(
    grad_soft: Tensor | None,
    grad_hard: Tensor | None,
    grad_usage: Tensor | None,
    grad_purity: Tensor | None,
    lse: Tensor | None,
    codes: Tensor,
    x: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    codebook: Tensor,
    *,
    straight_through: bool,
    need_scores: bool,
    need_codebook: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dkeys, dbias, dlogits, dcodebook)."""
    rows = _rows(x, logits)
    books, words, _ = codebook.shape
    d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if need_scores else None
    d_keys = None if keys is None or not need_scores else keys.new_zeros(keys.shape)
    d_bias = None if bias is None or not need_scores else bias.new_zeros(bias.shape)
    d_codebook = codebook.new_zeros(codebook.shape) if need_codebook else None
    for block in _blocks(len(rows), books * words):
        g_soft, g_hard = (None if g is None else _books(g[block], codebook) for g in (grad_soft, grad_hard))
        if d_codebook is not None and g_hard is not None:
            chosen = torch.nn.functional.one_hot(codes[block].T, words).to(codebook.dtype)
            d_codebook.baddbmm_(chosen.transpose(1, 2), g_hard)
        if lse is None:
            continue
        # not exp(score - lse): where scores are large, a rounded lse makes sums that are not 1, and b does not balance
        p = _scores(block, x, keys, bias, logits, codebook).softmax(2)
        if d_codebook is not None and g_soft is not None:
            d_codebook.baddbmm_(p.transpose(1, 2), g_soft)
        if d_rows is None:
            continue
        dp = torch.zeros_like(p)
        for g in (g_soft, g_hard if straight_through else None):
            if g is not None:
                dp.baddbmm_(g, codebook.transpose(1, 2))
        if grad_usage is not None:
            dp += grad_usage[:, None] / len(rows)
        if grad_purity is not None:
            dp += 2 * grad_purity[block].T[:, :, None] * p
        b = p * (dp - (p * dp).sum(2, keepdim=True))
        if keys is None:
            d_rows[block] = b.transpose(0, 1).flatten(1).to(rows.dtype)
            continue
        assert x is not None
        assert d_keys is not None
        d_rows[block] = torch.bmm(b, keys).transpose(0, 1).flatten(1).to(rows.dtype)
        d_keys.baddbmm_(b.transpose(1, 2), _books(x[block], codebook))
        if d_bias is not None:
            d_bias += b.sum(1)
    return (d_rows, d_keys, d_bias, None, d_codebook) if logits is None else (None, None, None, d_rows, d_codebook)


def _rows(x: Tensor | None, logits: Tensor | None) -> Tensor:
    rows = logits if x is None else x
    assert rows is not None
    return rows


def _blocks(rows: int, scores: int) -> Iterator[slice]:
    size = max(1, BUDGET // scores)
    return (slice(begin, begin + size) for begin in range(0, rows, size))


def _books(rows: Tensor, codebook: Tensor) -> Tensor:
    """(M, n, width) in the accumulation dtype."""
    parts: Tensor = rows.to(codebook.dtype).unflatten(1, (codebook.shape[0], -1)).transpose(0, 1)
    return parts


def _scores(
    block: slice, x: Tensor | None, keys: Tensor | None, bias: Tensor | None, logits: Tensor | None, codebook: Tensor
) -> Tensor:
    """(M, n, K)."""
    if keys is None:
        assert logits is not None
        return _books(logits[block], codebook)
    assert x is not None
    scores = torch.bmm(_books(x[block], codebook), keys.transpose(1, 2))
    return scores if bias is None else scores + bias[:, None]
