"""What the tests of Triton kernels count on, where Triton interprets."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")


@triton.jit
def arithmetic_kernel(a, b, out, OPERATION: tl.constexpr):
    x, y = tl.load(a + tl.arange(0, 2)), tl.load(b + tl.arange(0, 2))
    if OPERATION == "add":
        result = x + y
    elif OPERATION == "sub":
        result = x - y
    else:
        result = x * y
    tl.store(out + tl.arange(0, 2), result)


@pytest.mark.parametrize(("operation", "a", "b"), [("add", 2**30, 2**30), ("sub", -(2**31), 1), ("mul", 2**16, 2**15)])
def test_signed_integers_that_overflow_are_an_error(operation: str, a: int, b: int) -> None:
    """One of several, and not the greatest that fit."""
    both = [torch.tensor([1, v], dtype=torch.int32) for v in (a, b)]
    out = torch.empty_like(both[0])
    with pytest.raises(InterpreterError, match=f"int32 overflows in {operation}"):
        arithmetic_kernel[(1,)](*both, out, operation)
    fits = [
        t - torch.tensor([0, s]).to(t.dtype) for t, s in zip(both, {"sub": (-1, 0)}.get(operation, (1, 1)), strict=True)
    ]
    arithmetic_kernel[(1,)](*fits, out, operation)
    assert torch.equal(out, {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[operation](*fits))
    arithmetic_kernel[(1,)](*(t.long() for t in both), out.long(), operation)


def test_unsigned_integers_wrap() -> None:
    both = [torch.tensor([3, v], dtype=torch.int64).to(torch.uint32) for v in (2**31, 2)]
    out = torch.empty_like(both[0])
    arithmetic_kernel[(1,)](*both, out, "mul")
    assert out.tolist() == [9, 0]


@triton.jit
def rounding_kernel(x, out):
    tl.store(out + tl.arange(0, 4), tl.load(x + tl.arange(0, 4)).to(tl.bfloat16))


def test_bfloat16_is_rounded_to_nearest() -> None:
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7 - 2**-8 - 2**-20, float("nan")])
    out = torch.empty(4, dtype=torch.bfloat16)
    rounding_kernel[(1,)](x, out)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
