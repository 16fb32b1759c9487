"""ImageSet: what it refuses, and how it splits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastret.data import ImageSet

GOOD: dict[str, Any] = {
    "images": torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1),
    "labels": torch.tensor([2, 0, 1, 0, 2]),
    "class_names": ["a", "b", "c"],
    "train_classes": 1,
}


def test_parts_keep_images_with_their_names() -> None:
    whole = ImageSet(**GOOD)
    train, held_out = whole.train(), whole.held_out()
    assert (train.class_names, train.labels.tolist()) == (["a"], [0, 0])
    assert train.images.flatten().tolist() == [1, 3]
    assert (held_out.class_names, held_out.labels.tolist()) == (["b", "c"], [1, 0, 1])
    assert held_out.images.flatten().tolist() == [0, 2, 4]


def test_a_part_is_all_training_or_all_held_out() -> None:
    whole = ImageSet(**GOOD)
    assert len(whole.train().held_out().labels) == 0
    assert len(whole.held_out().train().labels) == 0
    assert torch.equal(whole.held_out().held_out().images, whole.held_out().images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(5, 1, 1, 1)}, "images must be uint8"),
        ({"images": torch.zeros(5, 1, 1, dtype=torch.uint8)}, "images must be uint8"),
        ({"labels": torch.zeros(5, dtype=torch.int32)}, "labels must be int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, "got 0 to 3"),
        ({"labels": torch.tensor([0, 1, 2, -1, 0])}, "got -1 to 2"),
        ({"train_classes": 4}, "train_classes"),
        ({"train_classes": -1}, "train_classes"),
    ],
)
def test_inconsistent_parts_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSet(**{**GOOD, **change})
