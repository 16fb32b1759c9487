"""Interleaved timing: every call has its turn in every round, so that what drifts, drifts for all of them.

On a GPU, times are those between two events of the stream. Before the first of them the L2 cache is overwritten, which
also keeps the GPU busy while the call is being launched: what then counts of the launches is what the GPU waits for.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

LONG = 2.0  # seconds above which a call counts as long
FEWEST, FEWEST_LONG = 5, 3
FLUSHED = 256 << 20  # bytes, several times the L2 cache of any GPU


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of the milliseconds of ``repetitions`` calls."""

    median: float
    p20: float
    p80: float
    repetitions: int


def repetitions(seconds: float, budget: float) -> int:
    """How often to run a call of this duration within a budget of seconds."""
    fewest = FEWEST_LONG if seconds > LONG else FEWEST
    return max(fewest, int(budget / max(seconds, 1e-9)))


def interleave(counts: Mapping[str, int]) -> list[str]:
    """Each name as often as it counts, spread evenly: A B C A B C where counts are equal, and where they are not, the
    rarer ones still from the first round to the last."""
    turns = [
        ((turn + 0.5) / count, place, name)
        for place, (name, count) in enumerate(counts.items())
        for turn in range(count)
    ]
    return [name for _, _, name in sorted(turns)]


def measure(
    calls: Mapping[str, Callable[[], object]], *, budget: float, device: str, title: str = ""
) -> dict[str, Timing]:
    """Times all calls, interleaved, each for about ``budget`` seconds after it was warmed up."""
    counts = {name: repetitions(_warm_up(call, device), budget) for name, call in calls.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    with _collector_off():
        for name in tqdm(interleave(counts), desc=title, leave=False):
            milliseconds[name].append(1e3 * _seconds(calls[name], device))
    return {name: _summary(values) for name, values in milliseconds.items()}


def _summary(milliseconds: list[float]) -> Timing:
    p20, median, p80 = (float(value) for value in np.percentile(milliseconds, (20, 50, 80)))
    return Timing(median, p20, p80, len(milliseconds))


def _warm_up(call: Callable[[], object], device: str) -> float:
    """Seconds of a call once it is warm; a long one is not run again to find out."""
    first = _seconds(call, device)
    return first if first > LONG else _seconds(call, device)


def _seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return _seconds_of_gpu(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_of_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _cache_filler().zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


@functools.cache
def _cache_filler() -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
