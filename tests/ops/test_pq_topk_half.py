"""pq_topk with tables of float16: against loops in float64 over rounded entries, for distances of any size, and what
rounding does to a search."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastret.backends import half_tables, registry
from fastret.backends.registry import Call
from fastret.backends.tiled import pq_topk as tiled
from fastret.ops import pq_topk
from fastret.ops.pq_topk import METRICS
from fastret.retrieval import PQIndex, product_kmeans

F64, HALF = torch.float64, torch.float16
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("pq_topk", "cpu", torch.float32)) is None
]
EVERY = ["reference", *FUSED]


def random(queries: int, books: int, words: int, width: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, codebook, codes; in float64, of numbers whose squares and products are exact in float32."""
    query = (torch.randn(queries, books * width, dtype=F64) * 512).round() / 64
    codebook = (torch.randn(books, words, width, dtype=F64) * 512).round() / 64
    return query, codebook, torch.randint(0, words, (count, books)).unique(dim=0)


def part(query: list[float], word: list[float], metric: str) -> float:
    if metric == "dot":
        return sum(a * b for a, b in zip(query, word, strict=True))
    square = sum((a - b) ** 2 for a, b in zip(query, word, strict=True))
    return math.sqrt(square) if metric == "l21" else square


def scores_of(query: Tensor, codebook: Tensor, codes: Tensor, metric: str) -> Tensor:
    """(Q, N) by loops, in float64; NumPy's float16 rounds."""
    books, _, width = codebook.shape
    rows = []
    for row in query.tolist():
        table = [
            [part(row[m * width : (m + 1) * width], w, metric) for w in codebook[m].tolist()] for m in range(books)
        ]
        greatest = max(abs(t) for entries in table for t in entries)
        e = max(math.frexp(greatest)[1] - 15, -126)
        table = [[float(np.float16(np.float32(math.ldexp(t, -e)))) for t in entries] for entries in table]
        rows.append([math.ldexp(sum(table[m][c] for m, c in enumerate(code)), e) for code in codes.tolist()])
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1.0, 2.0**50, 2.0**-50, 2.0**-63])
def test_is_the_definition(impl: str, metric: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares from 2^-138 to 2^112: no entry overflows float16, or vanishes that is not tiny beside others."""
    monkeypatch.setattr(tiled, "QUERIES", 4)
    monkeypatch.setattr(tiled, "CODES", 24)
    query, codebook, codes = random(7, 5, 9, 3, 60)
    query, codebook = query * scale, codebook * scale
    query[2] *= 2.0**-9  # each query has a power of two of its own
    truth = scores_of(query, codebook, codes, metric)
    given = query.float(), codebook.float(), codes
    scores, indices = pq_topk(*given, k=len(codes), metric=metric, table_dtype=HALF, impl=impl)
    found = torch.empty_like(truth).scatter_(1, indices, scores.double())
    size = truth.abs().amax(1, keepdim=True)
    # an entry of l21, whose root is rounded before, may take the other neighbour
    slack = 2.0**-10 if metric == "l21" else 2.0**-20
    assert ((found - truth).abs() <= slack * size).all()
    exact, _ = pq_topk(query, codebook, codes, k=len(codes), metric=metric, impl="reference")
    assert ((scores.double() - exact).abs() > 2.0**-20 * size).any()  # it is rounded indeed
    assert ((scores.double() - exact).abs() <= 2.0**-10 * size).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_implementations_hold_the_same_tables(metric: str, dtype: torch.dtype) -> None:
    """One book: scores are entries, bit for bit where these are exact before they are rounded."""
    query, codebook, codes = random(40, 1, 200, 1, 400)
    given = query.to(dtype), codebook.to(dtype), codes
    expected = pq_topk(*given, k=50, metric=metric, table_dtype=HALF, impl="reference")
    for impl in FUSED:
        found = pq_topk(*given, k=50, metric=metric, table_dtype=HALF, impl=impl)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [(1, 1, 1), (33, 10, 255), (3, 65, 256), (17, 2, 4096)], ids=str)
def test_equals_the_reference(impl: str, metric: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    query, codebook, codes = (t.to(dtype) for t in random(*size, 2, 1000))
    given = query, codebook, codes.int()
    expected, _ = pq_topk(*given, k=1000, metric=metric, table_dtype=HALF, impl="reference")
    scores, indices = pq_topk(*given, k=1000, metric=metric, table_dtype=HALF, impl=impl)
    torch.testing.assert_close(scores, expected, rtol=2e-6, atol=1e-5 * size[1])
    assert (indices.sort(1).values == torch.arange(1000).where(torch.arange(1000) < len(codes), -1).sort().values).all()


@pytest.mark.parametrize("impl", EVERY)
def test_a_power_of_two_changes_no_rank(impl: str) -> None:
    query, codebook, codes = random(9, 6, 16, 2, 500)
    expected = None
    for scale in (2.0**-40, 1.0, 2.0**40):
        given = (query * scale).float(), (codebook * scale).float(), codes
        scores, indices = pq_topk(*given, k=20, table_dtype=HALF, impl=impl)
        expected = (scores / scale**2, indices) if expected is None else expected
        torch.testing.assert_close((scores / scale**2, indices), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_ends_of_the_range(impl: str, dtype: torch.dtype) -> None:
    """Entries near the greatest number and the least; sums beyond it are the worst score; nothing at all."""
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    least = least * torch.finfo(dtype).eps if dtype == torch.float32 else least
    codes = torch.tensor([[0, 0], [1, 1], [2, 1]])
    for unit in (math.ldexp(1, math.frexp(most)[1] - 2), least):
        codebook = torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=dtype).view(2, 3, 1) * unit
        query = torch.ones(1, 2, dtype=dtype)
        scores, indices = pq_topk(query, codebook, codes, k=3, metric="dot", table_dtype=HALF, impl=impl)
        finite = [5 * unit, 4 * unit, 2 * unit]
        assert scores.tolist() == [[s if s < most else math.inf for s in finite]]
        # both of the first two overflow where the unit is great, and then tie
        assert indices.tolist() == [[1, 2, 0] if unit > 1 else [2, 1, 0]]
        scores, indices = pq_topk(-query, codebook, codes, k=3, metric="dot", table_dtype=HALF, impl=impl)
        assert indices.tolist() == [[0, -1, -1] if unit > 1 else [0, 1, 2]]
        assert scores[0, 0] == -2 * unit
    zero = torch.zeros(2, 3, 1, dtype=dtype)
    scores, indices = pq_topk(query * 0, zero, codes, k=2, table_dtype=HALF, impl=impl)
    assert (scores.tolist(), indices.tolist()) == ([[0, 0]], [[0, 1]])


@pytest.mark.parametrize("impl", EVERY)
def test_what_is_not_finite_stays_so_and_scales_nothing(impl: str) -> None:
    query, codebook, codes = (t.float() if t.is_floating_point() else t for t in random(5, 3, 7, 2, 200))
    _, places = pq_topk(query, codebook, codes, k=200, table_dtype=HALF, impl=impl)
    bad = (codes[:, 0] == 3) | (codes[:, 1] == 5)
    codebook[0, 3, 0], codebook[1, 5, 1] = math.nan, math.inf
    query[4, 2] = math.nan
    scores, indices = pq_topk(query, codebook, codes, k=200, table_dtype=HALF, impl=impl)
    assert (indices[4] == -1).all()
    for row in range(4):
        kept = places[row][places[row] >= 0]
        kept = kept[~bad[kept]]
        assert torch.equal(indices[row, : len(kept)], kept)
        assert (indices[row, len(kept) :] == -1).all()
        assert (scores[row, len(kept) :] == math.inf).all()


def test_powers_of_two_are_exact() -> None:
    for dtype, least, most in ((torch.float32, -126, 128), (F64, -1022, 1024)):
        exponents = range(least - 20, most)
        greatest = torch.tensor([math.ldexp(1, e) for e in exponents], dtype=dtype)
        expected = torch.tensor([math.ldexp(1, max(e + 1 - 15, least)) for e in exponents], dtype=dtype)
        assert torch.equal(half_tables.power(greatest), expected)
        assert (half_tables.rounded(greatest[20:], expected[20:]) >= 1).all()


def test_most_neighbours_are_those_of_float32_tables() -> None:
    """Rows with the falling spectrum of real features, trained words: rounding moves the 10 best hardly."""
    generator = torch.Generator().manual_seed(5)
    spectrum = torch.arange(1.0, 33).rsqrt()
    x = torch.randn(6100, 32, generator=generator) * spectrum
    index = PQIndex(product_kmeans(x[100:], 8, 64, iterations=5, progress=False))
    index.add(x[100:])
    wide, half = (index.search(x[:100], 10, table_dtype=dtype)[1] for dtype in (torch.float32, HALF))
    overlap = (wide[:, :, None] == half[:, None]).any(2).float().mean()
    assert overlap > 0.985
    assert not torch.equal(wide, half)
