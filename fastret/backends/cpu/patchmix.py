"""patchmix in C++ (csrc/cpu/patchmix.cpp)."""

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import array


def forward(x: Tensor, groups: Tensor, patch: int) -> Tensor:
    """out[b, t] = x[(b + groups[t]) mod B, t]."""
    x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    if x.stride(-1) != 1:  # one element is contiguous whatever its stride
        x = x.clone(memory_format=torch.contiguous_format)
    if x.dim() == 4:
        planes, height, width = x.shape[1:]
        sizes = (planes, height // patch, patch, width // patch, patch * x.element_size())
    else:
        sizes = (1, x.shape[1], 1, 1, x.shape[2] * x.element_size())
    source, target = (t.flatten(1).view(torch.uint8) for t in (x, out))
    _C.patchmix(array(source), array(groups.contiguous()), sizes, torch.get_num_threads(), array(target))
    return out
