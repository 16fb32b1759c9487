"""mAP@n of given rankings, beside a direct loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.retrieval import PQIndex, mean_average_precision_at_n, ranked


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _loop(indices: Tensor, labels: Tensor, gallery_labels: Tensor | None, n: int | None) -> float:
    """The definition, a rank at a time; Python's own numbers."""
    total = 0.0
    for query, ranking in enumerate(indices.tolist()):
        if gallery_labels is None:
            ranking = [row for row in ranking if row != query]
        rows = labels if gallery_labels is None else gallery_labels
        hits, precisions = 0, 0.0
        for rank, row in enumerate(ranking[:n], 1):
            if row >= 0 and rows[row] == labels[query]:
                hits += 1
                precisions += hits / rank
        total += precisions / hits if hits else 0.0
    return total / len(indices)


@pytest.mark.parametrize("n", [None, 1, 3, 20, 100])
@pytest.mark.parametrize("classes", [1, 3, 40])
@pytest.mark.parametrize("itself", [False, True])
def test_equals_the_loop(itself: bool, classes: int, n: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "BUDGET", 250)  # several blocks, the last a short one
    generator = _generator(classes)
    queries, rows, ranks = 37, 37 if itself else 90, 25
    labels = torch.randint(classes, (queries,), generator=generator)
    gallery_labels = None if itself else torch.randint(classes, (rows,), generator=generator)
    # Own rows first, in the middle, and not at all; a tail of nothing found.
    indices = torch.rand(queries, rows, generator=generator).argsort(1)[:, :ranks]
    indices[5, 10:] = -1
    indices[6] = -1
    found = mean_average_precision_at_n(indices, labels, gallery_labels, n=n)
    assert found == pytest.approx(_loop(indices, labels, gallery_labels, n), abs=1e-12)


@pytest.mark.parametrize("n", [None, 2])
def test_of_an_empty_gallery_nothing_is_found(n: int | None) -> None:
    index = PQIndex(torch.randn(2, 4, 3))
    _, indices = index.search(torch.randn(5, 6), 3)
    nothing = torch.empty(0, dtype=torch.int64)
    assert mean_average_precision_at_n(indices, torch.zeros(5, dtype=torch.int64), nothing, n=n) == 0.0
    with pytest.raises(ValueError, match="indices: expected -1, the gallery is empty, got -1 to 0"):
        mean_average_precision_at_n(torch.tensor([[0], [-1]]), torch.tensor([0, 0]), nothing, n=n)


def test_divides_by_the_relevant_that_were_found() -> None:
    gallery_labels = torch.tensor([0, 1, 0, 1, 0, 0])
    indices = torch.tensor([[0, 1, 2], [1, 3, 0], [1, 3, -1]])
    found = mean_average_precision_at_n(indices, torch.tensor([0, 0, 0]), gallery_labels)
    assert found == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3 + 0) / 3, abs=1e-15)


def test_the_query_itself_takes_no_rank() -> None:
    labels = torch.tensor([7, 7, 8])
    indices = torch.tensor([[0, 2, 1], [1, 0, 2], [0, 1, 2]])
    assert mean_average_precision_at_n(indices, labels) == pytest.approx((1 / 2 + 1 + 0) / 3, abs=1e-15)
    assert mean_average_precision_at_n(indices, labels, n=1) == pytest.approx((0 + 1 + 0) / 3, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integers(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    indices = torch.tensor([[3, 1, 2], [0, 2, 3], [1, 0, 3], [2, 1, 0]])
    assert mean_average_precision_at_n(indices.to(dtype), labels.to(dtype)) == mean_average_precision_at_n(
        indices, labels
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"indices": [[0]]}, TypeError, "indices: expected a tensor of integers, got list"),
        ({"indices": torch.zeros(2, 3)}, TypeError, "indices: expected a tensor of integers, got torch.float32"),
        ({"indices": torch.zeros(2, dtype=torch.int64)}, ValueError, r"at least one of each, got \(2,\)"),
        ({"indices": torch.zeros(0, 3, dtype=torch.int64)}, ValueError, r"at least one of each, got \(0, 3\)"),
        ({"indices": torch.tensor([[0], [4]])}, ValueError, "rows of the gallery, 0 to 3, got 0 to 4"),
        ({"indices": torch.tensor([[0], [-2]])}, ValueError, "rows of the gallery, 0 to 3, got -2 to 0"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels: expected shape \(2,\)"),
        ({"gallery_labels": torch.zeros(4)}, TypeError, "gallery_labels: expected an integer dtype"),
        ({"gallery_labels": None}, ValueError, "rows of the gallery, 0 to 1, got 0 to 3"),
        ({"n": 0}, ValueError, "n: expected at least 1, got 0"),
        ({"n": 1.5}, TypeError, "n: expected an integer"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], error: type, message: str) -> None:
    arguments = {
        "indices": torch.tensor([[0, 1], [2, 3]]),
        "labels": torch.tensor([0, 1]),
        "gallery_labels": torch.tensor([0, 1, 1, 0]),
        "n": None,
    }
    arguments = {**arguments, **changed}
    with pytest.raises(error, match=message):
        mean_average_precision_at_n(
            arguments["indices"], arguments["labels"], arguments["gallery_labels"], n=arguments["n"]
        )
