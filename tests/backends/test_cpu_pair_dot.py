"""pair_dot in C++: every instruction set, type and shape against the definition; what it refuses."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu import pair_dot as kernels
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.backends.reference import pair_dot as reference

assert cpu.missing() is None
F64 = torch.float64
BOUNDS = {F64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


def check(x: Tensor, y: Tensor | None, row: Tensor, column: Tensor, normalize: bool = True) -> None:
    """Scores and gradients against float64; a gradient wanted alone equals, bit for bit, the same beside the other."""
    bound, narrow = BOUNDS[x.dtype], torch.finfo(x.dtype).eps if x.element_size() == 2 else 0.0
    wide = F64 if x.dtype == F64 else torch.float32

    def close(actual: Tensor, wanted: Tensor, rounding: float = 0.0) -> None:
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(actual.to(F64), wanted, rtol=0, atol=(bound + rounding) * (1 + scale))

    a, b = (None if t is None else t.to(F64).requires_grad_() for t in (x, y))
    assert a is not None
    expected = reference.pair_dot(a, b, row, column, normalize=normalize)
    scores = kernels.forward(x, y, row, column, normalize=normalize)
    assert scores.dtype == wide
    close(scores, expected.detach())
    grad = torch.linspace(-1, 2, len(row), dtype=F64)
    da, db = torch.autograd.grad((grad * expected).sum(), (a, a if b is None else b))
    both = kernels.backward(grad.to(wide), x, y, row, column, normalize=normalize, need_x=True, need_y=y is not None)
    for k, (mine, truth, rows) in enumerate(zip(both, (da, db), (x, y), strict=True)):
        if rows is None:
            assert mine is None
            continue
        assert mine is not None
        assert mine.dtype == x.dtype
        close(mine, truth, narrow)
        need = {"need_x": k == 0, "need_y": k == 1}
        alone = kernels.backward(grad.to(wide), x, y, row, column, normalize=normalize, **need)
        assert alone[1 - k] is None
        torch.testing.assert_close(alone[k], mine, rtol=0, atol=0)


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gallery", [None, 70])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set(
    isa: str, dtype: torch.dtype, gallery: int | None, normalize: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    assert _C.isa() == isa
    x, y = torch.randn(61, 37).to(dtype), None if gallery is None else torch.randn(gallery, 37).to(dtype)
    row, column = torch.randint(0, 50, (1000,)), torch.randint(0, gallery or 61, (1000,))
    check(x, y, row, column, normalize)
    check(x, y, row.sort().values, column, normalize)


@pytest.mark.parametrize("n", [1, 7, 63, 64, 65])
@pytest.mark.parametrize("m", [None, 1, 65])
@pytest.mark.parametrize("d", [1, 31, 64])
@pytest.mark.parametrize("pairs", [0, 1, 255, 257])
def test_odd_sizes(n: int, m: int | None, d: int, pairs: int) -> None:
    x, y = torch.rand(n, d, dtype=F64) + 0.5, None if m is None else torch.randn(m, d, dtype=F64)
    check(x, y, torch.randint(0, n, (pairs,)), torch.randint(0, m or n, (pairs,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_and_lists(dtype: torch.dtype) -> None:
    x, y = torch.randn(61, 40).to(dtype), torch.randn(70, 40).to(dtype)
    row, column = torch.randint(0, 31, (200,))[::2], torch.randint(0, 70, (300,))[200:]
    check(x[::2, 3:20], y[:, ::2][:, :17], row, column)
    check(x.T.contiguous().T[::2], y, row, column)


@pytest.mark.parametrize("length", [1e30, 1e-30, 1e-8])
def test_long_and_short_rows(length: float) -> None:
    """Neither products of two long rows nor gradients over a long row leave the range of float32."""
    x, y = torch.randn(9, 16) * length, torch.randn(11, 16) * length
    row, column = torch.randint(0, 9, (40,)), torch.randint(0, 11, (40,))
    truth = reference.pair_dot(x.to(F64), y.to(F64), row, column, normalize=True)
    scores = kernels.forward(x, y, row, column, normalize=True)
    torch.testing.assert_close(scores.to(F64), truth, rtol=1e-5, atol=1e-6)
    grad = torch.ones(40)
    short = kernels.backward(grad, torch.ones(9, 16), y, row, column, normalize=True, need_x=True, need_y=False)[0]
    unit = torch.nn.functional.normalize(y.to(F64), eps=1e-12)
    expected = kernels.backward(
        grad.to(F64), torch.ones(9, 16, dtype=F64), unit, row, column, normalize=False, need_x=True, need_y=False
    )[0]
    assert short is not None
    assert expected is not None
    radial = torch.nn.functional.normalize(torch.ones(16, dtype=F64), dim=0)
    projected = (expected - (expected @ radial)[:, None] * radial) / 4
    torch.testing.assert_close(short.to(F64), projected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_and_infinity_show_where_they_are(bad: float, normalize: bool) -> None:
    x, y = torch.randn(9, 5), torch.randn(11, 5)
    x[3, 2] = bad
    row, column = torch.arange(9), torch.arange(9)
    scores = kernels.forward(x, y, row, column, normalize=normalize)
    assert (~scores.isfinite()).tolist() == [i == 3 for i in range(9)]


def test_runs_are_equal_bit_for_bit_whatever_the_threads() -> None:
    x, y = torch.randn(300, 24), torch.randn(200, 24)
    row, column, grad = torch.randint(0, 300, (5000,)), torch.randint(0, 200, (5000,)), torch.randn(5000)
    results = []
    for threads in (1, 2, 2, 7):
        torch.set_num_threads(threads)
        for other in (y, None):
            results.append(
                [
                    kernels.forward(x, other, row, column, normalize=True),
                    *kernels.backward(
                        grad, x, other, row, column, normalize=True, need_x=True, need_y=other is not None
                    ),
                ]
            )
    for later in (results[2:4], results[4:6], results[6:]):
        for mine, first in zip(later, results[:2], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=0)


def test_memory_that_malloc_returns_dirty() -> None:
    """glibc fills every allocation with 0xfe: the result must not notice."""
    code = (
        "import torch\nfrom fastret.backends import cpu\nassert cpu.missing() is None\n"
        "from fastret.backends.cpu import pair_dot as k\n"
        "g = torch.Generator().manual_seed(1)\n"
        "x, y = torch.randn(30, 33, generator=g), torch.randn(25, 33, generator=g)\n"
        "r, c = (torch.randint(0, 25, (400,), generator=g) for _ in range(2))\n"
        "for z in (y, None):\n"
        "  s = k.forward(x, z, r, c, normalize=True)\n"
        "  a, b = k.backward(s, x, z, r, c, normalize=True, need_x=True, need_y=z is not None)\n"
        "  for t in (s, a, b):\n"
        "    print(None if t is None else t.double().sum().item().hex())\n"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"MALLOC_PERTURB_": "1"})
    }
    assert len(results) == 1


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "position", "value", "message"),
    [
        ("x", 0, 0, "x: null pointer"),
        ("x", 1, 41, "x: reaches beyond its storage"),
        ("x", 4, 4, "x: not a floating point type"),
        ("y", 2, 7, "y: expected shape"),
        ("y", 4, 1, "y: unexpected dtype code 1"),
        ("row", 4, 0, "row: unexpected dtype code 0"),
        ("row", 5, 8, "row: reaches beyond its storage"),
        ("column", 2, 29, "column: expected shape"),
        ("grad", 2, 31, "grad: expected shape"),
        ("grad", 4, 1, "grad: unexpected dtype code 1"),
        ("dx", 1, 39, "dx: expected shape"),
        ("dx", 4, 1, "dx: unexpected dtype code 1"),
        ("dy", 5, 8, "dy: reaches beyond its storage"),
    ],
)
def test_nothing_is_touched_through_a_wrong_description(what: str, position: int, value: int, message: str) -> None:
    n, m, d, pairs = 40, 50, 8, 30
    tensors = {"x": torch.ones(n, d), "y": torch.ones(m, d), "dx": torch.ones(n, d), "dy": torch.ones(m, d)}
    tensors |= {"row": torch.arange(pairs), "column": torch.arange(pairs), "grad": torch.ones(pairs)}
    a = {name: array(t) for name, t in tensors.items()}

    def run(a: dict[str, ArrayTuple]) -> None:
        problem = (a["x"], a["y"], a["row"], a["column"], True, 1)
        _C.pair_dot_backward(*problem, a["grad"], a["dx"], a["dy"])

    run(a)
    with pytest.raises(ValueError, match=message):
        run({**a, what: _changed(a[what], position, value)})


@pytest.mark.parametrize("bad", [-1, 9])
def test_pairs_that_are_not_there(bad: int) -> None:
    x, right, wrong = torch.ones(9, 4), torch.zeros(3).long(), torch.tensor([0, bad, 0])
    with pytest.raises(ValueError, match="row: expected numbers from 0 to 8"):
        kernels.forward(x, None, wrong, right, normalize=True)
    with pytest.raises(ValueError, match="column: expected numbers from 0 to 8"):
        kernels.backward(torch.ones(3), x, None, right, wrong, normalize=True, need_x=True, need_y=False)
    rows, index, out = array(x), array(right), array(torch.ones(9, 4))
    with pytest.raises(ValueError, match="dy: y = x has one gradient"):
        _C.pair_dot_backward(rows, None, index, index, True, 1, array(torch.ones(3)), out, out)
