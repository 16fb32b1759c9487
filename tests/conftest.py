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


def _repair_bf16_dot() -> None:
    """Triton's interpreter multiplies the bit patterns of bfloat16 operands of tl.dot; give it floats."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any, **kwargs: Any) -> Any:
        def upcast(h: Any) -> Any:
            if h.dtype.scalar != tl.bfloat16:
                return h
            return interpreter.TensorHandle((h.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return original(self, upcast(a), upcast(b), d, *args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _repair_bf16_dot()


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
