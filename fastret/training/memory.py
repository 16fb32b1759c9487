"""Peak memory of one forward and backward of a loss beyond its inputs and parameters, measured in a process of its own.

In the training process the network's freed activations would hide it: the C library keeps them in its heap, where the
loss finds room without the process growing. The fresh process gives freed memory back at once
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), warms up on a small batch (libraries, threads), and resets the
kernel's record of its peak through /proc/self/clear_refs.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastret.training.losses import LossSettings, training_loss

WARM_UP_CLASSES = 16
RESET_PEAK = "5"  # proc(5): clear_refs
TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Peak:
    """Bytes, or None and why they could not be measured."""

    bytes: int | None
    problem: str | None = None


@dataclass(frozen=True)
class Job:
    """A batch of ``rows`` embeddings, as the loss's entry draws them."""

    loss: str
    settings: LossSettings
    rows: int
    device: str
    threads: int


def measure_peak(job: Job) -> Peak:
    """Peak bytes of the loss's forward and backward beyond its inputs and parameters; gradients are counted."""
    if job.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return Peak(None, "it needs Linux's /proc")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", f"from {__name__} import main; main()", json.dumps(asdict(job))]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=TIMEOUT)
        return Peak(int(child.stdout))
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        return Peak(None, last[0])
    except subprocess.TimeoutExpired:
        return Peak(None, f"it took more than {TIMEOUT} s")


def main() -> None:
    """The child: reads a job from its first argument and prints the bytes."""
    job = json.loads(sys.argv[1])
    print(_peak_here(Job(**{**job, "settings": LossSettings(**job["settings"])})))


def _peak_here(job: Job) -> int:
    torch.set_num_threads(job.threads)
    entry = training_loss(job.loss)
    loss = entry.build(job.settings).to(job.device)
    warm_up = min(WARM_UP_CLASSES, job.settings.classes)
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int) -> list[torch.Tensor]:
        drawn = entry.arguments(rows, job.settings, generator)
        return [part.detach().to(job.device).requires_grad_(part.requires_grad) for part in drawn]

    loss(*batch(warm_up * job.settings.samples_per_class)).backward()
    loss.zero_grad()  # else the gradient of its parameters would be there already, and be added to
    arguments = batch(job.rows)
    before = _reset_peak(job.device)
    loss(*arguments).backward()
    return _peak(job.device) - before


def _reset_peak(device: str) -> int:
    """Forget the peak so far; the bytes held now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
