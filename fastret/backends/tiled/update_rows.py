"""update_rows_ of the whole batch at once, which is small; duplicates averaged in tiles."""

from torch import Tensor

from fastret.backends import updates
from fastret.backends.registry import Call
from fastret.backends.tiled import segment_mean


def unsupported(call: Call) -> str | None:
    """Averages need what segment_mean needs."""
    return segment_mean.unsupported(call) if "mean" in call.options else None


def update(
    bank: Tensor, index: Tensor, x: Tensor, momentum: float, convention: str, *, normalize: bool, duplicates: str
) -> None:
    """``bank[index]`` in place, from x (B, D) in the dtype of accumulation."""
    updates.update(bank, index, x, momentum, convention, normalize=normalize, duplicates=duplicates, means=_means)


def _means(rows: Tensor, segment: Tensor, count: int) -> Tensor:
    return segment_mean.forward(rows, segment, count, mean=True)[0]
