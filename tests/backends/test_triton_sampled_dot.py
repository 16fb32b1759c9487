"""sampled_dot by Triton against the definition in float64: compiled where there is a GPU, else interpreted, in blocks
of 16 columns and 32 features."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.backends.sampling import Draws
from fastret.kernels.triton import sampled_dot as kernels
from fastret.ops import sampled_dot

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, SIZE, COUNT, WIDTH = 3, 11, 37, 37
# float32 sums; the interpreter rounds to bfloat16 towards zero
BOUNDS = {F64: 1e-13, F32: 1e-6, BF16: 2**-7, F16: 2**-10}


def columns(kind: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if "first" in kind:
        given["first"] = torch.randint(0, SIZE, (N,), device=DEVICE)
    if "index" in kind:
        return given | {"index": torch.randint(0, SIZE, (N, COUNT), device=DEVICE)}
    return given | {"count": COUNT, "seed": -(2**40) + 3}


def scores_and_gradients(x: Tensor, bank: Tensor, weight: Tensor, impl: str, **given: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, bank)]
    scores = sampled_dot(*leaves, **given, impl=impl)
    return [scores.detach(), *torch.autograd.grad((scores * weight.to(scores.dtype)).sum(), leaves)]


@pytest.mark.parametrize(
    ("kind", "x_dtype", "bank_dtype"),
    [
        *(("index", t, t) for t in (F64, F32)),
        *(("first and draws", t, t) for t in (F64, F32, BF16, F16)),
        ("first and index", F32, BF16),
        ("draws", F16, F32),
    ],
)
def test_equals_reference(kind: str, x_dtype: torch.dtype, bank_dtype: torch.dtype) -> None:
    x, bank = torch.randn(N, WIDTH, dtype=F64).to(DEVICE, x_dtype), torch.randn(SIZE, WIDTH).to(DEVICE, bank_dtype)
    given = columns(kind)
    weight = torch.randn(N, COUNT + ("first" in kind), dtype=F64).to(DEVICE)
    actual = scores_and_gradients(x, bank, weight, "triton", **given)
    expected = scores_and_gradients(x.double(), bank.double(), weight, "reference", **given)
    for a, e, dtype in zip(actual, expected, (F64 if x_dtype == F64 else F32, x_dtype, bank_dtype), strict=True):
        assert a.dtype == dtype
        assert a.shape == e.shape
        assert (a.to(F64) - e).norm() <= BOUNDS[dtype] * e.norm()


@pytest.mark.parametrize("seed", [0, -7, 2**63 - 1])
@pytest.mark.parametrize("size", [1, 1000, 2**31])
def test_draws_are_those_of_the_generator(seed: int, size: int) -> None:
    number = torch.tensor(seed, device=DEVICE)
    drawn = torch.empty(3, 21, dtype=torch.int64, device=DEVICE)
    kernels.sampled_columns_kernel[(6,)](None, None, number, drawn, 2, 21, size, BLOCK_S=16)
    assert torch.equal(drawn, Draws(21, number).columns(3, size))


def test_what_is_asked_for_alone_is_the_same_and_so_is_every_run() -> None:
    x, bank = torch.randn(N, WIDTH, device=DEVICE), torch.randn(SIZE, WIDTH, device=DEVICE)
    gradients = []
    for wanted in ("x", "bank", "x bank"):
        a, b = x.clone().requires_grad_("x" in wanted), bank.clone().requires_grad_("bank" in wanted)
        sampled_dot(a, b, **columns("draws"), impl="triton").sin().sum().backward()
        gradients.append((a.grad, b.grad))
    (only_x, nothing), (_, only_bank), (of_x, of_bank) = gradients
    assert nothing is None
    assert torch.equal(only_x, of_x)
    assert torch.equal(only_bank, of_bank)


def test_rows_of_the_bank_that_nobody_draws() -> None:
    """Their gradient is 0, and what they hold is not looked at."""
    x, bank = torch.randn(N, WIDTH, device=DEVICE), torch.randn(SIZE, WIDTH, device=DEVICE)
    bank[[0, SIZE - 1]] = float("nan")
    index = torch.randint(1, SIZE - 1, (N, 3), device=DEVICE)
    scores, dx, d_bank = scores_and_gradients(x, bank, torch.ones(N, 3, device=DEVICE), "triton", index=index)
    assert scores.isfinite().all()
    assert dx.isfinite().all()
    assert (d_bank[[0, SIZE - 1]] == 0).all()


def test_elements_beyond_2_to_31() -> None:
    """Of a bank whose memory is asked for but hardly touched."""
    if DEVICE.type == "cuda":
        pytest.skip("takes 4 GiB of a device")
    bank = torch.empty(2**31 + 8, dtype=F16).as_strided((3, 8), (2**30, 1))
    bank.copy_(torch.randn(3, 8))
    index = torch.tensor([[2, 0, 1, 2]])
    x = torch.randn(1, 8)
    near = bank.clone()
    assert torch.equal(
        sampled_dot(x, bank, index=index, impl="triton"), sampled_dot(x, near, index=index, impl="triton")
    )
