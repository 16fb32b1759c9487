"""Logits that overflow to infinity: their row's lse is infinite, and its gradient NaN where theirs is, 0 elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.triton import plans
from fastret.ops import Head, PairMask, masked_lse, masked_lse_sum

F32 = torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLANS = ("fused", "weights", "strip")
# numpy, which interprets, warns of what overflows
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def implementations() -> list[tuple[str, str]]:
    """With the plans of Triton's."""
    by_plan = {"tiled": ("auto",), "cpu": ("auto",), "triton": PLANS}
    return [(impl, plan) for impl, planned in by_plan.items() if serves(impl) for plan in planned]


def serves(impl: str) -> bool:
    return registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", DEVICE, F32)) is None


def rows_with(*places: int, count: int, large: float, seed: int) -> Tensor:
    """Of which those at the places have products of ``large`` squared with those of the other side. The rest are
    integers, whose products are exact: at such scales a rounding of one is all the difference there is."""
    rows = torch.randint(-9, 10, (count, 5), generator=torch.Generator().manual_seed(seed)).to(F32)
    rows[:, 0] = 0
    rows[list(places), 0] = large
    return rows.to(DEVICE)


def found(x: Tensor, y: Tensor, head: Head, impl: str, weight: Tensor | None = None) -> list[Tensor]:
    """lse, or where there is a weight the sum, and its gradients."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    if weight is not None:
        lse = masked_lse_sum(x, y, head=head, row_weight=weight, normalize=False, impl=impl)
    else:
        ((lse, _),) = masked_lse(x, y, heads=[head], normalize=False, impl=impl)
    return [lse.detach(), *torch.autograd.grad(lse.sum(), (x, y))]


@pytest.mark.parametrize(("impl", "plan"), implementations())
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize(("large", "scale"), [(1e20, 1.0), (1e15, 1e10)], ids=["scores", "scale"])
def test_infinite_logits(
    impl: str, plan: str, axis: str, large: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one tile with others and in a later one, once a row and twice; a masked one does not count."""
    monkeypatch.setattr(plans, "_chosen", plan)
    monkeypatch.setattr("fastret.backends.workspace._workspace", "1KiB")
    x, y = rows_with(2, 33, count=39, large=large, seed=0), rows_with(3, 20, 36, count=41, large=large, seed=1)
    x[5, 0] = -large  # -inf counts nothing
    # row 33 meets one column, a finite one
    own, others = torch.arange(39) % 34, torch.where(torch.arange(41) == 4, -1, 33)
    alone = PairMask(different=(own.to(DEVICE), others.to(DEVICE)))
    for mask in (PairMask(), alone):
        head = Head(scale, mask, axis=axis)
        expected = found(x, y, head, "reference")
        got = found(x, y, head, impl)
        assert expected[0].isposinf().any()
        assert expected[0].isfinite().any()
        assert expected[1].isnan().any()
        assert expected[1].isfinite().any()
        for a, e in zip(got, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * scale, equal_nan=True)


@pytest.mark.parametrize("impl", [impl for impl in ("tiled", "cpu") if serves(impl)])
@pytest.mark.parametrize("columns", [41, 400])
def test_an_infinite_sum(impl: str, columns: int) -> None:
    """In the sweep that has loss and gradients from one product too."""
    x, y = rows_with(2, count=39, large=1e20, seed=0), rows_with(3, 20, columns - 5, count=columns, large=1e20, seed=1)
    weight = torch.linspace(0.5, 1, 39, device=DEVICE)
    expected = found(x, y, Head(1.0), "reference", weight)
    assert expected[0] == math.inf
    for a, e in zip(found(x, y, Head(1.0), impl, weight), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, equal_nan=True)
