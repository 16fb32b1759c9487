"""Settings every test shares. Environment first: OpenMP and Triton read theirs when they are loaded."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():  # on a GPU the tests must run compiled kernels
    os.environ["TRITON_INTERPRET"] = "1"

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def _repair_bf16() -> None:
    """Triton's interpreter rounds to bfloat16 towards zero, where GPUs round to the nearest, and multiplies the bit
    patterns of bfloat16 operands of tl.dot; give it floats."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(h: Any) -> Any:
        if h.dtype.scalar != tl.bfloat16:
            return h
        return interpreter.TensorHandle((h.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any, **kwargs: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *args, **kwargs)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return widened(src)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return interpreter.TensorHandle(
            np.where(np.isnan(src.data), 0x7FC0, nearest).astype(np.uint16), dst_type.scalar
        )

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _patch_once() -> None:
    """Triton's interpreter patches its language at every launch, and again at every call of a device function, which
    takes a third of the time: what a launch has not patched, functions of triton.language.core, stays so for good."""
    from triton.language import core
    from triton.runtime import interpreter

    patched = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not patched and any(value is core for value in self.fn.__globals__.values()):
            patched.append(interpreter._patch_lang(self.fn))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _repair_bf16()
    _patch_once()


def _poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = function(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("fastret") and result.device.type in ("cpu", "cuda") and type(result) is torch.Tensor:
            if result.is_floating_point():
                result.fill_(float("nan"))
            elif result.dtype == torch.int64:
                result.fill_(-(2**62))
        return result

    return allocate


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory that fastret asks for holds NaN, so that reading it shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
