"""patchmix as it is defined: the source image of every place, gathered."""

import torch
from torch import Tensor


def patchmix(x: Tensor, groups: Tensor, patch: int) -> Tensor:
    """out[b, t] = x[(b + groups[t]) mod B, t]. Differentiable by autograd, as often as one likes."""
    batch = x.shape[0]
    place = groups
    if x.dim() == 4:  # patches row by row, and every pixel has the group of its patch
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        place = groups.reshape(rows, columns).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    source = (torch.arange(batch, device=x.device).reshape(-1, *[1] * place.dim()) + place) % max(batch, 1)
    source = source[:, None] if x.dim() == 4 else source[:, :, None]
    return x.gather(0, source.expand_as(x))
