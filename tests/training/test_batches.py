"""What a step trains on: images with their classes, or views with the numbers of their images; states."""

import pytest
import torch

from fastret.data import ImageSet
from fastret.training.augment import Views
from fastret.training.batches import ClassBatches, ViewBatches


def _data(count: int = 30, classes: int = 5) -> ImageSet:
    """Image i is gray of the level i, its class i mod classes."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 8, 8).clone()
    return ImageSet(images, torch.arange(count) % classes, [str(c) for c in range(classes)], classes)


def test_images_come_with_their_classes() -> None:
    batches = ClassBatches(_data(), 4, 3, seed=0)
    images, labels = next(batches)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0, 0, 0] % 5, labels)
    assert torch.equal(labels, labels[::3].repeat_interleave(3))
    assert len(labels[::3].unique()) == batches.classes == 4
    assert ClassBatches(_data(), 64, 3, seed=0).classes == 5


def test_views_come_with_their_images() -> None:
    batches = ViewBatches(_data(), 10, 2, seed=0, views=Views())
    for _ in range(2):
        seen = []
        for _ in range(3):
            images, labels = next(batches)
            assert images.dtype == torch.float32
            assert torch.equal(images[:, 0, 4, 4].round().long(), labels)
            assert torch.equal(labels[:10], labels[10:])
            seen.append(labels[:10])
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(30))
    assert ViewBatches(_data(), 64, 2, seed=0, views=Views()).classes == 30


def test_two_views_of_an_image_differ() -> None:
    images, _ = next(ViewBatches(_data(), 10, 2, seed=0, views=Views(light=0.5)))
    assert not torch.allclose(images[1:10], images[11:])


@pytest.mark.parametrize("kind", ["classes", "views"])
def test_state_goes_on_with_the_very_next_batch(kind: str) -> None:
    def build(seed: int) -> ClassBatches | ViewBatches:
        if kind == "classes":
            return ClassBatches(_data(), 3, 2, seed)
        return ViewBatches(_data(), 7, 2, seed, Views(shift=0.2, light=0.5))

    first, second = build(0), build(1)
    for _ in range(4):
        next(first)
    second.load_state_dict(first.state_dict())
    for _ in range(9):
        for a, b in zip(next(first), next(second), strict=True):
            assert torch.equal(a, b)
