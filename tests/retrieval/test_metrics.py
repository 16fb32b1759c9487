"""Retrieval metrics against their definitions written as loops."""

import math

import pytest
import torch
from torch import Tensor

import fastret
from fastret.retrieval import (
    map_at_r,
    mean_average_precision,
    metrics,
    queries_without_match,
    r_precision,
    recall_at_k,
)

Ks = tuple[int, ...]


def _loops(x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, ks: Ks) -> dict[str, float]:
    """Every metric, one query and one rank after another."""
    gallery, gallery_labels = (x, labels) if y is None or y_labels is None else (y, y_labels)
    sums: dict[str, float] = {}
    queries = 0
    for q in range(len(x)):
        scored = []
        for j in range(len(gallery)):
            if y is None and j == q:
                continue
            cosine = float(x[q] @ gallery[j]) / (float(x[q].norm()) * float(gallery[j].norm()))
            scored.append((-round(cosine, 9), j))  # rounding makes duplicates tie, whatever the order of summation
        relevant = [bool(gallery_labels[j] == labels[q]) for _, j in sorted(scored)]
        r = sum(relevant)
        if r == 0:
            continue
        queries += 1
        precision = [sum(relevant[: i + 1]) / (i + 1) for i in range(len(relevant))]
        values = {f"recall@{k}": float(any(relevant[:k])) for k in ks}
        values["r_precision"] = precision[r - 1]
        values["map_at_r"] = sum(p for p, hit in zip(precision[:r], relevant[:r], strict=True) if hit) / r
        values["map"] = sum(p for p, hit in zip(precision, relevant, strict=True) if hit) / r
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
    return {name: total / queries for name, total in sums.items()}


def _all(x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, ks: Ks) -> dict[str, float]:
    found = {f"recall@{k}": v for k, v in recall_at_k(x, labels, ks=ks, gallery=y, gallery_labels=y_labels).items()}
    found["r_precision"] = r_precision(x, labels, gallery=y, gallery_labels=y_labels)
    found["map_at_r"] = map_at_r(x, labels, gallery=y, gallery_labels=y_labels)
    found["map"] = mean_average_precision(x, labels, gallery=y, gallery_labels=y_labels)
    return found


@pytest.mark.parametrize("own_gallery", [True, False], ids=["leave-one-out", "gallery"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [1, 300, 1 << 20], ids=lambda b: f"budget {b}")
def test_equals_loops(own_gallery: bool, dtype: torch.dtype, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of unequal size, a class that only one query has, and blocks of any number of queries."""
    monkeypatch.setattr(metrics, "BUDGET", budget)
    x = torch.randn(43, 5, dtype=dtype)
    labels = torch.randint(0, 9, (43,), dtype=torch.int32)
    labels[7] = 1000
    y, y_labels = (None, None) if own_gallery else (torch.randn(31, 5, dtype=dtype), torch.randint(0, 9, (31,)))
    ks = (1, 2, 10, 30)
    expected = _loops(x.double(), labels, None if y is None else y.double(), y_labels, ks)
    assert _all(x, labels, y, y_labels, ks) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("budget", [1, 300, 1 << 20], ids=lambda b: f"budget {b}")
@pytest.mark.parametrize("largest", [1, 20])
@pytest.mark.parametrize(
    "names", [("recall", "map-at-r"), ("map", "r-precision", "recall"), ("r-precision", "map-at-r")]
)
def test_one_ranking_gives_several(
    budget: int, largest: int, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of k and R is larger; equal rows stand on both sides of every cut."""
    monkeypatch.setattr(metrics, "BUDGET", budget)
    x = torch.randn(8, 3).repeat(6, 1)
    labels = torch.randint(0, 7, (48,))
    ks = (1, largest)
    alone = {f"recall@{k}": share for k, share in recall_at_k(x, labels, ks=ks).items()}
    expected = _loops(x.double(), labels, None, None, ks)
    truth = {f"recall@{k}": expected[f"recall@{k}"] for k in ks}
    for name, function, key in (
        ("r-precision", r_precision, "r_precision"),
        ("map-at-r", map_at_r, "map_at_r"),
        ("map", mean_average_precision, "map"),
    ):
        alone[name], truth[name] = function(x, labels), expected[key]
    found = metrics.rank_metrics(x, labels, names, ks)
    wanted = [name for name in alone if name.split("@")[0] in names]
    assert set(found) == set(wanted)
    assert found == {name: pytest.approx(alone[name], abs=1e-7) for name in wanted}
    assert found == {name: pytest.approx(truth[name], abs=1e-6) for name in wanted}


def test_map_at_r_by_hand() -> None:
    """R = 3, hits at ranks 1, 3 and 4: (1/1 + 2/3) / 3, while mAP also counts rank 4."""
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4])
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    query, label = torch.tensor([[1.0, 0.0]]), torch.tensor([5])
    given = {"gallery": gallery, "gallery_labels": torch.tensor([5, 4, 5, 5])}
    assert map_at_r(query, label, **given) == pytest.approx((1 + 2 / 3) / 3)
    assert mean_average_precision(query, label, **given) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert r_precision(query, label, **given) == pytest.approx(2 / 3)


def test_ties_go_to_the_lower_index() -> None:
    gallery = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    query, label = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    for place, first in ((1, 1), (2, 2), (3, 3)):
        gallery_labels = torch.zeros(4, dtype=torch.int64)
        gallery_labels[place] = 1
        found = recall_at_k(query, label, ks=(1, 2, 3), gallery=gallery, gallery_labels=gallery_labels)
        assert found == {k: float(k >= first) for k in (1, 2, 3)}


