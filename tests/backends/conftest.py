"""How the Triton implementation goes through its pair matrix; the rule by which it chooses: test_triton_plans.py."""

import pytest

from fastret.backends import workspace
from fastret.backends.triton import plans


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels, slice by slice where rows are wide."""
    monkeypatch.setattr(plans, "_chosen", "fused")


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips, in the smallest blocks there are: of 16 rows and columns in the interpreter, of 128 on a GPU."""
    monkeypatch.setattr(plans, "_chosen", "strip")
    monkeypatch.setattr(workspace, "_workspace", "1KiB")
