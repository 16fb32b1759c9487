"""update_rows_ as it is defined."""

from torch import Tensor

from fastret.backends import updates
from fastret.backends.reference import segment_mean


def update(
    bank: Tensor, index: Tensor, x: Tensor, momentum: float, convention: str, *, normalize: bool, duplicates: str
) -> None:
    """``bank[index]`` in place, from x (B, D) in the dtype of accumulation."""
    updates.update(bank, index, x, momentum, convention, normalize=normalize, duplicates=duplicates, means=_means)


def _means(rows: Tensor, segment: Tensor, count: int) -> Tensor:
    return segment_mean.segment_mean(rows, segment, count, mean=True)[0]
