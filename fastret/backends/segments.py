"""Positives as stretches of the gallery sorted by class: any labels, any class sizes, no N x M mask."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The positives of query q are the gallery rows ``order[start[q] : start[q] + count[q]]``, ascending.

    Pairs (query, positive) are listed query by query; the first pair of q stands at ``count[:q].sum()``.

    Attributes:
        order: (M,) int64, gallery rows sorted by label, stable.
        start, count: (N,) int64.
    """

    order: Tensor
    start: Tensor
    count: Tensor

    def first_pair(self) -> Tensor:
        """(N,) where the pairs of each query begin."""
        return self.count.cumsum(0) - self.count


def label_segments(labels: Tensor, y_labels: Tensor | None = None) -> Segments:
    """Segments of a gallery with ``y_labels`` (M,) for queries with ``labels`` (N,); without, of the batch itself."""
    labels = labels.contiguous()  # searchsorted would copy it, and warn
    ordered, order = torch.sort(labels if y_labels is None else y_labels, stable=True)
    start = torch.searchsorted(ordered, labels)
    return Segments(order, start, torch.searchsorted(ordered, labels, right=True) - start)
