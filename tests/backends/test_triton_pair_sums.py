"""The functions phi that heads sum, in Triton, over their whole range; and heads that sum them where nothing is left to
sum. Against the reference under masks and targets: test_triton_masked_lse.py."""

import math

import pytest
import torch
from torch import Tensor

from fastret.backends import phi
from fastret.ops import PairMask, pair_sums

F64 = torch.float64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def values_and_slopes(name: str, z: Tensor) -> list[Tensor]:
    """phi of each number by itself, as the one pair of a row, and its slope."""
    x = z.to(DEVICE)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=z.dtype, device=DEVICE)
    sums = pair_sums(x, one, phi=name, normalize=False, impl="triton")
    (slopes,) = torch.autograd.grad(sums.sum(), x)
    return [sums.detach().cpu(), slopes[:, 0].cpu()]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", phi.NAMES)
def test_phi_over_its_whole_range(dtype: torch.dtype, name: str) -> None:
    """Within a few units in the last place of the number itself; that of e^z grows with z, as it does in the lse."""
    gap = torch.cat([torch.logspace(-20, 1.9, 150, dtype=F64), torch.linspace(0.6, 0.8, 51, dtype=F64)])
    z = torch.cat([-gap, torch.zeros(1, dtype=F64), gap[:20], torch.tensor([-20, -40], dtype=F64)]).to(dtype)
    eps = torch.finfo(dtype).eps
    floor = phi.resolution(name, dtype)
    coincide = -z < floor
    # in float64 with the floor of the dtype
    floored = torch.where(coincide, -floor, z.to(F64))
    expected = [phi.value(name, floored), phi.slope(name, floored)]
    if name == "hinge":
        expected = [z.clamp_min(0).to(F64), (z > 0).to(F64)]
    elif name != "log1m_exp":
        expected[1] = torch.where(coincide, 0, expected[1])
        if name == "distance":
            expected[0] = torch.where(coincide, 0, expected[0])
    for mine, wanted in zip(values_and_slopes(name, z), expected, strict=True):
        assert mine.isfinite().all()
        error = (mine.to(F64) - wanted).abs() / wanted.abs().clamp_min(1e-300)
        assert (error <= (4 + z.to(F64).abs() / 2) * eps).all(), (error / eps).max()


def test_nan_shows() -> None:
    for name in phi.NAMES:
        for dtype in (torch.float32, F64):
            stat = torch.tensor([math.nan, 2.0], dtype=dtype, device=DEVICE)
            x, y = (torch.ones(n, 1, dtype=dtype, device=DEVICE) for n in (2, 3))
            sums = pair_sums(x, y, phi=name, row_stat=stat, impl="triton")
            assert sums.isnan().tolist() == [True, False]


@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
@pytest.mark.parametrize("name", phi.NAMES)
def test_rows_without_a_pair(request: pytest.FixtureRequest, plan: str, name: str) -> None:
    """0 and no gradient, whatever the upstream gradient; the others are not touched."""
    request.getfixturevalue(plan)
    x, y = (torch.randn(6, 3, dtype=F64).to(DEVICE).requires_grad_() for _ in range(2))
    own, others = torch.tensor([0, 0, 1, 1, 2, 5]), torch.tensor([0, 1, 1, 0, 7, 7])
    mask = PairMask(same=(own.to(DEVICE), others.to(DEVICE)))
    stat = torch.full((6,), 2.0, dtype=F64, device=DEVICE).requires_grad_()
    sums = pair_sums(x, y, phi=name, row_stat=stat, scale=-1.0 if name == "hinge" else 1.0, mask=mask, impl="triton")
    assert not sums[4:].any()
    for upstream in (1.0, math.inf, math.nan):
        given = torch.tensor([1.0] * 4 + [upstream] * 2, dtype=F64, device=DEVICE)
        for g in torch.autograd.grad(sums, (x, y, stat), given, retain_graph=True):
            assert not g[4:].any()
            assert g[:4].isfinite().all()


def test_rows_that_coincide_have_no_direction() -> None:
    """Distances of equal unit rows, whose squares rounding takes to either side of 0, and their inverses."""
    x = torch.randn(9, 33).to(DEVICE).requires_grad_()
    stat = torch.full((9,), 2.0, device=DEVICE)
    for name in ("distance", "inverse_distance"):
        sums = pair_sums(x, phi=name, row_stat=stat, scale=2.0, impl="triton")
        (gradient,) = torch.autograd.grad(sums.sum(), x)
        assert sums.isfinite().all()
        assert gradient.isfinite().all()
