"""What a step trains on, drawn at random: images with classes, or views of images without.

Both kinds are endless iterators of (images, labels), a row an embedding, and have a state of plain values and tensors,
so that a run goes on with the very next batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastret.data import ClassBalancedBatches, ImageSet
from fastret.training.augment import Views, random_shift

SHIFT = 2  # pixels

Batch = tuple[Tensor, Tensor]


class _Batches(Iterator[Batch]):
    """Draws ``samples_per_class`` images of each of ``classes_per_batch`` classes, and changes them at random.

    Attributes:
        images: of a batch, each counted once.
    """

    def __init__(self, labels: Tensor, classes_per_batch: int, samples_per_class: int, seed: int) -> None:
        self.index = ClassBalancedBatches(
            labels, classes_per_batch, samples_per_class, generator=torch.Generator().manual_seed(seed)
        )
        self.changes = torch.Generator().manual_seed(seed)
        self.images = classes_per_batch * samples_per_class

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index.state_dict(), "changes": self.changes.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the batches that gave ``state`` stood; they must have had the same data and options."""
        self.index.load_state_dict(state["index"])
        self.changes.set_state(state["changes"])


class ClassBatches(_Batches):
    """Blocks of images of one class, each shifted at random: (n, c, h, w) uint8, and their classes.

    Args:
        data: the images to train on.
        classes: of a batch; all there are where the data has fewer.
        samples: images of a class.
        seed: of everything that is drawn.
    """

    def __init__(self, data: ImageSet, classes: int, samples: int, seed: int) -> None:
        self.data = data
        self.classes = min(classes, data.train_classes)
        super().__init__(data.labels, self.classes, samples, seed)

    def __next__(self) -> Batch:
        index = next(self.index)
        return random_shift(self.data.images[index], SHIFT, generator=self.changes), self.data.labels[index]


class ViewBatches(_Batches):
    """Views of images, all first ones, then all second ones: (n, c, h, w) float32, and the number of the image.

    Labels are not looked at: every image is a class of its own, and all are used equally often.

    Args:
        data: the images to train on.
        images: of a batch; all there are where the data has fewer.
        samples: views of an image.
        seed: of everything that is drawn.
        views: draws a view.
    """

    def __init__(self, data: ImageSet, images: int, samples: int, seed: int, views: Views) -> None:
        self.data = data
        self.classes = min(images, len(data.images))
        self.samples = samples
        self.views = views
        super().__init__(torch.arange(len(data.images)), self.classes, 1, seed)

    def __next__(self) -> Batch:
        index = next(self.index).repeat(self.samples)
        return self.views(self.data.images[index], self.changes), index
