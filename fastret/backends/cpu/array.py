"""How a tensor is handed to C++: address, shape, row stride, dtype code and the bytes that may be touched."""

import torch
from torch import Tensor

DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.uint8: 5,
    torch.uint16: 6,
}

ArrayTuple = tuple[int, int, int, int, int, int]


def rows_of(t: Tensor) -> Tensor:
    """The tensor itself when C++ can read it (unit stride along a row, rows that do not overlap), else a copy."""
    ok = t.dim() == 2 and (t.shape[1] <= 1 or t.stride(1) == 1) and (t.shape[0] <= 1 or t.stride(0) >= t.shape[1])
    return t if ok else t.contiguous()


def array(t: Tensor) -> ArrayTuple:
    """A (rows, cols) tensor accepted by ``rows_of``, or a contiguous vector as one row. It borrows: keep the tensor.

    Raises:
        ValueError: C++ would read other numbers than the vector's.
    """
    if t.dim() == 1 and not t.is_contiguous():
        raise ValueError(f"C++ kernels take contiguous vectors, not one of stride {t.stride(0)}")
    rows, cols = t.shape if t.dim() == 2 else (1, t.numel())
    stride = t.stride(0) if t.dim() == 2 and rows > 1 else cols
    available = t.untyped_storage().nbytes() - t.storage_offset() * t.element_size()
    return t.data_ptr(), rows, cols, stride, DTYPE_CODES[t.dtype], int(available)
