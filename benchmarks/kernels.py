"""Where the time of a task goes on a GPU: each kernel's, as PyTorch's profiler sees it, of fastret's Triton variant."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks.gpu import KERNELS, Floor
from benchmarks.history import size_text

STEPS = 5
SHOWN = 6  # kernels of a task in the table


@dataclass(frozen=True)
class Kernel:
    """Attributes:
    name: as compiled.
    launches: in one forward and backward.
    microseconds: of all of them.
    """

    name: str
    launches: float
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """Kernels of one forward and backward of a task, the longest first."""

    task: str
    variant: str
    kernels: list[Kernel]

    def lines(self) -> list[str]:
        """As text, a kernel a line."""
        total = sum(kernel.microseconds for kernel in self.kernels)
        launches = sum(kernel.launches for kernel in self.kernels)
        head = f"{self.task}, {self.variant}: {total:,.1f} us in {launches:g} launches"
        return [head, *(f"  {k.microseconds:10,.1f} us  {k.launches:g} x {k.name[:80]}" for k in self.kernels[:SHOWN])]


def profile(floor: Floor) -> Profile:
    """Of the first variant with kernels for GPUs that can run; an empty profile where none can."""
    op = floor.load()
    task = f"{op.name} {size_text(floor.size)}"
    able = [v for v in op.variants if v.name in {f"fastret-{k}" for k in KERNELS} and v.missing("cuda") is None]
    if not able:
        return Profile(task, "no kernels for GPUs", [])
    variant = able[0]
    inputs = variant.prepare(op.inputs(floor.size, 0, "cuda"))
    for _ in range(2):
        op.run(variant, inputs)
    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            op.run(variant, inputs)
        torch.cuda.synchronize()
    spans = [
        (str(event.name), float(event.time_range.elapsed_us()))
        for event in seen.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return Profile(task, variant.name, summed(spans, STEPS))


def summed(spans: list[tuple[str, float]], steps: int) -> list[Kernel]:
    """From name and microseconds of each launch, each kernel's share of one step."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in spans:
        by_name[name].append(microseconds)
    found = [Kernel(name, len(times) / steps, sum(times) / steps) for name, times in by_name.items()]
    return sorted(found, key=lambda kernel: -kernel.microseconds)
