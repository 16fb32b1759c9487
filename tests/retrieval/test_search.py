"""Search and classification by neighbours, whole and in blocks of queries, against loops."""

import math

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from fastret import ops
from fastret.ops import PairMask
from fastret.retrieval import knn as knn_module
from fastret.retrieval import knn_classify, search, topk

X, Y = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)), torch.randn(90, 6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_PRODUCTS", 1)
    monkeypatch.setattr(search, "_LEAST_ROWS", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("offset", [None, 2])
def test_blocks_of_queries_change_nothing(metric: str, offset: int | None) -> None:
    """Relations, thresholds and offsets go with their rows."""
    mask = PairMask(
        different=(torch.arange(50) % 3, torch.arange(90) % 5),
        distinct=(torch.arange(50) % 2, torch.arange(90) % 2),
        offset=offset,
        period=None if offset is None else 11,
        above=torch.linspace(-0.9, 0.3, 50),
        below=torch.linspace(0.5, 4, 50),
    )
    scores, indices = topk(X, Y, 4, metric=metric, mask=mask, first_index=3)
    expected = ops.topk(X, Y, k=4, metric=metric, mask=mask, first_column=3)
    torch.testing.assert_close(scores, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.usefixtures("small_blocks")
def test_without_a_gallery_each_query_is_left_out() -> None:
    scores, indices = topk(X, None, 49, progress=False)
    for i, row in enumerate(indices.tolist()):
        assert sorted(row) == [j for j in range(50) if j != i]
    torch.testing.assert_close(scores, ops.topk(X, X, k=49, mask=PairMask(offset=0), impl="reference")[0])
    same_camera = PairMask(distinct=(torch.arange(50) // 10, torch.arange(50) // 10))
    _, indices = topk(X, None, 3, mask=same_camera)
    assert not (indices // 10 == torch.arange(50)[:, None] // 10).any()
    with pytest.raises(ValueError, match="PairMask: offset stated twice"):
        topk(X, None, 3, mask=PairMask(offset=1))


def test_nothing_to_search() -> None:
    for n, m in ((0, 9), (9, 0), (0, 0)):
        scores, indices = topk(torch.randn(n, 3), torch.randn(m, 3), 2)
        assert scores.shape == indices.shape == (n, 2)
        assert (indices == -1).all()
        classes, shares = knn_classify(torch.randn(n, 3), torch.randn(m, 3), torch.zeros(m).long(), top=3)
        assert classes.shape == shares.shape == (n, 3)
        assert (classes == -1).all()
        assert not shares.any()


def votes(scores: list[float], labels: list[int], temperature: float) -> list[tuple[float, int]]:
    total: dict[int, float] = {}
    for s, label in zip(scores, labels, strict=True):
        total[label] = total.get(label, 0) + math.exp(s / temperature)
    return sorted((-v / sum(total.values()), label) for label, v in total.items())


@pytest.mark.parametrize("own", [True, False], ids=["leave-one-out", "gallery"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("temperature", [0.07, 1.0, math.inf])
@pytest.mark.parametrize("budget", [1, 60, 1 << 21])
def test_classes_are_those_of_loops(
    own: bool, metric: str, temperature: float, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn_module, "BUDGET", budget)
    x = X.double()
    y, labels = (None, torch.arange(50) % 7 - 3) if own else (Y.double(), (torch.arange(90) % 7 - 3).to(torch.int16))
    scores, indices = topk(x, y, 12, metric=metric)
    classes, shares = knn_classify(x, y, labels, k=12, temperature=temperature, top=5, metric=metric)
    for i in range(50):
        worth = (-scores[i] if metric == "l2" else scores[i]).tolist()
        expected = votes(worth, labels[indices[i]].tolist(), temperature)[:5]
        expected += [(0.0, -1)] * (5 - len(expected))
        assert shares[i].tolist() == pytest.approx([-v for v, _ in expected], abs=1e-12)
        assert classes[i].tolist() == [label for _, label in expected]


def test_votes_that_tie_go_to_the_lower_label() -> None:
    y = torch.eye(4)
    query = torch.ones(1, 4)
    for labels, expected in (([9, 5, 9, 5], [5, 9]), ([-7, 8, 2, 8], [8, -7])):
        classes, shares = knn_classify(query, y, torch.tensor(labels), k=4, top=2)
        assert classes.tolist() == [expected]
        assert shares[0, 0] == 0.5


def test_neighbours_far_away_still_vote() -> None:
    """Weights relative to the nearest: e^(s/T) itself would be 0, or infinite."""
    x = torch.tensor([[1e4, 0.0]])
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    classes, shares = knn_classify(x, y, torch.tensor([4, 2]), metric="l2", temperature=1e-3)
    assert classes.tolist() == [[2]]
    assert shares.tolist() == [[1.0]]
    classes, _ = knn_classify(x, y + 1, torch.tensor([4, 2]), metric="dot", temperature=1e-3)
    assert classes.tolist() == [[2]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": X[0]}, ValueError, "query: expected shape"),
        ({"gallery": X[:, :2]}, ValueError, "gallery: expected 6 columns"),
        ({"labels": torch.zeros(9).long()}, ValueError, r"labels: expected shape \(90,\)"),
        ({"labels": torch.zeros(90)}, TypeError, "labels: expected an integer dtype"),
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a positive finite number, got nan"),
        ({"top": 0}, ValueError, "top: expected at least 1, got 0"),
        ({"metric": "euclid"}, ValueError, "metric: expected one of cosine, dot, l2, got 'euclid'"),
    ],
)
def test_bad_input_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    given: dict[str, Tensor] = {"query": X, "gallery": Y, "labels": torch.zeros(90).long(), **arguments}
    with pytest.raises(error, match=message):
        knn_classify(given.pop("query"), given.pop("gallery"), given.pop("labels"), **given)
    for bad, match in ((0, "k: expected at least 1"), (None, "k: expected an integer")):
        with pytest.raises((ValueError, TypeError), match=match):
            topk(X, Y, bad)
    more = torch.zeros(51).long()
    with pytest.raises(ValueError, match=r"mask.different\[0\]: expected shape \(50,\), got \(51,\)"):
        topk(X, Y, 2, mask=PairMask(different=(more, torch.zeros(90).long())))


def test_a_bar_shows_only_where_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    shown: list[object] = []

    def watched(**options: object) -> object:
        shown.append(options.pop("disable"))
        return tqdm(**options)

    monkeypatch.setattr("tqdm.tqdm", watched)
    topk(X, Y, 3)
    topk(X, Y, 3, progress=False)
    assert shown == [None, True]
    assert "search" not in capsys.readouterr().err
    monkeypatch.setattr(search, "_PATIENCE", 0)
    topk(X, Y, 3)
    assert "search" in capsys.readouterr().err
