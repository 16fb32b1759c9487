"""The CUDA kernels in the emulation, in the place of ``fastret._cuda``."""

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastret.backends import cuda

ORDERS = (0, 1, 20261121)  # ascending, descending, shuffled


def _load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_emulation", Path(__file__).with_name("emulation.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def built() -> tuple[ModuleType, Path]:
    builder = _load_builder()
    return builder, builder.build()


@pytest.fixture(scope="session")
def _module(built: tuple[ModuleType, Path]) -> ModuleType:
    builder, folder = built
    module: ModuleType = builder.load_module(folder)
    return module


@pytest.fixture(scope="session")
def planted(built: tuple[ModuleType, Path]) -> ctypes.CDLL:
    builder, folder = built
    library: ctypes.CDLL = builder.load_planted(folder)
    return library


@pytest.fixture(params=ORDERS, ids=["ascending", "descending", "shuffled"])
def emulation(
    request: pytest.FixtureRequest, _module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """Calls of the backend run in the emulation, in each of the orders of threads."""
    monkeypatch.setattr(cuda, "_extension", _module)
    _module.set_order(request.param)
    yield _module
    _module.set_order(0)
