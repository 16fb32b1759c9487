"""pair_dot by Triton against the definition in float64: compiled where there is a GPU, else interpreted, in blocks of
8 pairs forward, 4 backward, and 32 features."""

import pytest
import torch
from torch import Tensor

from fastret.ops import pair_dot

F64 = torch.float64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {F64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def case(gallery: bool, pairs: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Pairs in any order, some more than once, some rows in none, one in many."""
    x = torch.randn(9, width, dtype=F64).to(dtype)
    y = torch.randn(7, width, dtype=F64).to(dtype) if gallery else None
    row, column = torch.randint(0, 8, (pairs,)), torch.randint(0, 7, (pairs,))
    row[: pairs // 2] = 3
    return x.to(DEVICE), None if y is None else y.to(DEVICE), row.to(DEVICE), column.to(DEVICE)


@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("pairs", "width"), [(29, 37), (1, 1), (0, 5)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_equals_reference(dtype: torch.dtype, pairs: int, width: int, normalize: bool, gallery: bool) -> None:
    x, y, row, column = case(gallery, pairs, width, dtype)
    weight = torch.randn(pairs, dtype=F64).to(DEVICE)

    def scores_and_gradients(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, y) if t is not None]
        scores = pair_dot(leaves[0], leaves[1] if gallery else None, row, column, normalize=normalize, impl=impl)
        return [scores.detach(), *torch.autograd.grad(scores @ weight.to(scores.dtype), leaves)]

    actual, expected = scores_and_gradients("triton", dtype), scores_and_gradients("reference", F64)
    assert all(g.dtype == dtype for g in actual[1:])
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.to(F64) - e).norm() <= BOUNDS[dtype] * max(1.0, e.norm().item())


def test_only_requested_gradients_equal_from_run_to_run() -> None:
    x, y, row, column = case(True, 29, 37, torch.float32)
    gradients = []
    for wanted in ("x", "y", "xy"):
        a, b = x.clone().requires_grad_("x" in wanted), y.clone().requires_grad_("y" in wanted)
        pair_dot(a, b, row, column, impl="triton").sin().sum().backward()
        gradients.append((a.grad, b.grad))
    (only_x, _), (_, only_y), (both_x, both_y) = gradients
    assert gradients[0][1] is None
    assert gradients[1][0] is None
    assert torch.equal(only_x, both_x)
    assert torch.equal(only_y, both_y)
