"""patchmix by the kernel of kernels/triton/patchmix.py. Nothing here waits for the device. Images that are not
contiguous are copied first."""

import torch
import triton
from torch import Tensor

from fastret.kernels.triton import config
from fastret.kernels.triton import patchmix as kernels

ALIGNMENT = 16  # bytes, that vector loads need
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # by bytes


def forward(x: Tensor, groups: Tensor, patch: int) -> Tensor:
    """out[b, t] = x[(b + groups[t]) mod B, t]."""
    x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    if x.data_ptr() % ALIGNMENT or x.stride(-1) != 1:  # one element is contiguous whatever its stride
        x = x.clone(memory_format=torch.contiguous_format)
    batch, lines, across, down = len(x), 1, 1, x.shape[1]
    piece = x[0, 0].numel() * x.element_size()
    if x.dim() == 4:
        lines, across, down = patch, x.shape[3] // patch, x.shape[2] // patch
        piece = patch * x.element_size()
    size = next(size for size in WORDS if piece % size == 0)
    source, target = (t.reshape(-1).view(torch.uint8).view(WORDS[size]) for t in (x, out))
    words = piece // size
    pieces = source.numel() // (batch * words)
    with torch.cuda.device_of(x):
        options = dict(config.lookup("patchmix", x.device, WORDS[size]))
        width = min(options["BLOCK_W"], triton.next_power_of_2(words))
        options |= {"BLOCK_W": width, "BLOCK_P": options["BLOCK_P"] * options["BLOCK_W"] // width}
        kernels.patchmix_kernel[batch * triton.cdiv(pieces, options["BLOCK_P"]), triton.cdiv(words, width)](
            *(source, groups.remainder(batch), target, batch, pieces, down),
            **{"LINES": lines, "ACROSS": across, "WORDS": words, **options},
        )
    return out
