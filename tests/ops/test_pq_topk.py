"""pq_topk against its definition: scores, order, ties, code dtypes, pieces, and what is no candidate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import pq_topk as tiled
from fastret.ops import pq_topk, topk
from fastret.ops.pq_topk import METRICS

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("pq_topk", "cpu", torch.float32)) is None
]
EVERY = ["reference", *FUSED]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and a tail on both axes at test sizes."""
    monkeypatch.setattr(tiled, "QUERIES", 16)
    monkeypatch.setattr(tiled, "CODES", 24)


def random(
    queries: int, books: int, words: int, width: int, count: int, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, codebook, codes."""
    codes = torch.randint(0, words, (count, books), dtype=torch.int32)
    query, codebook = torch.randn(queries, books * width, dtype=F64), torch.randn(books, words, width, dtype=F64)
    return query.to(dtype), codebook.to(dtype), codes.to(torch.uint8) if words <= 256 else codes


def score(query: list[float], words: list[list[float]], metric: str) -> float:
    """Of one code, whose words these are."""
    width = len(words[0])
    parts = [(query[m * width : (m + 1) * width], word) for m, word in enumerate(words)]
    if metric == "dot":
        return sum(p * q for part, word in parts for p, q in zip(part, word, strict=True))
    squares = [sum((p - q) ** 2 for p, q in zip(part, word, strict=True)) for part, word in parts]
    return sum(math.sqrt(s) for s in squares) if metric == "l21" else sum(squares)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 4, 20])
def test_is_the_definition(impl: str, metric: str, k: int) -> None:
    """One code at a time."""
    query, codebook, codes = random(6, 3, 5, 2, 9)
    codes[7] = codes[2]
    scores, indices = pq_topk(query, codebook, codes, k=k, metric=metric, first_index=5, impl=impl)
    assert scores.shape == indices.shape == (6, k)
    assert (scores.dtype, indices.dtype) == (F64, torch.int64)
    sign = 1 if metric == "dot" else -1
    books = codebook.tolist()
    for i, row in enumerate(query.tolist()):
        pairs = []
        for j, code in enumerate(codes.tolist()):
            same = 2 if j == 7 else j  # a copy: the lower index comes first
            words = [books[m][c] for m, c in enumerate(code)]
            pairs.append((-sign * score(row, words, metric), same, j + 5))
        expected = [(-sign * s, j) for s, _, j in sorted(pairs)[:k]]
        expected += [(-sign * math.inf, -1)] * (k - len(expected))
        assert indices[i].tolist() == [j for _, j in expected]
        assert scores[i].tolist() == pytest.approx([s for s, _ in expected], rel=1e-12)


SIZES = [  # queries, books, words, width, codes, k
    (1, 1, 1, 1, 1, 1),
    (7, 2, 2, 3, 63, 5),
    (17, 5, 16, 4, 65, 70),
    (33, 10, 255, 5, 1000, 10),
    (3, 65, 256, 1, 700, 65),
    (20, 8, 257, 7, 300, 9),
    (5, 2, 4096, 3, 1000, 40),
    (40, 3, 3, 2, 3000, 300),
]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_float64_equals_reference(impl: str, metric: str, size: tuple[int, ...]) -> None:
    *sizes, k = size
    query, codebook, codes = random(*sizes)  # type: ignore[arg-type]
    codes = codes.unique(dim=0)
    expected, places = pq_topk(query, codebook, codes, k=k, metric=metric, first_index=2, impl="reference")
    scores, indices = pq_topk(query, codebook, codes, k=k, metric=metric, first_index=2, impl=impl)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(indices, places)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_error_is_that_of_dense_float32(impl: str, dtype: torch.dtype, metric: str) -> None:
    """Queries of any type, scores in float32; and what is returned is what the best of float64 are worth."""
    query, codebook, codes = random(70, 8, 40, 4, 900, dtype)
    scores, indices = pq_topk(query, codebook, codes, k=12, metric=metric, impl=impl)
    assert scores.dtype == torch.float32
    everything, places = pq_topk(query.to(F64), codebook.to(F64), codes, k=900, metric=metric, impl="reference")
    naive = pq_topk(query.float(), codebook.float(), codes, k=900, metric=metric, impl="reference")[0]
    bound = 2 * (naive - everything).abs().max().item() + 4 * torch.finfo(torch.float32).eps * everything.abs().max()
    assert (scores - everything[:, :12]).abs().max() <= bound
    of_index = torch.empty_like(everything).scatter_(1, places, everything)
    assert (of_index.gather(1, indices) - everything[:, :12]).abs().max() <= 2 * bound


@pytest.mark.parametrize("impl", EVERY)
def test_dtypes_may_differ(impl: str) -> None:
    query, codebook, codes = random(9, 3, 7, 2, 50, torch.float32)
    for other in (torch.bfloat16, torch.float16, F64):
        for a, b in ((query.to(other), codebook), (query, codebook.to(other))):
            scores, indices = pq_topk(a, b, codes, k=5, impl=impl)
            wide = F64 if other == F64 else torch.float32
            expected = pq_topk(a.to(wide), b.to(wide), codes, k=5, impl=impl)
            torch.testing.assert_close((scores, indices), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("words", [200, 300])
def test_codes_of_any_integer_dtype(impl: str, words: int) -> None:
    query, codebook, codes = random(9, 3, words, 2, 400)
    expected = pq_topk(query, codebook, codes.int(), k=7, impl=impl)
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64):
        if dtype != torch.uint8 or words <= 256:
            found = pq_topk(query, codebook, codes.to(dtype), k=7, impl=impl)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
def test_sixteen_bits(impl: str) -> None:
    """Codes that int16 cannot hold."""
    codebook = torch.arange(65536, dtype=F64).view(1, -1, 1)
    codes = torch.tensor([[65535], [0], [32768], [40000]])
    for dtype in (torch.int32, torch.uint16):
        scores, indices = pq_topk(torch.tensor([[65536.0], [39999.0]]), codebook, codes.to(dtype), k=2, impl=impl)
        assert indices.tolist() == [[0, 3], [3, 2]]
        assert scores.tolist() == [[1, 25536.0**2], [1, 7231.0**2]]


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 40),
    books=st.integers(1, 65),
    words=st.sampled_from((1, 2, 3, 16)),
    width=st.integers(1, 3),
    count=st.integers(0, 300),
    k=st.integers(1, 320),
    metric=st.sampled_from(("l2", "dot")),
    seed=st.integers(0, 99),
)
def test_small_integers_are_ranked_alike_everywhere(
    queries: int, books: int, words: int, width: int, count: int, k: int, metric: str, seed: int
) -> None:
    """Their scores are exact on every implementation, and most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-2, 3, (queries, books * width), generator=generator).float()
    codebook = torch.randint(-2, 3, (books, words, width), generator=generator).float()
    codes = torch.randint(0, words, (count, books), generator=generator, dtype=torch.uint8)
    expected = pq_topk(query, codebook, codes, k=k, metric=metric, impl="reference")
    for impl in FUSED:
        found = pq_topk(query, codebook, codes, k=k, metric=metric, impl=impl)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.usefixtures("small_tiles")
