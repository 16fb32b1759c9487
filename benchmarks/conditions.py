"""Why a variant cannot run here, or is not run at a size: the reasons that ops share."""

import importlib.util
import shutil
from collections.abc import Callable

import torch

from benchmarks.registry import Size
from fastret.backends.registry import IMPLEMENTATIONS, Call

NOT_TIMED = "kernels for GPUs are timed on one"


def needs(op: str, impl: str) -> Callable[[str], str | None]:
    """For an implementation of fastret that must serve a reduction in float32."""

    def missing(device: str) -> str | None:
        return IMPLEMENTATIONS[impl].unsupported(Call(op, device, torch.float32))

    return missing


def gpu_missing(op: str, impl: str) -> Callable[[str], str | None]:
    """The same for kernels that are measured on a GPU only."""

    def missing(device: str) -> str | None:
        if device != "cuda":
            return NOT_TIMED
        return needs(op, impl)(device) if impl in IMPLEMENTATIONS else f"there is no implementation {impl}"

    return missing


def pml_missing(device: str) -> str | None:
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        return "pytorch-metric-learning is not installed"
    return None


def faiss_missing(device: str) -> str | None:
    if device != "cpu":
        return "faiss is measured on the CPU"
    return None if importlib.util.find_spec("faiss") is not None else "faiss-cpu is not installed"


def inductor_missing(device: str) -> str | None:
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler"
    return None


def linear_cross_entropy_missing(device: str) -> str | None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None


def up_to(limit: int, reason: str, axis: str = "n") -> Callable[[Size], str | None]:
    return lambda size: f"not above {axis.upper()} = {limit}: {reason}" if size[axis] > limit else None


def only_at(n: int) -> Callable[[Size], str | None]:
    return lambda size: None if size["n"] == n else f"only at N = {n}"
