"""Settings every test shares. Environment first: OpenMP and Triton read theirs when they are loaded."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():  # on a GPU the tests must run compiled kernels
    os.environ["TRITON_INTERPRET"] = "1"

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    sys.path.append(str(Path(__file__).resolve().parent))
    import interpreted

    sys.path.pop()  # or tests/cuda would be found as a package of that name
    interpreted.settle()


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


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Thousands of tests are no garbage: looking through them again and again took a ninth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.collect()  # or the frozen would count when the next full collection is due
        gc.set_threshold(700, 10, 50)  # of what tests load, a compiler say, little is garbage either
        gc.enable()
