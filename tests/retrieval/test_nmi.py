"""NMI against scikit-learn's of the same clusters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastret.retrieval import kmeans, nmi
from fastret.retrieval.nmi import mutual_information


def test_by_hand() -> None:
    """Shares 1/2, 1/4 and 1/4 of the pairs; 3/4 and 1/4 of the labels."""
    one, other = torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 7, -3])
    log2, log3 = 0.6931471805599453, 1.0986122886681098
    information = 0.5 * (2 * log2 - log3) + 0.25 * (log2 - log3) + 0.25 * log2
    entropy = 2 * log2 - 0.75 * log3
    assert mutual_information(one, other) == pytest.approx(2 * information / (log2 + entropy), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 60),
    first=st.integers(1, 12),
    second=st.integers(1, 12),
    equal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_scikit_learn(n: int, first: int, second: int, equal: bool, seed: int) -> None:
    oracle = pytest.importorskip("sklearn.metrics").normalized_mutual_info_score
    generator = torch.Generator().manual_seed(seed)
    one = torch.randint(0, first, (n,), generator=generator)
    other = 5 - 3 * one if equal else torch.randint(-second, 0, (n,), generator=generator).to(torch.int16)
    mine = mutual_information(one, other)
    assert 0 <= mine <= 1
    assert mine == pytest.approx(oracle(one.numpy(), other.numpy()), abs=1e-12)
    assert mutual_information(other, one) == pytest.approx(mine, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_clusters", [None, 5])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_is_of_the_clusters_of_kmeans(dtype: torch.dtype, num_clusters: int | None, metric: str) -> None:
    oracle = pytest.importorskip("sklearn.metrics").normalized_mutual_info_score
    labels = torch.randint(0, 9, (300,)) * 11 - 50
    x = (torch.randn(9, 6)[(labels + 50) // 11] + 0.8 * torch.randn(300, 6)).to(dtype)
    clusters = kmeans(x, num_clusters or 9, seed=4, metric=metric).assignment
    found = nmi(x, labels, num_clusters=num_clusters, seed=4, metric=metric)
    assert found == pytest.approx(oracle(labels.numpy(), clusters.numpy()), abs=1e-12)
    assert 0.1 < found < 0.9


def test_corners() -> None:
    x = torch.randn(4, 3)
    assert nmi(x, torch.arange(4)) == pytest.approx(1)
    assert nmi(x, torch.zeros(4).long()) == 1
    assert nmi(x, torch.zeros(4).long(), num_clusters=2) == 0
    assert nmi(x, torch.arange(4) // 2, num_clusters=1) == 0
    assert nmi(x[:1], torch.tensor([3])) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": torch.arange(3)}, ValueError, r"labels: expected shape \(4,\)"),
        ({"labels": torch.ones(4)}, TypeError, "labels: expected an integer dtype"),
        ({"num_clusters": 5}, ValueError, "num_clusters: expected at most the 4 rows, got 5"),
        ({"num_clusters": 0}, ValueError, "num_clusters: expected at least 1"),
        ({"embeddings": torch.ones(0, 3), "labels": torch.ones(0).long()}, ValueError, "expected at least one row"),
        ({"embeddings": torch.ones(4, 3) / 0}, ValueError, "expected finite values"),
        ({"metric": "dot"}, ValueError, "metric: expected one of l2, cosine"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, error: type[Exception], message: str) -> None:
    given = {"embeddings": torch.ones(4, 3), "labels": torch.arange(4), **arguments}
    with pytest.raises(error, match=message):
        nmi(given.pop("embeddings"), given.pop("labels"), **given)
