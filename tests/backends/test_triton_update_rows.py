"""update_rows_ by Triton against a loop in float64: compiled where there is a GPU, else interpreted, 32 features at a
time."""

import pytest
import torch
from torch import Tensor

from fastret.ops import update_rows_

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE, PLACES, WIDTH = 11, 23, 37
# the interpreter rounds to bfloat16 towards zero
BOUNDS = {F64: 1e-14, F32: 1e-6, BF16: 2**-7, F16: 2**-11 + 1e-6}


def by_loops(bank: Tensor, index: Tensor, x: Tensor, kept: float, duplicates: str, normalize: bool) -> Tensor:
    result = bank.clone()
    for y in set(index.tolist()):
        rows = x[index == y]
        new = {"last": rows[-1], "first": rows[0], "mean": rows.mean(0)}[duplicates]
        row = kept * bank[y] + (1 - kept) * new
        result[y] = row / row.norm() if normalize else row
    return result


@pytest.mark.parametrize("duplicates", ["last", "first", "mean"])
@pytest.mark.parametrize(
    ("dtype", "normalize", "convention"),
    [(F64, True, "old"), (F32, True, "new"), (BF16, True, "old"), (F16, True, "old"), (F32, False, "old")],
)
def test_equals_a_loop(dtype: torch.dtype, normalize: bool, convention: str, duplicates: str) -> None:
    bank = torch.randn(SIZE, WIDTH, dtype=F64).to(DEVICE, dtype)
    x = torch.randn(PLACES, WIDTH, dtype=F64).to(DEVICE, F64 if dtype == F64 else F32)
    index = torch.randint(0, 9, (PLACES,), device=DEVICE)
    rule = {"momentum": 0.3, "convention": convention, "duplicates": duplicates, "normalize": normalize}
    expected = by_loops(bank.double(), index, x.double(), 0.3 if convention == "old" else 0.7, duplicates, normalize)
    actual = update_rows_(bank.clone(), index, x, **rule, impl="triton")
    # beside the bound, what the parts of a row lose, which may cancel
    assert (
        (actual.double() - expected).abs() <= BOUNDS[dtype] * expected.abs() + BOUNDS[F64 if dtype == F64 else F32]
    ).all()
    assert torch.equal(actual[9:], bank[9:])


def test_rows_that_are_zero_huge_or_not_numbers() -> None:
    bank, index = torch.zeros(5, WIDTH, device=DEVICE), torch.tensor([3, 0, 2, 4], device=DEVICE)
    x = torch.zeros(4, WIDTH, device=DEVICE)
    x[1], x[2], x[3, 35] = 1e30, 1e-30, float("nan")
    expected = update_rows_(bank.clone(), index, x, impl="reference")
    actual = update_rows_(bank, index, x, impl="triton")
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert actual[4].isnan().all()
    assert (actual[3] == 0).all()


def test_a_bank_that_is_a_view_and_none_of_its_neighbours() -> None:
    around = torch.randn(9, 2 * WIDTH, device=DEVICE)
    expected = around.clone()
    index, x = torch.tensor([1, 3, 1], device=DEVICE), torch.randn(3, WIDTH, device=DEVICE)
    update_rows_(expected[1::2, ::2], index, x, impl="reference")
    update_rows_(around[1::2, ::2], index, x, impl="triton")
    torch.testing.assert_close(around, expected)


@pytest.mark.parametrize("impl", ["triton", "tiled"])
def test_an_operator_that_says_what_it_changes(impl: str) -> None:
    bank, x, index = torch.randn(4, 3, device=DEVICE), torch.randn(2, 3, device=DEVICE), torch.arange(2, device=DEVICE)
    operator = torch.ops.fastret.update_rows_.default
    torch.library.opcheck(operator, (bank, index, x, 0.5, "old", True, "mean", impl))
    leaf = bank.clone().requires_grad_()
    loss = (leaf * bank).sum()
    update_rows_(bank, index, x, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
