"""sampled_dot in C++: every instruction set, type and number of threads; draws; what it refuses to touch."""

from collections.abc import Iterator

import pytest
import torch

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu.array import array
from fastret.ops import sampled_dot

assert cpu.missing() is None
F64 = torch.float64


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
def test_every_instruction_set_and_pieces_of_columns(isa: str, dtype: torch.dtype, first: bool, drawn: bool) -> None:
    _C.set_isa(isa)
    x, bank = torch.randn(5, 37).to(dtype), torch.randn(301, 37).to(dtype)
    for count in (1, 254, 255, 256, 257, 700):  # columns are found 256 at a time, four by four
        given = {"count": count, "seed": 2**63 - 5} if drawn else {"index": torch.randint(0, 301, (5, count))}
        if first:
            given["first"] = torch.randint(0, 301, (5,))
        mine, truth = ([t.to(kind, copy=True).requires_grad_() for t in (x, bank)] for kind in (dtype, F64))
        scores = sampled_dot(*mine, **given, impl="cpu")
        expected = sampled_dot(*truth, **given, impl="reference")
        tolerance = 1e-12 if dtype == F64 else 1e-5
        torch.testing.assert_close(scores.to(F64), expected, rtol=tolerance, atol=tolerance * 6)
        weight = torch.randn_like(expected)
        scores.backward(weight.to(scores.dtype))
        expected.backward(weight)
        for a, b in zip(mine, truth, strict=True):
            bound = tolerance if dtype in (F64, torch.float32) else torch.finfo(dtype).eps
            torch.testing.assert_close(a.grad.to(F64), b.grad, rtol=bound, atol=tolerance * 60)


@pytest.mark.parametrize("n", [1, 3, 64])
def test_threads_change_no_bit(n: int) -> None:
    x, bank = torch.randn(n, 20).requires_grad_(), torch.randn(999, 20).requires_grad_()
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        scores = sampled_dot(x, bank, count=1000, seed=4, impl="cpu")
        results.append((scores, *torch.autograd.grad(scores.sin().sum(), (x, bank))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


X, M, S = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(4, 5)
FIRST, INDEX = torch.arange(4), torch.zeros(4, 5, dtype=torch.int64)


def forward(x=X, bank=M, first=None, index=None, count=5, threads=1, scores=S) -> None:
    columns = (None if t is None else array(t) for t in (first, index))
    _C.sampled_dot_forward(array(x), array(bank), *columns, 0, count, threads, array(scores))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bank": M.double()}, "bank: expected rows that are accumulated in the same type as x"),
        ({"bank": M[:, :2]}, r"bank: expected shape \(6, 3\)"),
        ({"bank": M[:0]}, "bank: no rows"),
        ({"x": FIRST[:, None]}, "x: not a floating point type"),
        ({"scores": S[:, :4]}, r"scores: expected shape \(4, 5\)"),
        ({"scores": S.double()}, "scores: unexpected dtype"),
        ({"count": 0}, "index, count: expected one of them"),
        ({"count": -1}, "count: must not be negative"),
        ({"index": INDEX}, "index, count: expected one of them"),
        ({"count": 0, "index": INDEX + 6}, "index: out of range"),
        ({"count": 0, "index": INDEX - 1}, "index: out of range"),
        ({"count": 0, "index": INDEX[:3]}, r"index: expected shape \(4, 5\)"),
        ({"count": 4, "first": FIRST + 3}, "first: "),
        ({"count": 4, "first": FIRST[:3]}, "first: "),
        ({"threads": 0}, "threads: must be at least 1"),
    ],
)
def test_sizes_are_checked_before_memory_is_touched(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(**arguments)
    forward()
    forward(first=FIRST, count=4)
    forward(index=INDEX, count=0)
