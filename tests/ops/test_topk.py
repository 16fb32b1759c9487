"""topk against its definition: scores, order, ties, predicates, pieces, and what is no candidate."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Head, PairMask
from fastret.backends.registry import Call
from fastret.backends.tiled import masked_lse as tiled
from fastret.ops import topk
from fastret.ops.heads import flatten
from fastret.ops.topk import METRICS

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("topk", "cpu", torch.float32)) is None
]
EVERY = ["reference", *FUSED]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and a tail on both axes at test sizes."""
    monkeypatch.setattr(tiled, "ROWS", 16)
    monkeypatch.setattr(tiled, "COLUMNS", 24)


@pytest.fixture
def own_products() -> Iterator[None]:
    """The micro-kernel, for which equal rows have equal scores wherever they stand."""
    from fastret import _C

    _C.set_gemm("own")
    yield
    _C.set_gemm("")


def labels(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))


def uniform(count: int, seed: int = 2) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


MASKS: dict[str, Callable[[int, int], PairMask | None]] = {
    "any": lambda n, m: None,
    "not self": lambda n, m: PairMask(offset=0),
    "other camera, not same label": lambda n, m: PairMask(
        different=(labels(n), labels(m, 3)), distinct=(labels(n, 5), labels(m, 6))
    ),
    "same, wrapped offset": lambda n, m: PairMask(same=(labels(n), labels(m, 4)), offset=-2, period=max(n, m)),
    "between": lambda n, m: PairMask(above=uniform(n) - 0.5, below=0.6 + 5 * uniform(n, 4)),
    "none": lambda n, m: PairMask(same=(torch.zeros(n).long(), torch.ones(m).long())),
}


def score(a: list[float], b: list[float], metric: str) -> float:
    if metric == "l2":
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
    product = sum(p * q for p, q in zip(a, b, strict=True))
    return product if metric == "dot" else product / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 4, 20])
def test_is_the_definition(impl: str, metric: str, k: int) -> None:
    """One pair at a time."""
    x, y, own, others = torch.randn(6, 3, dtype=F64), torch.randn(9, 3, dtype=F64), labels(6), labels(9, 3)
    own[4] = 17  # a row without a pair
    scores, indices = topk(x, y, k=k, metric=metric, mask=PairMask(same=(own, others)), first_column=5, impl=impl)
    assert scores.shape == indices.shape == (6, k)
    assert (scores.dtype, indices.dtype) == (F64, torch.int64)
    sign = -1 if metric == "l2" else 1
    for i, a in enumerate(x.tolist()):
        pairs = [(-sign * score(a, b, metric), j + 5) for j, b in enumerate(y.tolist()) if own[i] == others[j]]
        expected = [(-sign * s, j) for s, j in sorted(pairs)[:k]]
        expected += [(-sign * math.inf, -1)] * (k - len(expected))
        assert indices[i].tolist() == [j for _, j in expected]
        assert scores[i].tolist() == pytest.approx([s for s, _ in expected], rel=1e-12)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("small_tiles")