def test_collapsed_embeddings_find_what_comes_first() -> None:
    """All rows equal: every query's nearest is row 0, and row 0's is row 1; only rows 0 and 1 share its class."""
    labels = torch.arange(20) // 2
    assert recall_at_k(torch.ones(20, 4), labels, ks=(1,)) == {1: pytest.approx(2 / 20)}


def test_scale_does_not_matter() -> None:
    """Cosines, also of rows whose squares would overflow."""
    x, labels = torch.randn(40, 8), torch.arange(40) // 4
    scale = 10.0 ** torch.randint(-10, 30, (40, 1))
    assert _all(x * scale, labels, None, None, (1, 5)) == pytest.approx(_all(x, labels, None, None, (1, 5)), abs=1e-6)


def test_half_precision_rows_are_ranked_in_float32() -> None:
    x, labels = torch.randn(40, 8).bfloat16(), torch.arange(40) // 4
    assert _all(x, labels, None, None, (1, 5)) == _all(x.float(), labels, None, None, (1, 5))


def test_perfect_and_worst() -> None:
    x = torch.eye(4).repeat_interleave(3, 0)
    labels = torch.arange(12) // 3
    assert set(_all(x, labels, None, None, (1, 11)).values()) == {1.0}
    assert recall_at_k(x, torch.arange(12) % 3, ks=(2, 11)) == {2: 0.0, 11: 1.0}


X, LABELS = torch.randn(6, 3), torch.arange(6) // 2


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((X.tolist(), LABELS), {}, TypeError, "embeddings: expected a tensor"),
        ((X[0], LABELS), {}, ValueError, r"embeddings: expected shape \(rows, width\), got \(3,\)"),
        ((X.long(), LABELS), {}, TypeError, "embeddings: expected float32.*got torch.int64"),
        ((X * math.nan, LABELS), {}, ValueError, "embeddings: expected finite values"),
        ((X, LABELS[:5]), {}, ValueError, r"labels: expected shape \(6,\).*got \(5,\)"),
        ((X, LABELS.float()), {}, TypeError, "labels: expected an integer dtype, got torch.float32"),
        ((X, torch.arange(6)), {}, ValueError, "labels: expected at least one query with a match"),
        ((X[:0], LABELS[:0]), {"ks": ()}, ValueError, "ks: expected at least one k"),
        ((X, LABELS), {"ks": (0,)}, ValueError, "ks: expected numbers between 1 and the 5 rows to search, got 0"),
        ((X, LABELS), {"ks": (6,)}, ValueError, "ks: expected numbers between 1 and the 5 rows to search, got 6"),
        ((X, LABELS), {"ks": (1.0,)}, TypeError, "ks: expected integers, got float"),
        ((X, LABELS), {"gallery": X}, ValueError, "gallery, gallery_labels: expected both or neither"),
        ((X, LABELS), {"gallery_labels": LABELS}, ValueError, "gallery, gallery_labels: expected both or neither"),
        ((X, LABELS), {"gallery": X[:, :2], "gallery_labels": LABELS}, ValueError, "gallery: expected 3 columns"),
        ((X, LABELS), {"gallery": X, "gallery_labels": LABELS[:4]}, ValueError, "gallery_labels: expected shape"),
        ((X, LABELS), {"gallery": X / 0, "gallery_labels": LABELS}, ValueError, "gallery: expected finite values"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Tensor, Tensor], keywords: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        recall_at_k(*arguments, **{"ks": (1,), **keywords})


@pytest.mark.parametrize("own_gallery", [True, False], ids=["leave-one-out", "gallery"])
def test_queries_without_match_are_counted(own_gallery: bool) -> None:
    labels, row_labels = torch.tensor([3, 3, -1, 9, 4, 4, 4], dtype=torch.int16), torch.tensor([3, 9, 9])
    assert queries_without_match(labels, None if own_gallery else row_labels) == (2 if own_gallery else 4)
    with pytest.raises(TypeError, match="labels: expected an integer dtype"):
        queries_without_match(labels.float())
    with pytest.raises(TypeError, match="gallery_labels: expected an integer dtype"):
        queries_without_match(labels, labels.float())


def test_an_implementation_for_training_does_not_stop_evaluation() -> None:
    x, labels = torch.randn(40, 5), torch.arange(40) // 4
    expected = map_at_r(x, labels)
    for name in fastret.available_backends():
        with fastret.backend(name):
            assert map_at_r(x, labels) == pytest.approx(expected)


def test_classes_of_very_unequal_size() -> None:
    """A block looks at as many ranks as its queries need."""
    x = torch.randn(130, 4, dtype=torch.float64)
    labels = torch.cat([torch.zeros(100).long(), torch.arange(30) // 2 + 1])
    expected = _loops(x, labels, None, None, (1, 7))
    assert _all(x, labels, None, None, (1, 7)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", [r_precision, map_at_r, mean_average_precision])
def test_no_match_is_an_error_of_every_metric(metric) -> None:
    with pytest.raises(ValueError, match="labels: expected at least one query with a match"):
        metric(torch.randn(4, 2), torch.arange(4))
    with pytest.raises(ValueError, match="labels: expected at least one query with a match"):
        metric(torch.randn(1, 2), torch.zeros(1, dtype=torch.int64))
