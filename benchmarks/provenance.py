"""Where figures come from: commit, processor, versions. No host name and no path."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastret import __version__
from fastret.backends import cpu

ROOT = Path(__file__).resolve().parents[1]

# Written by the benchmarks themselves: a run does not make the next one dirty.
_OWN_OUTPUT = (":(exclude)benchmarks/history.csv", ":(exclude)benchmarks/results")


@dataclass(frozen=True)
class Provenance:
    """Attributes:
    date: UTC, to the second; tells runs apart.
    commit: abbreviated, "-dirty" where the checkout differs from it; "unknown" outside of a repository.
    cpu: model of the processor.
    threads: of torch and of fastret's kernels.
    device: "cpu", or the model of the GPU.
    torch, fastret: versions.
    """

    date: str
    commit: str
    cpu: str
    threads: int
    device: str
    torch: str
    fastret: str


def here(device: str) -> Provenance:
    """Of a run that starts now."""
    return Provenance(
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit(),
        cpu=cpu_model(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        torch=torch.__version__,
        fastret=__version__,
    )


def kernels() -> tuple[str, str]:
    """Instruction set and multiplier of tiles that fastret's C++ uses now; empty where it is not built."""
    if cpu.missing() is not None:
        return "", ""
    from fastret import _C

    return _C.isa(), _C.gemm()


def commit() -> str:
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", *_OWN_OUTPUT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
