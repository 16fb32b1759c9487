"""The one place where tensors become what the CUDA extension takes: device, layout and dtype are checked here, shapes
and dtype codes again in C++. A call borrows its tensors and returns before the kernel has run; the stream keeps order,
and PyTorch's allocator keeps memory that is freed meanwhile for the same stream.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastret.backends import cuda
from fastret.backends.cpu.array import DTYPE_CODES, ArrayTuple, rows_of
from fastret.backends.cpu.array import array as _array

__all__ = ["array", "call", "on", "rows_of"]


def array(t: Tensor, name: str) -> ArrayTuple:
    """A (rows, cols) tensor accepted by ``rows_of``, or a contiguous vector as one row."""
    served = cuda.extension().device_type
    if t.device.type != served:
        raise ValueError(f"{name}: expected a tensor on {served}, got one on {t.device}")
    if t.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: the CUDA kernels do not take {t.dtype}")
    if t.layout != torch.strided or t.dim() > 2 or (t.dim() < 2 and not t.is_contiguous()) or t is not _readable(t):
        raise ValueError(f"{name}: expected rows of unit stride, got shape {tuple(t.shape)} with stride {t.stride()}")
    return _array(t)


def call(function: str, device: torch.device, *arguments: Any) -> None:
    """Launches on the current stream of the device that the tensors are on."""
    launch = getattr(cuda.extension(), function)
    with on(device):
        launch(*arguments, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it the device is current: what C++ asks the device about is asked of this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _readable(t: Tensor) -> Tensor:
    return rows_of(t) if t.dim() == 2 else t
