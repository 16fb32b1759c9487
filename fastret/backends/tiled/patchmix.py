"""patchmix, a few images at a time: the numbers of their sources are all that is stored beside the result."""

import torch
from torch import Tensor

BUDGET = 1 << 20  # elements of one temporary


def forward(x: Tensor, groups: Tensor, patch: int) -> Tensor:
    """out[b, t] = x[(b + groups[t]) mod B, t]."""
    batch = x.shape[0]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() == 4:
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        place = groups.reshape(rows, columns).repeat_interleave(patch, 0).repeat_interleave(patch, 1)[None]
    else:
        place = groups[:, None]
    step = max(1, BUDGET // max(1, place.numel()))
    for begin in range(0, batch, step):
        block = out[begin : begin + step]
        image = torch.arange(begin, begin + len(block), device=x.device)
        source = (image.reshape(-1, *[1] * place.dim()) + place) % batch
        torch.gather(x, 0, source.expand_as(block), out=block)
    return out
