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


OPERATIONS = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


@pytest.mark.parametrize(
    ("operation", "over", "fits"),
    [
        ("add", (2**30, 2**30), (2**30, 2**30 - 1)),
        ("sub", (-(2**31), 1), (1 - 2**31, 1)),
        ("mul", (2**16, 2**15), (2**16, -(2**15))),
    ],
)
def test_signed_integers_that_overflow_are_an_error(
    operation: str, over: tuple[int, int], fits: tuple[int, int]
) -> None:
    """One of several; not the greatest that fit, nor in 64 bits."""

    def computed(pair: tuple[int, int], dtype: torch.dtype) -> bool:
        a, b = (torch.tensor([1, v], dtype=dtype) for v in pair)
        out = torch.empty_like(a)
        arithmetic_kernel[(1,)](a, b, out, operation)
        return torch.equal(out, OPERATIONS[operation](a, b))

    with pytest.raises(InterpreterError, match=f"int32 overflows in {operation}"):
        computed(over, torch.int32)
    assert computed(fits, torch.int32)
    assert computed(over, torch.int64)


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
