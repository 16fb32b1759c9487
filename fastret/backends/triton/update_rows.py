"""update_rows_ by the kernel of kernels/triton/update_rows.py, after a stable sort of the index. Nothing here waits for
the device."""

import torch
import triton
from torch import Tensor

from fastret.kernels.triton import config
from fastret.kernels.triton import update_rows as kernels

NARROWEST = 16  # features of a tile


def update(
    bank: Tensor, index: Tensor, x: Tensor, momentum: float, convention: str, *, normalize: bool, duplicates: str
) -> None:
    """``bank[index]`` in place, from x (B, D) in the dtype of accumulation."""
    if not len(index):
        return
    with torch.cuda.device_of(bank):
        ordered, order = index.sort(stable=True)
        d = bank.shape[1]
        options = dict(config.lookup("update rows", bank.device, bank.dtype))
        options["BLOCK_D"] = min(options["BLOCK_D"], max(NARROWEST, triton.next_power_of_2(d)))
        weight = torch.full((), momentum, dtype=x.dtype, device=x.device)  # a kernel's float argument is float32
        kernels.update_rows_kernel[(len(index),)](
            *(bank, ordered, order, x.contiguous(), weight, len(index)),
            **{"KEEPS": convention == "old", "NORMALIZE": normalize, "DUPLICATES": duplicates},
            **{"WIDTH": d, "STRIDE": bank.stride(0), "STEP": bank.stride(1), **options},
        )
