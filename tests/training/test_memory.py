"""Memory: the loss's peak in a process of its own, and a heap that keeps what is freed."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastret.training import memory
from fastret.training.losses import LOSSES, LossSettings
from fastret.training.memory import Job, measure_peak


def _job(impl: str, **changed: object) -> Job:
    settings = LossSettings(0.01, 4, impl, classes=64, width=32)
    plain = {"loss": "smooth-ap", "settings": settings, "rows": 256, "device": "cpu", "threads": 1}
    return Job(**{**plain, **changed})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_definition_needs_what_it_materialises() -> None:
    """The dense (N, G, N) sigmoids that autograd keeps are found, and not many times more."""
    dense = 4 * 256 * 4 * 256
    found = measure_peak(_job("reference"))
    assert found.problem is None
    assert found.bytes is not None
    assert 2 * dense < found.bytes < 40 * dense


def test_what_other_codes_need_for_a_thousand_rows() -> None:
    settings = LossSettings(0.1, 4, None, classes=20_902, width=128, num_noise=4096)
    needed = {name: loss.official_bytes(1024, settings) for name, loss in LOSSES.items()}
    expected = {
        "smooth-ap": 39.1e9,
        "nt-xent": 54.5e9,
        "sup-con": 47.4e6,
        "multi-similarity": 71.3e6,
        "proxy-nca": 12.3e9,
        "spq": 4.40e9,
        "npid": 2.255e9,
        "patchmix": 2.18e6,
    }
    assert needed == pytest.approx(expected, rel=2e-3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_gradient_of_the_proxies_is_counted() -> None:
    """And neither the proxies themselves nor anything of B x C: no more than a few of its size."""
    settings = LossSettings(0.05, 1, None, classes=50_000, width=128)
    found = measure_peak(_job("auto", loss="proxy-nca", settings=settings, rows=8))
    assert found.problem is None
    assert found.bytes is not None
    gradient = 4 * settings.classes * settings.width
    assert gradient < found.bytes < 4 * gradient


def test_a_failing_measurement_says_why() -> None:
    found = measure_peak(_job("no such thing"))
    assert found.bytes is None
    assert "no such thing" in str(found.problem)


def test_without_proc_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.Path, "exists", lambda path: False)
    assert measure_peak(_job("tiled")) == memory.Peak(None, "it needs Linux's /proc")


PAGE_FAULTS = """
import resource
import torch
from fastret.training.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
plain = faults()
keep_freed_memory()
faults()
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept() -> None:
    """Four times 64 MB, allocated and freed: afresh from the system each time, then not at all."""
    child = subprocess.run([sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True)
    plain, kept = map(int, child.stdout.split())
    assert kept < plain / 4
