"""The greatest of a row in an order that has no choice: of equals the first."""

import torch
from torch import Tensor


def best(values: Tensor, k: int) -> Tensor:
    """(rows, k) places of the greatest of (rows, width >= k) values, in descending order; values without NaN."""
    if values.dtype != torch.float32:
        return values.argsort(dim=1, descending=True, stable=True)[:, :k]
    # One integer for value and place has no equals, so that a selection, which alone is fast, has no choice. Both zeros
    # are one value; the bits of negative numbers, but for the sign, ascend as they descend.
    bits = (values + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    place = torch.arange(values.shape[1], device=values.device)
    keys = ascending * 2**32 + (2**32 - 1 - place)
    return 2**32 - 1 - (keys.topk(k, dim=1).values & (2**32 - 1))
