"""A labelled image set held in memory, split by class rather than by image.

Held-out *classes* are the protocol of metric learning (Song et al., "Deep Metric Learning via Lifted
Structured Feature Embedding", CVPR 2016): an embedding is judged on classes it was never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


# eq=False: comparing two tensors gives a tensor, which a generated __eq__ cannot turn into one bool.
@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with class labels; the first `train_classes` classes are for training, the others are held out.

    Args:
        images: (n, channels, h, w) uint8.
        labels: (n,) int64, each an index into `class_names`.
        class_names: one name a class.
        train_classes: how many of the classes, counted from the first, are for training.

    Raises:
        ValueError: a shape, a dtype, a label or `train_classes` does not fit the others.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    train_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                "images must be uint8 of shape (n, channels, h, w), "
                f"got {self.images.dtype} of shape {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape ({len(self.images)},), one an image, "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        classes = len(self.class_names)
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise ValueError(
                f"labels must lie in [0, {classes}), one of the {classes} class names, "
                f"got {int(self.labels.min())} to {int(self.labels.max())}"
            )
        if not 0 <= self.train_classes <= classes:
            raise ValueError(f"train_classes must lie in [0, {classes}], got {self.train_classes}")

    def train(self) -> ImageSet:
        """The training classes alone, with labels 0 .. train_classes - 1."""
        return self._classes(0, self.train_classes, train_classes=self.train_classes)

    def held_out(self) -> ImageSet:
        """The held-out classes alone, relabelled from 0 so that labels index its own `class_names`."""
        return self._classes(self.train_classes, len(self.class_names), train_classes=0)

    def _classes(self, start: int, stop: int, *, train_classes: int) -> ImageSet:
        rows = ((self.labels >= start) & (self.labels < stop)).nonzero().squeeze(1)
        return ImageSet(self.images[rows], self.labels[rows] - start, self.class_names[start:stop], train_classes)
