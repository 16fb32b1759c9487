"""How the Triton implementation goes through its pair matrix; the rule by which it chooses: test_triton_plans.py."""

import sys
from pathlib import Path

import pytest

from fastret.backends import workspace
from fastret.backends.triton import plans

sys.path.append(str(Path(__file__).resolve().parent))  # for masked_lse_cases, however pytest was started


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels, slice by slice where rows are wide."""
    monkeypatch.setattr(plans, "_chosen", "fused")


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored weights, in the smallest blocks there are, as those of strips."""
    monkeypatch.setattr(plans, "_chosen", "weights")
    monkeypatch.setattr(workspace, "_workspace", "1KiB")


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips, in the smallest blocks there are: of 16 rows and columns in the interpreter, of 128 on a GPU."""
    monkeypatch.setattr(plans, "_chosen", "strip")
    monkeypatch.setattr(workspace, "_workspace", "1KiB")
