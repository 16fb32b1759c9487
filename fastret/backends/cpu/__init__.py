"""C++ kernels on CPU tensors; tiles are multiplied by the BLAS that PyTorch carries, or by their own micro-kernel."""

import contextlib
import ctypes
import functools
from pathlib import Path

import torch

try:
    from fastret import _C
except ImportError as error:
    _import_error: str | None = f"the C++ extension is not built or does not load ({error})"
else:
    _import_error = None


def missing() -> str | None:
    """Why the extension cannot be used, or None."""
    if _import_error is None:
        _configure()
    return _import_error


def _address(library: ctypes.CDLL, symbol: str) -> int:
    try:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


@functools.cache
def _configure() -> None:
    """Hands the extension PyTorch's own BLAS (one library, one thread pool), then applies FASTRET_ISA, FASTRET_GEMM."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    if libraries:
        library = ctypes.CDLL(str(libraries[0]))
        symbols = [_address(library, s) for s in ("sgemm_", "dgemm_", "MKL_Set_Num_Threads_Local")]
        # Without a way to keep BLAS on the calling thread, nested thread pools would cost more than BLAS gains.
        if symbols[2]:
            # One that fails its self-test is not used: the micro-kernel serves, and describe() says so.
            with contextlib.suppress(RuntimeError):
                _C.set_blas(*symbols)
    _C.set_isa("")
    _C.set_gemm("")


def describe() -> str:
    """Instruction set, multiplier of tiles and OpenMP, for ``env_report``."""
    _configure()
    gemm = {"own": "own micro-kernel", "blas": "PyTorch's BLAS"}[_C.gemm()]
    return f"{_C.isa()} of {'/'.join(_C.supported_isas())}; tiles by {gemm}; OpenMP {'on' if _C.openmp() else 'off'}"
