"""soft_assign in C++ (csrc/cpu/soft_assign.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import ArrayTuple, array, rows_of


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
    books, words, width = codebook.shape
    given = _readable(x, keys, bias, logits, codebook)
    rows = given[0] if given[3] is None else given[3]
    assert rows is not None
    n = len(rows)
    codes = torch.empty(n, books, dtype=torch.int64)
    lse = codebook.new_empty(n, books) if soft or usage or purity else None
    values = rows.new_empty(n, books * width) if soft else None
    used = codebook.new_empty(books, words) if usage else None
    squares = codebook.new_empty(n, books) if purity else None
    outputs = (_array(t) for t in (lse, values, used, squares))
    _C.soft_assign_forward(_problem(given, books), torch.get_num_threads(), array(codes), *outputs)
    return values, lse, codes, used, squares


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
    given = _readable(x, keys, bias, logits, codebook)
    g_soft, g_hard, g_purity, lse = (
        None if t is None else rows_of(t) for t in (grad_soft, grad_hard, grad_purity, lse)
    )
    codes, g_usage = rows_of(codes), None if grad_usage is None else grad_usage.contiguous()
    wanted = (need_scores,) * 4 + (need_codebook,)
    dx, dkeys, dbias, dlogits, dcodebook = (
        torch.empty(t.shape, dtype=t.dtype) if t is not None and want else None
        for t, want in zip((x, keys, bias, logits, codebook), wanted, strict=True)
    )
    _C.soft_assign_backward(
        _problem(given, len(codebook)),
        torch.get_num_threads(),
        (_array(g_soft), _array(g_hard), _array(g_usage), _array(g_purity)),
        _array(lse),
        array(codes),
        straight_through,
        (_array(dx if logits is None else dlogits), _words(dkeys), _array(dbias), _words(dcodebook)),
    )
    return dx, dkeys, dbias, dlogits, dcodebook


_Given = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]


def _readable(
    x: Tensor | None, keys: Tensor | None, bias: Tensor | None, logits: Tensor | None, codebook: Tensor
) -> _Given:
    """What C++ can read: these tensors must outlive the call."""
    x, logits = (None if t is None else rows_of(t) for t in (x, logits))
    keys, bias = (None if t is None else t.contiguous() for t in (keys, bias))
    return x, keys, bias, logits, codebook.contiguous()


def _problem(given: _Given, books: int) -> "_C.AssignTuple":
    x, keys, bias, logits, codebook = given
    return _array(x), _words(keys), _array(bias), _array(logits), array(codebook.flatten(0, 1)), books


def _array(t: Tensor | None) -> ArrayTuple | None:
    return None if t is None else array(t)


def _words(t: Tensor | None) -> ArrayTuple | None:
    """(M, K, width) as one row a word."""
    return None if t is None else array(t.flatten(0, 1))
