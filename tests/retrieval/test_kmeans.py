"""k-means: its descent, its corners, and codebooks beside those of faiss."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastret import backend
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.retrieval import kmeans, product_kmeans

F64 = torch.float64
module = importlib.import_module("fastret.retrieval.kmeans")  # the package has a function of its name


def blobs(n: int, d: int, centres: int, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = 4 * torch.randn(centres, d, generator=generator, dtype=F64)
    label = torch.arange(n) % centres
    return places[label] + noise * torch.randn(n, d, generator=generator, dtype=F64), label


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    return (x.double()[:, None] - centroids.double()).square().sum(2)


IMPLS = [
    impl
    for impl in ("reference", "tiled", "cpu")
    if all(
        registry.IMPLEMENTATIONS[impl].unsupported(Call(op, "cpu", torch.float32)) is None
        for op in ("topk", "segment_mean")
    )
]


@pytest.mark.parametrize("impl", IMPLS)
def test_is_lloyds_iteration(impl: str) -> None:
    """Step by step, from given centroids without empty clusters."""
    x, _ = blobs(90, 3, 4, noise=2.0)
    start = x[:5]
    centroids = start
    for moves in range(5):
        found = kmeans(x, 5, iterations=moves, tolerance=0, init=start, impl=impl)
        assert found.iterations == moves
        torch.testing.assert_close(found.centroids, centroids)
        distances = squared_distances(x, centroids)
        assert torch.equal(found.assignment, distances.argmin(1))
        assert found.inertia == pytest.approx(distances.min(1).values.sum().item())
        centroids = torch.stack([x[found.assignment == s].mean(0) for s in range(5)])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_inertia_never_rises(metric: str, dtype: torch.dtype, k: int) -> None:
    """A random start of 60 among 9 groups leaves clusters empty."""
    x, _ = blobs(300, 4, 9)
    x = x.repeat(2, 1).to(dtype)
    rows = torch.nn.functional.normalize(x.double()) if metric == "cosine" else x.double()
    before = math.inf
    for moves in range(12):
        found = kmeans(x, k, iterations=moves, tolerance=0, metric=metric, seed=3)
        inertia = squared_distances(rows, found.centroids)[torch.arange(len(x)), found.assignment].sum().item()
        noise = 1e-12 if dtype == F64 else 1e-6
        assert inertia <= before * (1 + noise) + noise
        assert found.inertia == pytest.approx(inertia, rel=1e-10 if dtype == F64 else 1e-3)
        before = inertia


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_seeds(init: str, metric: str) -> None:
    x, _ = blobs(500, 6, 20, noise=1.5)
    one, two, other = (kmeans(x.float(), 12, init=init, metric=metric, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.centroids, two.centroids)
    assert torch.equal(one.assignment, two.assignment)
    assert (one.inertia, one.iterations) == (two.inertia, two.iterations)
    assert not torch.equal(one.centroids, other.centroids)
    drawn = kmeans(x.float(), 12, init=init, metric=metric, seed=torch.Generator().manual_seed(5))
    assert torch.equal(drawn.centroids, one.centroids)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(kmeans(x.float(), 12, init=init, metric=metric, seed=5).centroids, one.centroids)
    finally:
        torch.set_num_threads(threads)


def test_separate_groups_are_found() -> None:
    """k-means++ seeds one centroid a group where groups are far apart."""
    x, label = blobs(600, 8, 12, noise=0.05)
    found = kmeans(x, 12, init="k-means++")
    groups = torch.stack([found.assignment, label]).unique(dim=1)
    assert groups.shape[1] == 12


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_fewer_distinct_rows_than_clusters(dtype: torch.dtype, init: str, metric: str) -> None:
    x = torch.randn(3, 5, dtype=dtype).repeat(10, 1)
    found = kmeans(x, 8, init=init, metric=metric, tolerance=0)
    assert found.centroids.isfinite().all()
    assert found.inertia == pytest.approx(0, abs=1e-4)
    rows = torch.nn.functional.normalize(x) if metric == "cosine" else x
    torch.testing.assert_close(found.centroids[found.assignment], rows, rtol=1e-5, atol=1e-5)


def test_empty_clusters_take_over_the_farthest_rows() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [100.0]], dtype=F64)
    start = torch.tensor([[0.0], [1000.0], [2000.0]], dtype=F64)
    found = kmeans(x, 3, init=start, iterations=1)
    assert found.centroids[:, 0].tolist() == [0.5, 100, 10]
    assert found.assignment.tolist() == [0, 0, 2, 1]
    everything = kmeans(x, 4, init=torch.full((4, 1), 50.0))
    assert everything.inertia == 0
    assert everything.assignment.sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_far_from_the_origin(dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their nearest centroids, from distances with their digits, a block of rows at a time."""
    monkeypatch.setattr(module, "BUDGET", 1)
    monkeypatch.setattr(module, "_LEAST_ROWS", 70)
    x = (1000 + 5 * torch.randn(300, 6, generator=torch.Generator().manual_seed(4))).to(dtype)
    for init in ("random", "k-means++"):
        found = kmeans(x, 20, init=init, iterations=5, tolerance=0, impl=impl)
        distances = squared_distances(x, found.centroids)
        own = distances.gather(1, found.assignment[:, None])[:, 0]
        torch.testing.assert_close(own, distances.min(1).values, rtol=1e-5, atol=0)
        assert found.inertia == pytest.approx(own.sum().item(), rel=1e-5)
    if dtype == torch.bfloat16:  # its rows lie on a grid, where equal distances are decided by the last bit
        return
    codebook = product_kmeans(x, 2, 20, iterations=5, tolerance=0, seed=1, init="k-means++", impl=impl)
    generator = torch.Generator().manual_seed(1)
    for words, part in zip(codebook, x.double().split(3, 1), strict=True):
        exact = kmeans(part, 20, iterations=5, tolerance=0, seed=generator, init="k-means++", impl="reference")
        torch.testing.assert_close(words, exact.centroids.float())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 4),
    k=st.integers(1, 30),
    init=st.sampled_from(("random", "k-means++")),
    metric=st.sampled_from(("l2", "cosine")),
    seed=st.integers(0, 99),
)
def test_small_integers(n: int, d: int, k: int, init: str, metric: str, seed: int) -> None:
    """Many equal rows, some of them zero: every row is by its nearest centroid and nothing is NaN."""
    x = torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(seed)).double()
    k = min(k, n)
    found = kmeans(x, k, init=init, metric=metric, seed=seed)
    assert found.centroids.shape == (k, d)
    assert found.centroids.isfinite().all()
    distances = squared_distances(torch.nn.functional.normalize(x) if metric == "cosine" else x, found.centroids)
    own = distances.gather(1, found.assignment[:, None])[:, 0]
    torch.testing.assert_close(own, distances.min(1).values, rtol=1e-12, atol=1e-12)
    assert found.inertia == pytest.approx(own.sum().item(), abs=1e-12)


