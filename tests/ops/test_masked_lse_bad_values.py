"""NaN and infinity anywhere in the rows make every result NaN, also where masks keep them from all sums."""

import math

import pytest
import torch

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.ops import Head, Indexed, PairMask, masked_lse, masked_lse_sum, pair_sums

IMPLS = [
    impl
    for impl in ("reference", "tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]
ROWS, COLUMNS = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 7, 7])
MASKS = {"any": PairMask(), "same": PairMask(same=(ROWS, COLUMNS)), "none": PairMask(same=(ROWS, COLUMNS + 9))}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["row", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shows_everywhere(impl: str, mask: str, bad: float, place: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(5, 3).to(dtype), torch.randn(6, 3).to(dtype)
    (x if place == "row" else y)[4, 1] = bad
    heads = [Head(2.0, MASKS[mask], Indexed(ROWS)), Head(2.0, MASKS[mask], axis="column"), Head(width=1)]
    for lse, t in masked_lse(x, y, heads=heads, impl=impl):
        assert lse.isnan().all()
        assert t.isnan().all()
    assert masked_lse_sum(x, y, head=heads[0], row_weight=torch.zeros(5), impl=impl).isnan()
    assert pair_sums(x, y, phi="hinge", mask=MASKS[mask], impl=impl).isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_of_finite_rows_may_overflow(impl: str) -> None:
    x = torch.full((8, 4), 1.5e38)
    ((lse, _),) = masked_lse(x, heads=[Head(2.0)], impl=impl)
    torch.testing.assert_close(lse, torch.full((8,), 2 + math.log(8)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sum_over_no_rows_is_zero(impl: str) -> None:
    """Whatever the columns hold."""
    y = torch.full((3, 4), math.nan)
    assert masked_lse_sum(torch.empty(0, 4), y, head=Head(2.0), row_weight=torch.empty(0), impl=impl) == 0