def test_copies_of_a_code_tie_and_pieces_merge_bit_for_bit(impl: str, metric: str, dtype: torch.dtype) -> None:
    query, codebook, distinct = random(50, 9, 16, 3, 60, dtype)
    codes = distinct.repeat(20, 1)
    scores, indices = pq_topk(query, codebook, codes, k=100, metric=metric, impl=impl)
    _, order = pq_topk(query, codebook, distinct, k=5, metric=metric, impl=impl)
    assert torch.equal(indices, (order[:, :, None] + 60 * torch.arange(20)).flatten(1))
    parts = [
        pq_topk(query, codebook, codes[a:b], k=100, metric=metric, first_index=a, impl=impl)
        for a, b in ((0, 1), (1, 800), (800, 1200))
    ]
    candidates = torch.cat([s for s, _ in parts], 1)
    best = candidates.argsort(dim=1, descending=metric == "dot", stable=True)[:, :100]
    assert torch.equal(candidates.gather(1, best), scores)
    assert torch.equal(torch.cat([i for _, i in parts], 1).gather(1, best), indices)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
def test_a_query_has_the_same_bits_in_any_company(impl: str, metric: str) -> None:
    query, codebook, codes = random(65, 11, 16, 3, 700, torch.float32)
    scores, indices = pq_topk(query, codebook, codes, k=30, metric=metric, impl=impl)
    for rows in (slice(0, 1), slice(3, 5), slice(10, 17), slice(64, 65), slice(20, 53)):
        few = pq_topk(query[rows], codebook, codes, k=30, metric=metric, impl=impl)
        if impl == "tiled" and metric == "dot":  # a matmul of another shape
            torch.testing.assert_close(few[0], scores[rows])
            continue
        torch.testing.assert_close(few, (scores[rows], indices[rows]), rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
def test_sizes(impl: str, metric: str) -> None:
    worst = -math.inf if metric == "dot" else math.inf
    for queries in (0, 1, 7, 63, 64, 65):
        for count in (0, 1, 65):
            query, codebook, codes = random(queries, 3, 4, 2, count, torch.float32)
            scores, indices = pq_topk(query, codebook, codes, k=66, metric=metric, impl=impl)
            assert scores.shape == indices.shape == (queries, 66)
            assert (indices[:, :count].sort(1).values == torch.arange(count)).all()
            assert (indices[:, count:] == -1).all()
            assert (scores[:, count:] == worst).all()
            assert scores[:, :count].isfinite().all()


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
def test_a_code_that_is_the_query(impl: str, metric: str) -> None:
    """Distance 0 exactly: differences, not |q|^2 + |w|^2 - 2 <q, w>."""
    query, codebook, codes = random(1, 6, 16, 5, 200, torch.float32)
    codebook = 1000 + codebook / 1000
    query = codebook[torch.arange(6), codes[77].long()].view(1, -1)
    scores, indices = pq_topk(query, codebook, codes, k=1, metric=metric, impl=impl)
    if metric != "dot":
        assert (scores.item(), indices.item()) == (0, 77)
    truth = pq_topk(query.to(F64), codebook.to(F64), codes, k=200, metric=metric, impl="reference")[0]
    scores, _ = pq_topk(query, codebook, codes, k=200, metric=metric, impl=impl)
    torch.testing.assert_close(scores.to(F64), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", FUSED)
def test_any_strides(impl: str) -> None:
    query, codebook, codes = random(20, 4, 9, 3, 100)
    expected = pq_topk(query, codebook, codes, k=6, impl=impl)
    spaced = torch.zeros(40, 26, dtype=F64)
    spaced[::2, 2::2] = query
    wide = torch.zeros(100, 9, dtype=torch.uint8)
    wide[:, 3:7] = codes
    turned = codebook.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for q, words, c in (
        (spaced[::2, 2::2], codebook, codes),
        (query, turned, codes),
        (query, codebook, wide[:, 3:7]),
        (query, codebook, codes.T.contiguous().T),
    ):
        torch.testing.assert_close(pq_topk(q, words, c, k=6, impl=impl), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
def test_nan_scores_are_no_candidates(impl: str, metric: str) -> None:
    query, codebook, codes = random(20, 3, 8, 2, 90, torch.float32)
    codebook[1, 5, 0] = math.nan
    valid = (codes[:, 1] != 5).nonzero().flatten()
    expected, places = pq_topk(query, codebook, codes[valid], k=len(valid), metric=metric, impl=impl)
    scores, indices = pq_topk(query, codebook, codes, k=90, metric=metric, impl=impl)
    assert torch.equal(scores[:, : len(valid)], expected)
    assert torch.equal(indices[:, : len(valid)], valid[places])
    assert (indices[:, len(valid) :] == -1).all()
    query[7, 3] = math.nan
    scores, indices = pq_topk(query, codebook, codes, k=4, metric=metric, impl=impl)
    assert (indices[7] == -1).all()
    assert scores[7].isinf().all()
    assert (indices[6] >= 0).all()


@pytest.mark.parametrize("impl", EVERY)
def test_infinite_scores(impl: str) -> None:
    """Of the good sign they are scores, of the other no candidates."""
    codebook = torch.tensor([[[3e38], [1.0], [-3e38]]])
    codes = torch.tensor([[1], [0], [2], [0]], dtype=torch.uint8)
    scores, indices = pq_topk(torch.tensor([[10.0]]), codebook, codes, k=4, metric="dot", impl=impl)
    assert indices.tolist() == [[1, 3, 0, -1]]
    assert scores.tolist() == [[math.inf, math.inf, 10, -math.inf]]
    scores, indices = pq_topk(torch.tensor([[10.0]]), codebook, codes, k=4, impl=impl)
    assert indices.tolist() == [[0, -1, -1, -1]]
    assert scores.tolist() == [[81, math.inf, math.inf, math.inf]]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("words", [11, 300])
@pytest.mark.parametrize("metric", METRICS)
def test_what_pytorch_expects(impl: str, metric: str, words: int) -> None:
    query, codebook, codes = random(6, 3, words, 2, 40, torch.float32)
    query.requires_grad_()
    scores, indices = pq_topk(query, codebook, codes, k=3, metric=metric, impl=impl)
    assert not scores.requires_grad
    operator = torch.ops.fastret.pq_topk.default
    torch.library.opcheck(operator, (query.detach(), codebook, codes, 3, metric, 2, torch.float16, impl))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, c: pq_topk(q, codebook, c, k=3, metric=metric, impl=impl), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(query, codes), (scores, indices))
    batch = torch.randn(3, 6, 6)
    several = torch.vmap(lambda q: pq_topk(q, codebook, codes, k=3, metric=metric, impl=impl))(batch)
    singles = [pq_topk(q, codebook, codes, k=3, metric=metric, impl=impl) for q in batch]
    for part in range(2):
        torch.testing.assert_close(several[part], torch.stack([s[part] for s in singles]))


def test_autocast_changes_nothing() -> None:
    query, codebook, codes = random(40, 3, 16, 4, 90, torch.float32)
    for metric in METRICS:
        for impl in EVERY:
            expected = pq_topk(query, codebook, codes, k=5, metric=metric, impl=impl)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = pq_topk(query, codebook, codes, k=5, metric=metric, impl=impl)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_who_serves() -> None:
    assert registry.resolve("pq_topk", "cuda", torch.float32, None) == "tiled"
    query, codebook, codes = random(2, 2, 4, 2, 5)
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: triton has no pq_topk"):
        pq_topk(query, codebook, codes, k=1, impl="triton")


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_is_topk_of_what_codes_stand_for(metric: str) -> None:
    query, codebook, codes = random(30, 6, 16, 4, 500)
    decoded = codebook[torch.arange(6), codes.long()].flatten(1)
    expected = topk(query, decoded, k=20, metric=metric, impl="reference")
    for impl in FUSED:
        torch.testing.assert_close(pq_topk(query, codebook, codes, k=20, metric=metric, impl=impl), expected)


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_faiss_finds_the_same(metric: str) -> None:
    faiss = pytest.importorskip("faiss")
    query, codebook, codes = random(200, 10, 256, 5, 5000, torch.float32)
    index = faiss.IndexPQ(50, 10, 8, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(codebook.flatten().numpy(), index.pq.centroids)
    faiss.copy_array_to_vector(codes.flatten().numpy(), index.codes)
    index.ntotal, index.is_trained = 5000, True
    values, places = (torch.from_numpy(t) for t in index.search(query.numpy(), 20))
    for impl in EVERY:
        scores, indices = pq_topk(query, codebook, codes, k=20, metric=metric, impl=impl)
        torch.testing.assert_close(scores, values, rtol=1e-5, atol=1e-5)
        assert (places == indices).float().mean() > 0.999  # rounding may let two change places


QUERY, CODEBOOK, CODES = random(4, 3, 5, 2, 6, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": None}, TypeError, "k: expected an integer, got NoneType"),
        ({"k": 1.5}, TypeError, "k: expected an integer, got float"),
        ({"metric": "cosine"}, ValueError, "metric: expected one of l2, l21, dot, got 'cosine'"),
        (
            {"table_dtype": torch.bfloat16},
            TypeError,
            "table_dtype: expected torch.float32 or torch.float16, got torch.bf",
        ),
        ({"table_dtype": "float16"}, TypeError, "table_dtype: expected torch.float32 or torch.float16, got 'float16'"),
        ({"first_index": -1}, ValueError, "first_index: expected at least 0"),
        ({"query": QUERY[0]}, ValueError, r"query: expected shape \(rows, width\)"),
        ({"query": QUERY.long()}, TypeError, "query: expected float32"),
        ({"query": QUERY[:, :5]}, ValueError, "query: expected 3 x 2 = 6 columns for the codebook's 3 books"),
        ({"codebook": [1.0]}, TypeError, "codebook: expected a tensor of shape"),
        ({"codebook": CODEBOOK[0]}, ValueError, r"codebook: expected shape \(books, words, width\), .* got \(5, 2\)"),
        ({"codebook": CODEBOOK.long()}, TypeError, "codebook: expected float32"),
        ({"codebook": CODEBOOK[:, :0]}, ValueError, r"codebook: expected shape .* none of them 0, got \(3, 0, 2\)"),
        (
            {"codebook": torch.zeros(1, 65537, 6)},
            ValueError,
            "codebook: expected at most 65,536 words a book",
        ),
        ({"codes": [1]}, TypeError, "codes: expected an integer tensor"),
        ({"codes": CODES.float()}, TypeError, "codes: expected an integer dtype, got torch.float32"),
        ({"codes": CODES[0]}, ValueError, r"codes: expected shape \(N, 3\), a code a book, got \(3,\)"),
        ({"codes": CODES[:, :2]}, ValueError, r"codes: expected shape \(N, 3\), a code a book, got \(6, 2\)"),
        ({"codes": CODES.to("meta")}, ValueError, "codes: expected device cpu like the codebook, got meta"),
        ({"query": QUERY.to("meta")}, ValueError, "query: expected device cpu like the codebook, got meta"),
        ({"impl": "cudnn"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, error: type[Exception], message: str) -> None:
    given = {"query": QUERY, "codebook": CODEBOOK, "codes": CODES, "k": 2, **arguments}
    with pytest.raises(error, match=message):
        pq_topk(given.pop("query"), given.pop("codebook"), given.pop("codes"), **given)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize(("words", "dtype"), [(256, torch.int8), (300, torch.int8), (300, torch.uint8)])
def test_codes_of_a_dtype_that_does_not_hold_the_number_of_words(impl: str, words: int, dtype: torch.dtype) -> None:
    query, codebook, codes = random(5, 3, words, 2, 40, torch.float32)
    codes = codes.clamp(max=torch.iinfo(dtype).max)
    expected = pq_topk(query, codebook, codes, k=4, impl=impl)
    torch.testing.assert_close(pq_topk(query, codebook, codes.to(dtype), k=4, impl=impl), expected, rtol=0, atol=0)
    if dtype == torch.int8:
        with pytest.raises(ValueError, match=f"codes: expected numbers from 0 to {words - 1}, got -1"):
            pq_topk(query, codebook, torch.full_like(codes, -1).to(dtype), k=4, impl=impl)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_codes_that_are_no_words_are_refused(impl: str, dtype: torch.dtype) -> None:
    for wrong in (5, 255, *((60_000,) if dtype != torch.uint8 else ()), *((-1,) if dtype.is_signed else ())):
        codes = CODES.int()
        codes[4, 1] = wrong
        with pytest.raises(ValueError, match=f"codes: expected numbers from 0 to 4, got {wrong}"):
            pq_topk(QUERY, CODEBOOK, codes.to(dtype), k=2, impl=impl)