def test_points_per_centroid() -> None:
    """All rows are assigned, with the inertia of all; what is drawn is enough for groups far apart."""
    x, _ = blobs(3000, 5, 6, noise=0.05)
    whole, some = kmeans(x, 6, init="k-means++"), kmeans(x, 6, init="k-means++", max_points_per_centroid=20)
    assert some.assignment.shape == (3000,)
    assert some.inertia == pytest.approx(squared_distances(x, some.centroids).min(1).values.sum().item())
    assert whole.inertia < some.inertia < 1.1 * whole.inertia
    assert torch.equal(kmeans(x, 6, max_points_per_centroid=500).centroids, kmeans(x, 6).centroids)


def test_a_backend_for_training_does_not_stop_it() -> None:
    x, _ = blobs(50, 3, 4)
    with backend("triton"):
        assert kmeans(x, 4).inertia == kmeans(x, 4, impl="auto").inertia


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nothing_carries_a_gradient(metric: str) -> None:
    x = torch.randn(30, 4, requires_grad=True)
    for init in ("k-means++", x[:3]):
        found = kmeans(x, 3, init=init, metric=metric)
        assert not found.centroids.requires_grad
    assert not product_kmeans(x, 2, 3).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64])
def test_codebook_is_kmeans_of_each_part(dtype: torch.dtype) -> None:
    x = torch.randn(400, 6).to(dtype)
    codebook = product_kmeans(x, 3, 8, iterations=4, seed=1, max_points_per_word=None)
    assert codebook.shape == (3, 8, 2)
    assert codebook.dtype == (F64 if dtype == F64 else torch.float32)
    generator = torch.Generator().manual_seed(1)
    for m in range(3):
        part = kmeans(x[:, 2 * m : 2 * m + 2], 8, iterations=4, seed=generator)
        assert torch.equal(codebook[m], part.centroids)


