"""pq_topk: the k best of N product-quantized vectors for every query, by a table of each query; exact.

A code c_j names one word of each of M books; with book m's words w_mk and the query cut into as many parts q_m,

    l2    s_j = sum over m of |q_m - w_m,c_jm|^2      the least first: squared distance to what the code stands for
    l21   s_j = sum over m of |q_m - w_m,c_jm|        the least first: its l2,1 norm, distances that are not squared
    dot   s_j = sum over m of <q_m, w_m,c_jm>         the greatest first

l2 is asymmetric distance computation (ADC: Jegou, Douze, Schmid: Product Quantization for Nearest Neighbor Search, PAMI
2011), and what FAISS' IndexPQ computes; l21 ranks otherwise, and is the evaluation of SPQ (Jang, Cho: Self-supervised
Product Quantization for Deep Unsupervised Image Retrieval, ICCV 2021). A query that is itself made of words gets the
symmetric distances. Parts of a score are sums of differences squared, not |q|^2 + |w|^2 - 2 <q, w>, and are added book
after book: equal codes have equal bits wherever they stand.

Of equal scores the lower index comes first, and is kept. A query with fewer than k candidates is filled with the worst
score (+inf, dot: -inf) and index -1. A code whose score is NaN, or the worst, is no candidate. Pieces of the codes
merge into what one call returns, bit for bit. Results carry no gradient.

Tables of float16 (``table_dtype``; FAISS: useFloat16LookupTables) are half as large, which on CUDA bounds the scan: 16
queries share a multiprocessor's tables instead of 12, and a lookup moves half the bytes. The entries t of a query's
table are rounded to the nearest float16 of t 2^-e, with e such that the greatest finite |t| 2^-e of all books and words
lies in [2^14, 2^15), and e >= -126 (float64: -1022). They are added in the dtype of the scores, book after book, and a
sum is multiplied by 2^e before it is compared. So nothing overflows, multiplying a query's distances by a power of two
changes no rank, a part of a score is wrong by at most 2^-11 of itself or, where it is below 2^-28 of the greatest,
2^-39 of that one; what is not finite stays what it is.

Cost: Q K D multiplications for tables, Q N M lookups; in C++ one lookup serves as many queries as a vector has lanes.
Memory: O(Q k) results and, a thread, the tables and candidates of one vector of queries, O(M K + k) a lane.

Where codes are looked at: every code has to be below K, and is compared with it here, on each call, except where its
dtype cannot hold another (uint8 and K = 256). The C++ scan relies on that.

The interface of an implementation, ``fastret.backends.*.pq_topk``:

    forward(query, codebook, codes, k, *, metric, first_index, table_dtype) -> tuple[Tensor, Tensor]

with query (Q, M L) and codebook (M, K, L) both float32 or both float64; codes (N, M) of an integer dtype, in range;
k >= 1; table_dtype one of ``TABLES``; scores (Q, k) of the query's dtype; indices (Q, k) int64.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.reference import pq_topk as reference
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.library import define, loop_under_vmap
from fastret.ops.topk import LONG

METRICS = ("l2", "l21", "dot")
TABLES = (torch.float32, torch.float16)


def pq_topk(
    query: Tensor,
    codebook: Tensor,
    codes: Tensor,
    *,
    k: int,
    metric: str = "l2",
    first_index: int = 0,
    table_dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best codes of every query; formulas, ties and what is no candidate stand at the top of this file.

    Args:
        query: (Q, M L) rows, not quantized.
        codebook: (M, K, L) words, K from 1 to 65,536. Its dtype may differ from the query's.
        codes: (N, M) integers below K. uint8 (K <= 256) and uint16 are read where they lie; in C++ others are copied to
            16 bits.
        k: number of results a query, at least 1; more than there are codes is allowed.
        metric: "l2", "l21" or "dot".
        first_index: the codes are a piece of more, and the first has this index there.
        table_dtype: torch.float32, entries as they are (float64 where the scores are); torch.float16, rounded, as the
            top of this file says.
        impl: "reference", "tiled", "cpu" or "cuda" (float32, k up to 2,048); None: ``fastret.backend``, FASTRET_IMPL,
            else the fastest.

    Returns:
        (scores, indices), both (Q, k), best first; float32, or float64 where query or codebook is; int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(query, "query")
    checks.check_codebook(codebook)
    checks.check_codes(codes, codebook)
    books, _, width = codebook.shape
    if query.shape[1] != books * width:
        raise ValueError(
            f"query: expected {books} x {width} = {books * width} columns for the codebook's {books} books of "
            f"{width}-dimensional words, got {query.shape[1]}"
        )
    if query.device != codebook.device:
        raise ValueError(f"query: expected device {codebook.device} like the codebook, got {query.device}")
    if k is None:
        raise TypeError("k: expected an integer, got NoneType")
    checks.check_count(k, "k")
    check_metric(metric)
    check_table_dtype(table_dtype)
    checks.check_integer(first_index, "first_index", 0)
    wide = torch.promote_types(accumulation_dtype(query.dtype), accumulation_dtype(codebook.dtype))
    chosen = registry.resolve("pq_topk", query.device, wide, impl, ("long",) if k > LONG else ())
    rows, words = query.detach().to(wide), codebook.detach().to(wide)
    if chosen == "reference":
        check_code_values(codes, codebook)
        return reference.forward(rows, words, codes, k, metric=metric, first_index=first_index, table_dtype=table_dtype)
    scores, indices = _operator(rows, words, codes, k, metric, first_index, table_dtype, chosen)
    return scores, indices


def check_metric(metric: str) -> None:
    """One of ``METRICS``."""
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")


def check_table_dtype(table_dtype: torch.dtype) -> None:
    """One of ``TABLES``."""
    if table_dtype not in TABLES:
        raise TypeError(f"table_dtype: expected {' or '.join(map(str, TABLES))}, got {table_dtype!r}")


def check_code_values(codes: Tensor, codebook: Tensor) -> None:
    """Every code below the number of words; a device other than the CPU is not waited for but asserts."""
    words = codebook.shape[1]
    if codes.numel() == 0 or words == {torch.uint8: 1 << 8, torch.uint16: 1 << 16}.get(codes.dtype):
        return
    for piece in codes.split(1 << 18):
        checks.check_range(_greatest(piece), words, "codes")


def _greatest(codes: Tensor) -> Tensor:
    """Of unsigned codes, one pass, which is all that a search pays; others as they are."""
    if codes.dtype == torch.uint8:
        return codes.amax()
    if codes.dtype == torch.uint16:  # has no maximum: in the order of int16, without a copy in int32
        return (codes.view(torch.int16) ^ -(1 << 15)).amax().int() + (1 << 15)
    return codes


def _forward(
    query: Tensor,
    codebook: Tensor,
    codes: Tensor,
    k: int,
    metric: str,
    first_index: int,
    table_dtype: torch.dtype,
    impl: str,
) -> list[Tensor]:
    check_code_values(codes, codebook)
    module = registry.IMPLEMENTATIONS[impl].module("pq_topk")
    options = {"metric": metric, "first_index": first_index, "table_dtype": table_dtype}
    return list(module.forward(query, codebook, codes, k, **options))


def _forward_fake(query: Tensor, codebook: Tensor, codes: Tensor, k: int, *_: Any) -> list[Tensor]:
    return [query.new_empty(query.shape[0], k, dtype=dtype) for dtype in (query.dtype, torch.int64)]


define(
    "pq_topk(Tensor query, Tensor codebook, Tensor codes, SymInt k, str metric, SymInt first_index, "
    "ScalarType table_dtype, str impl) -> Tensor[]",
    _forward,
    _forward_fake,
)
loop_under_vmap("pq_topk")

_operator = torch.ops.fastret.pq_topk.default
