"""Triton kernels on CUDA tensors; on CPU tensors in Triton's interpreter, for tests."""

import importlib.util
import os

import torch

from fastret.backends.registry import Call


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels, before it was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why no kernel can run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device (TRITON_INTERPRET=1 interprets the kernels, slowly)"
    return None


def unsupported(call: Call) -> str | None:
    """Why no kernel can serve tensors of this device, or None."""
    if call.device == "cpu" and not interpreted():
        return "compiled Triton kernels run on cuda, not on cpu"
    return None