@pytest.mark.parametrize(("rows", "most"), [(4000, None), (9000, 256)])
def test_codebook_is_as_good_as_that_of_faiss(rows: int, most: int | None) -> None:
    faiss = pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(24, 24, generator=generator)
    x = torch.randn(rows, 24, generator=generator).tanh() @ mixing
    quantizer = faiss.ProductQuantizer(24, 6, 5)
    quantizer.train(x.numpy())
    theirs = torch.from_numpy(faiss.vector_to_array(quantizer.centroids).reshape(6, 32, 4).copy())
    mine = product_kmeans(x, 6, 32, max_points_per_word=most)

    def error(codebook: Tensor) -> float:
        parts = zip(x.split(4, 1), codebook, strict=True)
        return sum(squared_distances(part, words).min(1).values.sum().item() for part, words in parts)

    assert error(mine) <= 1.05 * error(theirs)


X = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 7}, ValueError, "k: expected at most the 6 rows, got 7"),
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k: expected an integer, got float"),
        ({"x": X[0]}, ValueError, r"x: expected shape \(rows, width\)"),
        ({"x": X.long()}, TypeError, "x: expected float32"),
        ({"x": X / 0}, ValueError, "x: expected finite values"),
        ({"x": X * 1e30}, ValueError, "x: expected rows whose squared distances torch.float32 holds"),
        ({"iterations": -1}, ValueError, "iterations: expected at least 0, got -1"),
        ({"tolerance": -1.0}, ValueError, "tolerance: expected at least 0, got -1.0"),
        ({"tolerance": math.nan}, ValueError, "tolerance: expected a finite number"),
        ({"init": "best"}, ValueError, "init: expected random, k-means[+][+] or"),
        ({"init": X[:2]}, ValueError, "init: expected 3 centroids, got 2"),
        ({"init": X[:3, :2]}, ValueError, "init: expected 4 columns"),
        ({"init": X[:3] / 0}, ValueError, "init: expected finite values"),
        ({"max_points_per_centroid": 0}, ValueError, "max_points_per_centroid: expected at least 1"),
        ({"metric": "dot"}, ValueError, "metric: expected one of l2, cosine, got 'dot'"),
        ({"seed": "x"}, TypeError, "seed: expected an integer"),
        ({"impl": "triton"}, ValueError, "triton has no segment_mean"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, error: type[Exception], message: str) -> None:
    given = {"x": X, "k": 3, **arguments}
    with pytest.raises(error, match=message):
        kmeans(given.pop("x"), given.pop("k"), **given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_books": 3}, ValueError, "num_books: expected a divisor of the 4 features, got 3"),
        ({"num_books": 0}, ValueError, "num_books: expected at least 1"),
        ({"num_words": 7}, ValueError, "num_words: expected at most the 6 rows, got 7"),
        ({"max_points_per_word": 0}, ValueError, "max_points_per_word: expected at least 1"),
        ({"init": X}, TypeError, "init: expected one of random, k-means[+][+], got Tensor"),
        ({"x": X[0]}, ValueError, r"x: expected shape \(rows, width\)"),
    ],
)
def test_bad_input_of_a_codebook(arguments: dict, error: type[Exception], message: str) -> None:
    given = {"x": X, "num_books": 2, "num_words": 3, **arguments}
    with pytest.raises(error, match=message):
        product_kmeans(given.pop("x"), given.pop("num_books"), given.pop("num_words"), **given)
