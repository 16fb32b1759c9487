"""update_rows_ against a loop over the batch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.ops import update_rows_

F64 = torch.float64
IMPLS = [
    impl
    for impl in ("reference", "tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("update_rows", "cpu", F64)) is None
]


def by_loops(bank: Tensor, index: Tensor, x: Tensor, momentum: float, convention: str, duplicates: str) -> Tensor:
    result = bank.clone()
    for y in set(index.tolist()):
        rows = x[index == y]
        new = {"last": rows[-1], "first": rows[0], "mean": rows.mean(0)}[duplicates]
        old_weight = momentum if convention == "old" else 1 - momentum
        row = old_weight * bank[y] + (1 - old_weight) * new
        result[y] = row / row.norm()
    return result


@pytest.mark.parametrize("duplicates", ["last", "first", "mean"])
@pytest.mark.parametrize("convention", ["old", "new"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("integers", [torch.int64, torch.uint8])
def test_equals_a_loop(duplicates: str, convention: str, momentum: float, integers: torch.dtype) -> None:
    bank, x = torch.randn(11, 5, dtype=F64), torch.randn(30, 5, dtype=F64)
    index = torch.randint(0, 9, (30,)).to(integers)
    expected = by_loops(bank, index, x, momentum, convention, duplicates)
    rule = {"momentum": momentum, "convention": convention, "duplicates": duplicates}
    for impl in IMPLS:
        torch.testing.assert_close(update_rows_(bank.clone(), index, x, **rule, impl=impl), expected)
    result = update_rows_(bank, index, x, **rule)
    assert result is bank
    torch.testing.assert_close(bank, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    bank, x, index = torch.randn(7, 16).to(dtype), torch.randn(5, 16), torch.arange(5)
    exact = by_loops(bank.double(), index, x.double(), 0.5, "old", "last")
    update_rows_(bank, index, x)
    # half an ulp of the nearest number of that dtype, and the float32 arithmetic before it
    assert ((bank.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * 0.5 + 1e-6).all()


def test_raw_rows_zero_rows_and_no_rows() -> None:
    bank = torch.zeros(3, 4)
    update_rows_(bank, torch.tensor([1]), torch.full((1, 4), 6.0), normalize=False)
    assert bank.tolist() == [[0.0] * 4, [3.0] * 4, [0.0] * 4]
    update_rows_(bank, torch.tensor([0]), torch.zeros(1, 4))
    assert bank[0].tolist() == [0.0] * 4  # not NaN
    update_rows_(bank, torch.tensor([], dtype=torch.int64), torch.zeros(0, 4))
    update_rows_(bank, torch.tensor([2]), torch.full((1, 4), 1e30))
    torch.testing.assert_close(bank[2], torch.full((4,), 0.5))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_graph_looks_at_the_index_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda b, i, x: update_rows_(b, i, x), fullgraph=True, backend="aot_eager")
    bank, x = torch.randn(6, 3), torch.randn(2, 3)
    eager = bank.clone()
    compiled(bank, torch.tensor([4, 1]), x)
    assert torch.equal(bank, update_rows_(eager, torch.tensor([4, 1]), x))
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"index: expected numbers from 0 to 5, got {wrong}"):
            compiled(bank, torch.tensor([1, wrong]), x)
    assert torch.equal(bank, eager)


def test_no_part_of_a_graph() -> None:
    bank, x = torch.randn(4, 3), torch.randn(2, 3).requires_grad_()
    update_rows_(bank, torch.tensor([3, 1]), x)
    assert not bank.requires_grad


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_an_index_of_a_dtype_that_does_not_hold_the_number_of_rows(dtype: torch.dtype) -> None:
    bank, x, index = torch.randn(300, 3), torch.randn(2, 3), torch.tensor([100, 7])
    expected = update_rows_(bank.clone(), index, x)
    assert torch.equal(update_rows_(bank, index.to(dtype), x), expected)
    for wrong in (-1, -100):
        with pytest.raises(ValueError, match=f"index: expected numbers from 0 to 299, got {wrong}"):
            update_rows_(bank, torch.tensor([100, wrong], dtype=torch.int8), x)
    with pytest.raises(ValueError, match="index: expected numbers from 0 to 127, got 200"):
        update_rows_(bank[:128], torch.tensor([100, 200], dtype=torch.uint8), x)


def test_where_pytorch_takes_no_means() -> None:
    tiled = registry.IMPLEMENTATIONS["tiled"]
    assert tiled.unsupported(Call("update_rows", "mps", torch.float32)) is None
    assert "segment_reduce" in str(tiled.unsupported(Call("update_rows", "mps", torch.float32, ("mean",))))


def test_inference_mode() -> None:
    bank, x, index = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([3, 1])
    expected = update_rows_(bank.clone(), index, x)
    with torch.inference_mode():
        assert torch.equal(update_rows_(bank.clone(), index, x), expected)
        update_rows_(bank, index, x)
    assert torch.equal(bank, expected)


M, X, I = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1])  # noqa: E741


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: update_rows_(M, I + 3, X), ValueError, "index: expected numbers from 0 to 3, got 4"),
        (lambda: update_rows_(M, I[:1], X), ValueError, r"index: expected shape \(2,\)"),
        (lambda: update_rows_(M, I.float(), X), TypeError, "index: expected an integer dtype"),
        (lambda: update_rows_(M, I, X[:, :2]), ValueError, "x: expected 3 columns like the bank, got 2"),
        (lambda: update_rows_(M, I, X, momentum=1.5), ValueError, "momentum: expected a number from 0 to 1"),
        (lambda: update_rows_(M, I, X, momentum=math.nan), ValueError, "momentum: expected a finite number"),
        (lambda: update_rows_(M, I, X, convention="ema"), ValueError, "convention: expected one of old, new"),
        (lambda: update_rows_(M, I, X, duplicates="all"), ValueError, "duplicates: expected one of last, first, mean"),
    ],
)
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
