"""Peak memory of one forward and backward, beyond its inputs: in a process of its own, or as PyTorch's allocator counts
it on a GPU.

``python -m benchmarks.memory MODULE VARIANT SIZE [--device cpu] [--threads N] [--seed 0]`` prints one line of JSON.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.registry import DTYPES, Inputs, Op, Result, Size, Variant, in_dtype, load_module

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20

# glibc would otherwise keep freed temporaries on its heap, and the next ones would hide in them.
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Memory:
    """Mebibytes at the peak of one forward and backward.

    Attributes:
        extra: beyond the inputs and the gradients, or the result of an op without any, that are returned.
        raw: beyond the inputs.
        total: of the whole process, Python and PyTorch included.
    """

    extra: float
    raw: float
    total: float


def unsupported(device: str) -> str | None:
    """Why memory cannot be measured here, or None."""
    if device == "cuda" or Path("/proc/self/clear_refs").exists():
        return None
    return "peak memory of a process is read from Linux' /proc"


def measure(op: Op, variant: Variant, size: Size, *, device: str, threads: int, seed: int) -> Memory:
    """Measures in a fresh process.

    Raises:
        RuntimeError: the process failed, or the system ended it.
    """
    command = [sys.executable, "-m", __name__, op.module, variant.name, json.dumps(size)]
    command += ["--device", device, "--threads", str(threads), "--seed", str(seed)]
    command += ["--dtype", str(op.dtype).removeprefix("torch.")]
    environment = {**os.environ, **_RETURN_FREED_MEMORY}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        print(child.stderr, file=sys.stderr)
        raise RuntimeError(f"measuring memory ended with status {child.returncode}")
    return Memory(**json.loads(child.stdout.splitlines()[-1]))


def measure_here(op: Op, variant: Variant, size: Size, *, device: str, seed: int) -> Memory:
    """Measures in this process, which must be fresh and started with the environment that ``measure`` sets."""
    inputs = variant.prepare(op.inputs(size, seed, device))
    warm = variant.prepare(op.inputs(op.size(op.warm_up), seed, device))
    op.run(variant, warm)
    return measure_inputs(op, variant, inputs, device=device)


def measure_inputs(op: Op, variant: Variant, inputs: Inputs, *, device: str) -> Memory:
    """Measures on inputs that are prepared, once code is loaded; on a CPU nothing else may have run before."""
    gc.collect()
    before = _start(device)
    result = op.run(variant, inputs)
    total = _peak(device)
    peak = total - before
    return Memory(extra=(peak - _returned_bytes(result)) / MIB, raw=peak / MIB, total=total / MIB)


def _start(device: str) -> int:
    """Sets the peak back to what is in use, and returns that."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _returned_bytes(result: Result) -> int:
    returned = result.gradients.values() or (result.loss,)
    return sum(tensor.untyped_storage().nbytes() for tensor in returned)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("module")
    parser.add_argument("variant")
    parser.add_argument("size", type=json.loads)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    op = in_dtype(load_module(arguments.module), DTYPES[arguments.dtype])
    variant = op.variant(arguments.variant)
    print(json.dumps(asdict(measure_here(op, variant, arguments.size, device=arguments.device, seed=arguments.seed))))


if __name__ == "__main__":
    main()
