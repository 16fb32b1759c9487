"""Products of half-precision rows that are wanted in float32, as plans that store scores or weights need them: scores
rounded to bfloat16 would lose what small temperatures multiply.

On CUDA PyTorch multiplies such rows into float32. Where it does not (CPU tensors, in the interpreter), operands are
widened first, which gives the same products at the price of a copy and of float32's speed.

Under torch.use_deterministic_algorithms(True) PyTorch refuses these products on CUDA unless CUBLAS_WORKSPACE_CONFIG is
:4096:8 or :16:8, as all products of cuBLAS.
"""

import torch
from torch import Tensor

# What this version of PyTorch has is read from its operators and its number: a trial may fail for want of memory, and
# launches. Until 2.10 addmm with an out_dtype wanted the matrix added to in the dtype of the factors (PyTorch's pull
# request 167931).
INTO_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype_out")  # since 2.8
ONTO_FLOAT32 = hasattr(torch.ops.aten.addmm, "dtype_out") and tuple(map(int, torch.__version__.split(".")[:2])) >= (
    2,
    11,
)


def into_float32(t: Tensor) -> bool:
    """Whether PyTorch multiplies half-precision rows like these into float32: on CUDA alone."""
    return INTO_FLOAT32 and t.is_cuda


def onto_float32(t: Tensor) -> bool:
    """Whether it also adds such products to a float32 matrix in place."""
    return ONTO_FLOAT32 and t.is_cuda


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, in the dtype of ``out``; a may be wider than b."""
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.dtype == b.dtype and into_float32(a):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of ``total``; a may be wider than b."""
    if a.dtype == b.dtype != total.dtype and into_float32(a):
        if onto_float32(a):
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
