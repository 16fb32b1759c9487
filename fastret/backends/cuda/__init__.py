"""CUDA C++ kernels on CUDA tensors; on CPU tensors in the emulation of csrc/emulation, for tests."""

from types import ModuleType

import torch

from fastret.backends.registry import Call

_extension: ModuleType | None
try:
    from fastret import _cuda as _extension
except ImportError as error:
    _extension = None
    _import_error = f"the CUDA extension is not built or does not load ({error})"


def extension() -> ModuleType:
    """``fastret._cuda``, or the emulation that tests have put in its place."""
    if _extension is None:
        raise RuntimeError(_import_error)
    return _extension


def missing() -> str | None:
    """Why no kernel can run, or None."""
    if _extension is None:
        return _import_error
    if _extension.device_type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    error: str = _extension.device_error()  # this extension's runtime may ask for a newer driver than PyTorch's
    return f"the CUDA extension finds no device: {error}" if error else None


def unsupported(call: Call) -> str | None:
    """Why no kernel can serve tensors of this device, or None."""
    served = extension().device_type
    return None if call.device == served else f"these CUDA kernels run on {served}, not on {call.device}"


def describe() -> str:
    """What the kernels run on, for ``env_report``."""
    return "emulated" if extension().device_type == "cpu" else ""
