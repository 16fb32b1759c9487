"""Retrieval metrics against what other packages make of the same embeddings."""

import pytest
import torch
from torch import Tensor

from fastret.retrieval import map_at_r, mean_average_precision, queries_without_match, r_precision, recall_at_k


def embeddings(seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows: classes of 1 to 12, some rows twice (with one label: how they tie changes no metric)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(60) * 7 - 100, torch.randint(1, 7, (60,), generator=generator))
    x = torch.randn(len(labels), 8, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.normalize(x + 0.7 * torch.randn(60, 8, generator=generator).double()[(labels + 100) // 7])
    twice = (labels + 100) // 7 % 2 == 0
    x, labels = torch.cat([x, x[twice]]), torch.cat([labels, labels[twice]])
    order = torch.randperm(len(labels), generator=generator)
    return x[order], labels[order]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [True, False], ids=["leave-one-out", "gallery"])
def test_pytorch_metric_learning(seed: int, own: bool) -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    x, labels = embeddings(seed)
    queries = slice(None) if own else slice(80)
    calculator = AccuracyCalculator(
        include=names, k="max_bin_count", device=torch.device("cpu"), knn_func=CustomKNN(CosineSimilarity())
    )
    gallery = () if own else (x[80:], labels[80:])
    theirs = calculator.get_accuracy(x[queries], labels[queries], *gallery)
    given = {} if own else {"gallery": gallery[0], "gallery_labels": gallery[1]}
    mine = (
        recall_at_k(x[queries], labels[queries], ks=(1,), **given)[1],
        r_precision(x[queries], labels[queries], **given),
        map_at_r(x[queries], labels[queries], **given),
    )
    assert mine == pytest.approx([theirs[name] for name in names], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [True, False], ids=["leave-one-out", "gallery"])
def test_pytorch_metric_learning_with_ties(seed: int, own: bool) -> None:
    """Rows of few directions, so that rows of several classes tie at every cut, pairs and singletons among the classes.

    pytorch-metric-learning judges a ranking by exact cosines, of equal ones the lower index first.
    """
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    def ranked(query: Tensor, k: int, rows: Tensor, leave_one_out: bool) -> tuple[Tensor, Tensor]:
        scores = query.sign() @ rows.sign().T  # one feature is not 0: exact
        if leave_one_out:
            scores.fill_diagonal_(-torch.inf)
        found = scores.sort(dim=1, descending=True, stable=True)
        return found.values[:, :k], found.indices[:, :k]

    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(30), torch.tensor([1, 2, 2, 3, 9] * 6))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    x = torch.eye(5)[torch.randint(0, 5, (len(labels),), generator=generator)]
    x *= torch.randint(1, 9, (len(labels), 1), generator=generator)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"), knn_func=ranked)
    queries = slice(None) if own else slice(40)
    gallery = () if own else (x[40:], labels[40:])
    theirs = calculator.get_accuracy(x[queries], labels[queries], *gallery)
    given = {} if own else {"gallery": gallery[0], "gallery_labels": gallery[1]}
    assert queries_without_match(labels[queries], given.get("gallery_labels")) > 0
    mine = (
        recall_at_k(x[queries], labels[queries], ks=(1,), **given)[1],
        r_precision(x[queries], labels[queries], **given),
        map_at_r(x[queries], labels[queries], **given),
    )
    assert mine == pytest.approx([theirs[name] for name in names], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [True, False], ids=["leave-one-out", "gallery"])
def test_scikit_learn_and_faiss(seed: int, own: bool) -> None:
    """Average precision of each query by itself; recall from the neighbours that faiss finds."""
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    faiss = pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(150, 6, generator=generator), torch.randint(0, 40, (150,), generator=generator)
    labels[7], labels[3] = 1000, 1001
    x = torch.nn.functional.normalize(x)
    y, y_labels = (x, labels) if own else (torch.nn.functional.normalize(torch.randn(90, 6)), labels[:90] % 35)
    given = {} if own else {"gallery": y, "gallery_labels": y_labels}
    precisions, excluded = [], 0
    for i, row in enumerate(x.double()):
        others = torch.arange(len(y)) != (i if own else -1)
        relevant = (y_labels == labels[i])[others]
        if not relevant.any():
            excluded += 1
            continue
        precisions.append(average_precision_score(relevant.numpy(), (y.double() @ row)[others].numpy()))
    assert excluded > 0
    assert queries_without_match(labels, None if own else y_labels) == excluded
    expected = sum(precisions) / len(precisions)
    assert mean_average_precision(x, labels, **given) == pytest.approx(expected, abs=1e-6)
    index = faiss.IndexFlatIP(6)
    index.add(y.numpy())
    places = torch.from_numpy(index.search(x.numpy(), 11)[1])
    found = (y_labels[places] == labels[:, None]) & ~(own & (places == torch.arange(150)[:, None]))
    for k in (1, 5, 10):
        recall = found[:, : k + own].any(1).sum() / (150 - excluded)
        assert recall_at_k(x, labels, ks=(k,), **given)[k] == pytest.approx(recall.item(), abs=1e-6)
