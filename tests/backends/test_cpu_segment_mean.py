"""segment_mean in C++: every instruction set, type and shape against the definition; what it refuses."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu import segment_mean as kernels
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.backends.reference import segment_mean as reference

assert cpu.missing() is None
F64 = torch.float64
DTYPES = (F64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


def check(x: Tensor, index: Tensor, segments: int, mean: bool) -> None:
    a = x.to(F64).requires_grad_()
    expected, expected_counts = reference.segment_mean(a, index, segments, mean=mean)
    result, counts = kernels.forward(x, index, segments, mean=mean)
    assert torch.equal(counts, expected_counts)
    wide = F64 if x.dtype == F64 else torch.float32
    assert result.dtype == wide
    torch.testing.assert_close(result, expected.to(wide).detach(), rtol=2 * torch.finfo(wide).eps, atol=1e-13)
    grad = torch.linspace(-1, 2, expected.numel(), dtype=F64).view_as(expected).to(wide)
    (truth,) = torch.autograd.grad((grad * expected).sum(), a)
    dx = kernels.backward(grad, index, counts, mean=mean, dtype=x.dtype)
    torch.testing.assert_close(dx, truth.to(x.dtype), rtol=2 * torch.finfo(x.dtype).eps, atol=1e-13)


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("mean", [True, False])
def test_every_instruction_set(isa: str, dtype: torch.dtype, threads: int, mean: bool) -> None:
    """Many segments, one that holds most rows (cut by features), and rows that lie in order."""
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    for d in (1, 37, 200):
        x = torch.randn(301, d).to(dtype)
        many = torch.randint(-3, 60, (301,))
        for index in (many, many.sort().values, torch.where(many < 50, 7, many)):
            check(x, index, 60, mean)


@pytest.mark.parametrize("n", [0, 1, 7, 65])
@pytest.mark.parametrize("segments", [0, 1, 64, 1000])
@pytest.mark.parametrize("d", [1, 31, 64])
def test_odd_sizes(n: int, segments: int, d: int) -> None:
    index = torch.randint(-1, segments, (n,)) if segments else torch.full((n,), -7)
    check(torch.randn(n, d, dtype=F64), index, segments, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_and_index(dtype: torch.dtype) -> None:
    x, index = torch.randn(61, 40).to(dtype), torch.randint(-1, 9, (62,))
    check(x[::2, 3:20], index[::2], 9, True)
    check(x[:, ::2], index[1:], 9, True)
    grad = torch.randn(5, 9).T
    counts = torch.full((9,), 2)
    expected = kernels.backward(grad.contiguous(), index, counts, mean=True, dtype=dtype)
    assert torch.equal(kernels.backward(grad, index, counts, mean=True, dtype=dtype), expected)


def test_runs_are_equal_bit_for_bit_whatever_the_threads() -> None:
    x, index = torch.randn(5000, 150, dtype=F64), torch.randint(-1, 40, (5000,))
    for skewed in (index, index.clamp_max(1)):
        results = []
        for threads in (1, 2, 2, 7):
            torch.set_num_threads(threads)
            results.append(kernels.forward(x, skewed, 40, mean=True))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "position", "value", "message"),
    [
        ("x", 0, 0, "x: null pointer"),
        ("x", 1, 41, "x: reaches beyond its storage"),
        ("x", 4, 4, "x: not a floating point type"),
        ("index", 2, 39, "index: expected shape"),
        ("index", 4, 0, "index: unexpected dtype code 0"),
        ("index", 5, 8, "index: reaches beyond its storage"),
        ("result", 1, 2, "counts: expected shape"),
        ("result", 2, 7, "result: expected shape"),
        ("result", 4, 1, "result: unexpected dtype code 1"),
        ("counts", 4, 0, "counts: unexpected dtype code 0"),
        ("dx", 4, 4, "dx: not a floating point type"),
        ("dx", 5, 8, "dx: reaches beyond its storage"),
    ],
)
def test_nothing_is_touched_through_a_wrong_description(what: str, position: int, value: int, message: str) -> None:
    tensors = {
        "x": torch.ones(40, 8),
        "index": torch.arange(40) % 3,
        "result": torch.ones(3, 8),
        "dx": torch.ones(40, 8),
    }
    tensors["counts"] = torch.ones(3).long()
    a = {name: array(t) for name, t in tensors.items()}

    def run(a: dict[str, ArrayTuple]) -> None:
        if what == "dx":
            _C.segment_mean_backward(a["result"], a["index"], a["counts"], True, 1, a["dx"])
        else:
            _C.segment_mean_forward(a["x"], a["index"], True, 1, a["result"], a["counts"])

    run(a)
    with pytest.raises(ValueError, match=message):
        run({**a, what: _changed(a[what], position, value)})


def test_segments_that_are_not_there() -> None:
    x, index = torch.ones(3, 4), torch.tensor([0, 9, -1])
    with pytest.raises(ValueError, match="index: expected numbers from 0 to 8"):
        kernels.forward(x, index, 9, mean=True)
    with pytest.raises(ValueError, match="index: expected numbers from 0 to 8"):
        kernels.backward(torch.ones(9, 4), index, torch.ones(9).long(), mean=True, dtype=torch.float32)
