"""What is installed, what is built, and which implementation would serve each op here: for bug reports."""

import importlib.metadata
import os
import platform

import torch

from fastret._version import __version__
from fastret.backends import choices, registry

OPS = (
    "rank_sums",
    "masked_lse",
    "row_extrema",
    "pair_dot",
    "soft_assign",
    "sampled_dot",
    "topk",
    "knn_vote",
    "pq_topk",
    "segment_mean",
    "patchmix",
    "update_rows",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["CUDA device: none"]
    return [f"CUDA device: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


def _op_lines(op: str) -> list[str]:
    lines = []
    for device in ("cpu", "cuda"):
        call = registry.Call(op, device, torch.float32)
        refused = []
        for impl in registry.candidates(call):
            reason = impl.unsupported(call)
            if reason is None:
                why = f" ({choices.source(op)})" if device == "cuda" and torch.cuda.is_available() else ""
                lines.append(f"  {op} on {device}: {impl.name}{why}")
                break
            refused.append(f"    not {impl.name}: {reason}")
        lines.extend(refused)
    return lines


def env_report() -> str:
    """Versions, devices, implementations and, per op, which one "auto" picks for float32 and why not a faster one."""
    lines = [
        f"fastret {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, triton {_version('triton')}, numpy {_version('numpy')}",
        f"CPU threads: {torch.get_num_threads()}",
        *_device_lines(),
        f"FASTRET_IMPL: {os.environ.get('FASTRET_IMPL', 'not set')}",
        "",
        "implementations:",
    ]
    for name, impl in registry.IMPLEMENTATIONS.items():
        reason = impl.missing()
        if reason is None:
            detail = impl.describe()
            lines.append(f"  {name}: {impl.summary}" + (f" ({detail})" if detail else ""))
        else:
            lines.append(f"  {name}: not available: {reason}")
    lines += ["", 'what "auto" picks for each op, float32:']
    for op in OPS:
        lines += _op_lines(op)
    return "\n".join(lines)
