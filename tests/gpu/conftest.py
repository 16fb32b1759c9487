"""GPU tests run where there is a CUDA device; elsewhere FASTRET_GPU_TESTS=cpu runs their bodies on small tensors.

Where they do not run, one is skipped, with the reason, and stands for the others, which are deselected.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent))  # for gpu_cases, however pytest was started

REASON = "no CUDA device; FASTRET_GPU_TESTS=cpu runs the bodies of the GPU tests on the CPU"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("FASTRET_GPU_TESTS") == "cpu":
        return
    waiting = [item for item in items if item.get_closest_marker("gpu")]
    if waiting:
        first, *others = waiting
        first.add_marker(pytest.mark.skip(reason=f"{len(waiting)} GPU tests: {REASON}"))
        items[:] = [item for item in items if item not in set(others)]
        config.hook.pytest_deselected(items=others)
