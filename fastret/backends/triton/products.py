"""Products of half-precision rows that are wanted in float32, as the strip plan needs them: scores rounded to bfloat16
would lose what small temperatures multiply.

On CUDA PyTorch multiplies such rows into float32. Where it does not (CPU tensors, in the interpreter), operands are
widened first, which gives the same products at the price of a copy and of float32's speed.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies rows of this half-precision dtype into float32 on this device."""
    one = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@functools.cache
def onto_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it also adds such products to a float32 matrix in place, which not all versions do."""
    one = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, in the dtype of ``out``; a and b have one dtype."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if into_float32(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of ``total``; a may be wider than b."""
    if a.dtype == b.dtype != total.dtype and into_float32(a.device, a.dtype):
        if onto_float32(a.device, a.dtype):
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