def test_float64_equals_reference(impl: str, mask: str, metric: str) -> None:
    for n, m, d, k in ((33, 50, 7, 5), (40, 40, 5, 40), (3, 700, 9, 65), (65, 2, 2, 1), (7, 3000, 3, 300)):
        x, y = torch.randn(n, d, dtype=F64), torch.randn(m, d, dtype=F64)
        options = {"k": k, "metric": metric, "mask": MASKS[mask](n, m), "first_column": 2}
        expected, places = topk(x, y, **options, impl="reference")
        scores, indices = topk(x, y, **options, impl=impl)
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(indices, places)
    everything, _ = topk(x, k=3, metric=metric, impl=impl)
    torch.testing.assert_close(everything, topk(x, x.clone(), k=3, metric=metric, impl="reference")[0])


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_error_is_that_of_dense_float32(impl: str, dtype: torch.dtype, metric: str) -> None:
    """Rows of any type, scores in float32; and what is returned is what the best of float64 are worth."""
    x, y = torch.randn(70, 40).to(dtype), torch.randn(900, 40).to(dtype)
    scores, indices = topk(x, y, k=12, metric=metric, impl=impl)
    assert scores.dtype == torch.float32
    truth, _ = topk(x.to(F64), y.to(F64), k=12, metric=metric, impl="reference")
    a, b = x.float(), y.float()
    if metric == "cosine":
        a, b = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)
    dense = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T if metric == "l2" else a @ b.T
    naive = dense.topk(12, largest=metric != "l2").values
    bound = 2 * (naive - truth).abs().max().item() + 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    assert (scores - truth).abs().max() <= bound
    everything, places = topk(x.to(F64), y.to(F64), k=900, metric=metric, impl="reference")
    of_index = torch.empty_like(everything).scatter_(1, places, everything)
    assert (of_index.gather(1, indices) - truth).abs().max() <= 2 * bound


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("impl", FUSED)
def test_half_precision_gallery_under_float32_queries(impl: str, metric: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.randn(20, 33), torch.randn(600, 33).to(dtype)
        found = topk(x, y, k=7, metric=metric, impl=impl)
        torch.testing.assert_close(found, topk(x, y.float(), k=7, metric=metric, impl=impl), rtol=0, atol=0)
    scores, _ = topk(x, y.double(), k=7, metric=metric, impl=impl)
    assert scores.dtype == F64


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(0, 300),
    k=st.integers(1, 320),
    d=st.integers(1, 5),
    metric=st.sampled_from(("dot", "l2")),
    mask=st.sampled_from(("any", "not self", "other camera, not same label")),
    seed=st.integers(0, 99),
)
def test_small_integers_are_ranked_alike_everywhere(
    n: int, m: int, k: int, d: int, metric: str, mask: str, seed: int
) -> None:
    """Their scores are exact on every implementation, and most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-2, 3, (rows, d), generator=generator).float() for rows in (n, m))
    options = {"k": k, "metric": metric, "mask": MASKS[mask](n, m)}
    expected = topk(x, y, **options, impl="reference")
    for impl in FUSED:
        torch.testing.assert_close(topk(x, y, **options, impl=impl), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_neighbour_of_many(impl: str, metric: str, dtype: torch.dtype) -> None:
    """Several tiles and a tail, ties, masks, NaN and both zeros: of the best the first."""
    for m in (1, 5, 256, 700):
        x, y = torch.randint(-2, 3, (50, 3)).to(dtype), torch.randint(-2, 3, (m, 3)).to(dtype)
        y[m // 2] = math.nan
        for mask in MASKS.values():
            options = {"metric": metric, "mask": mask(50, m), "first_column": 3}
            scores, indices = topk(x, y, k=max(2, m), **options, impl="reference")
            one = topk(x, y, k=1, **options, impl=impl)
            torch.testing.assert_close(one, (scores[:, :1], indices[:, :1]), rtol=0, atol=0)
    _, indices = topk(-torch.zeros(1, 2, dtype=dtype), torch.ones(300, 2, dtype=dtype), k=1, metric="dot", impl=impl)
    assert indices.item() == 0


@pytest.mark.parametrize("impl", FUSED)
def test_ties_go_to_the_lowest_column(impl: str) -> None:
    """Across tiles, candidates dropped in between, and with a cut among equals."""
    y = torch.eye(4)[torch.arange(6000) % 4]
    _, indices = topk(y[:40], y, k=10, impl=impl)
    assert torch.equal(indices, torch.arange(40)[:, None] % 4 + 4 * torch.arange(10))
    _, indices = topk(y[:40], y, k=10, metric="l2", mask=PairMask(offset=0), impl=impl)
    for i, row in enumerate(indices.tolist()):
        assert row == [j for j in range(i % 4, 48, 4) if j != i][:10]


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_copies_of_a_row_tie_and_pieces_merge_bit_for_bit(metric: str, dtype: torch.dtype) -> None:
    x = torch.randn(50, 300, dtype=dtype)
    distinct = torch.randn(60, 300, dtype=dtype)
    y = distinct.repeat(20, 1)
    scores, indices = topk(x, y, k=100, metric=metric, impl="cpu")
    _, order = topk(x, distinct, k=5, metric=metric, impl="reference")
    assert torch.equal(indices, (order[:, :, None] + 60 * torch.arange(20)).flatten(1))
    parts = [topk(x, y[a:b], k=100, metric=metric, first_column=a) for a, b in ((0, 1), (1, 800), (800, 1200))]
    candidates = torch.cat([s for s, _ in parts], 1)
    best = candidates.argsort(dim=1, descending=metric != "l2", stable=True)[:, :100]
    assert torch.equal(candidates.gather(1, best), scores)
    assert torch.equal(torch.cat([i for _, i in parts], 1).gather(1, best), indices)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
def test_sizes(impl: str, metric: str) -> None:
    worst = math.inf if metric == "l2" else -math.inf
    for n in (0, 1, 7, 63, 64, 65):
        for m in (0, 1, 65):
            scores, indices = topk(torch.randn(n, 3), torch.randn(m, 3), k=66, metric=metric, impl=impl)
            assert scores.shape == indices.shape == (n, 66)
            assert (indices[:, :m].sort(1).values == torch.arange(m)).all()
            assert (indices[:, m:] == -1).all()
            assert (scores[:, m:] == worst).all()
            assert scores[:, :m].isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_any_strides(impl: str, layout: str) -> None:
    full = torch.randn(41, 41, dtype=F64)
    x = {
        "transposed": full[:20, :7].T.contiguous().T,
        "strided": full[:20, :14:2],
        "offset": full[20:40, 8:15],
        "expanded": full[:1, :7].expand(20, 7),
    }[layout]
    for metric in METRICS:
        found = topk(x, x[::2], k=6, metric=metric, impl=impl)
        expected = topk(x.contiguous(), x[::2].contiguous(), k=6, metric=metric, impl=impl)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_scores_are_no_candidates(impl: str, metric: str, bad: float) -> None:
    x, y = torch.randn(8, 4), torch.randn(9, 4)
    expected = topk(x, torch.cat([y[:3], y[4:]]), k=8, metric=metric, impl="reference")[1]
    y[3] = bad
    y[3, 0] = -bad  # products with an infinity of either sign: NaN, or distances that are infinite
    if metric == "dot":
        x[:, 2:] = 0  # 0 * infinity
        expected = topk(x, torch.cat([y[:3], y[4:]]), k=8, metric=metric, impl="reference")[1]
    _, indices = topk(x, y, k=9, metric=metric, impl=impl)
    assert torch.equal(indices[:, :8], expected + (expected >= 3))
    assert (indices[:, 8] == -1).all()
    x[5] = math.nan
    scores, indices = topk(x, y, k=9, metric=metric, impl=impl)
    assert (indices[5] == -1).all()
    assert scores[5].isinf().all()
    assert (indices[4] >= 0).sum() == 8


@pytest.mark.parametrize("impl", EVERY)
def test_infinite_scores_of_the_good_sign_are_scores(impl: str) -> None:
    x, y = torch.full((1, 2), 3e38), torch.tensor([[1.0, 1.0], [2.0, 2.0], [-2.0, -2.0], [-1.0, 0.5]])
    scores, indices = topk(x, y, k=4, metric="dot", impl=impl)
    assert indices.tolist() == [[0, 1, 3, -1]]
    assert scores[0].tolist() == pytest.approx([math.inf, math.inf, -1.5e38, -math.inf], rel=1e-6)


@pytest.mark.parametrize("impl", FUSED)
def test_rows_far_from_one(impl: str) -> None:
    """Cosines of rows whose squares overflow or vanish."""
    x, y = torch.randn(10, 8), torch.randn(30, 8)
    expected = topk(x, y, k=5, impl=impl)
    for size in (1e25, 1e-11):
        scores, indices = topk(x * size, y / size if size > 1 else y * size, k=5, impl="tiled")
        found = topk(x * size, y / size if size > 1 else y * size, k=5, impl=impl)
        torch.testing.assert_close(found[0], scores)
        assert torch.equal(found[1], indices)
    torch.testing.assert_close(topk(x * 1e25, y * 1e25, k=5, impl=impl), expected)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("metric", METRICS)
def test_what_pytorch_expects(impl: str, metric: str) -> None:
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    mask = PairMask(offset=1, above=torch.full((6,), -0.5))
    scores, indices = topk(x, y, k=3, metric=metric, mask=mask, impl=impl)
    assert not scores.requires_grad
    flat = flatten([Head(mask=mask)], torch.float32)
    lists = (flat.tensors, flat.numbers, flat.factors, flat.spec)
    torch.library.opcheck(torch.ops.fastret.topk.default, (x.detach(), y.detach(), 3, *lists, metric, 2, impl))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b: topk(a, b, k=3, metric=metric, mask=mask, impl=impl), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, y), (scores, indices))
    batch = torch.randn(3, 6, 4)
    several = torch.vmap(lambda a: topk(a, y, k=3, metric=metric, mask=mask, impl=impl))(batch)
    singles = [topk(a, y, k=3, metric=metric, mask=mask, impl=impl) for a in batch]
    for k in range(2):
        torch.testing.assert_close(several[k], torch.stack([s[k] for s in singles]))


def test_autocast_changes_nothing() -> None:
    x = torch.randn(40, 64)
    for impl in EVERY:
        expected = topk(x, k=5, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(topk(x, k=5, impl=impl), expected, rtol=0, atol=0)


def test_who_serves() -> None:
    assert registry.resolve("topk", "cuda", torch.float32, None) == "tiled"
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: triton has no topk"):
        topk(torch.randn(3, 2), k=1, impl="triton")


def test_faiss_finds_the_same() -> None:
    faiss = pytest.importorskip("faiss")
    x, y = torch.randn(200, 24), torch.randn(5000, 24)
    y[2500:2600] = y[:100]
    for metric, index in (("l2", faiss.IndexFlatL2(24)), ("dot", faiss.IndexFlatIP(24))):
        index.add(y.numpy())
        values, places = (torch.from_numpy(t) for t in index.search(x.numpy(), 20))
        for impl in FUSED:
            scores, indices = topk(x, y, k=20, metric=metric, impl=impl)
            torch.testing.assert_close(scores, values, rtol=1e-5, atol=1e-4)
            # copies of a row come in another order from there; so may scores that rounding made different
            assert (y[places] == y[indices]).all(2).float().mean() > 0.99


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": None}, TypeError, "k: expected an integer, got NoneType"),
        ({"k": 1.5}, TypeError, "k: expected an integer, got float"),
        ({"metric": "euclid"}, ValueError, "metric: expected one of cosine, dot, l2, got 'euclid'"),
        ({"x": X[0]}, ValueError, r"x: expected shape \(rows, width\)"),
        ({"x": X.long()}, TypeError, "x: expected float32"),
        ({"y": X[:, :2]}, ValueError, "y: expected 3 columns"),
        ({"first_column": -1}, ValueError, "first_column: expected at least 0"),
        ({"mask": PairMask(above=X[:2, 0])}, ValueError, "mask.above: expected shape"),
        (
            {"mask": PairMask(different=(torch.arange(4), torch.arange(3)))},
            ValueError,
            r"mask.different\[1\]: expected",
        ),
        ({"impl": "metal"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, error: type[Exception], message: str) -> None:
    given = {"x": X, "y": X, "k": 2, **arguments}
    with pytest.raises(error, match=message):
        topk(given.pop("x"), given.pop("y"), **given)
