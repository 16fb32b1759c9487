"""Heads that sum a phi, and row extrema, in C++: every instruction set, multiplier and type against the definition."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu, phi
from fastret.backends.cpu import masked_lse as kernels
from fastret.backends.cpu import row_extrema as extrema_kernels
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.backends.pairs import Head, PairMask, Shifted
from fastret.ops import masked_lse, pair_sums, row_extrema

assert cpu.missing() is None
F64 = torch.float64
BOUNDS = {F64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")
    _C.set_gemm("")


def values_and_slopes(name: str, z: Tensor) -> list[Tensor]:
    """phi of each number by itself, as the one pair of a row, and its slope."""
    x = z[:, None].clone().requires_grad_()
    sums = pair_sums(x, torch.ones(1, 1, dtype=z.dtype), phi=name, normalize=False, impl="cpu")
    (slopes,) = torch.autograd.grad(sums.sum(), x)
    return [sums.detach(), slopes[:, 0]]


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", phi.NAMES)
def test_phi_over_its_whole_range(isa: str, dtype: torch.dtype, name: str) -> None:
    """Within 3 units in the last place of the number itself, near 0 and far below it; infinite nowhere."""
    _C.set_isa(isa)
    gap = torch.cat([torch.logspace(-20, 1.9, 4000, dtype=F64), torch.linspace(0.6, 0.8, 1001, dtype=F64)])
    z = torch.cat([-gap, torch.zeros(1, dtype=F64), gap[:50], torch.tensor([-20, -40], dtype=F64)]).to(dtype)
    eps = torch.finfo(dtype).eps
    # in float64 with the floor of the dtype; float64 itself is compared with PyTorch's own functions
    floor = phi.resolution(name, dtype)
    floored = torch.where(-z.to(F64) < floor, -floor, z.to(F64))
    expected = [phi.value(name, floored), phi.slope(name, floored)]
    if name == "hinge":
        expected = [z.clamp_min(0).to(F64), (z > 0).to(F64)]
    elif name != "log1m_exp":
        coincide = -z < floor
        expected[1] = torch.where(coincide, 0, expected[1])
        if name == "distance":
            expected[0] = torch.where(coincide, 0, expected[0])
    for mine, wanted in zip(values_and_slopes(name, z), expected, strict=True):
        assert mine.isfinite().all()
        # PyTorch's own value of log(1 - e^z) rounds twice
        torch.testing.assert_close(mine.to(F64), wanted, rtol=(3 if dtype == torch.float32 else 8) * eps, atol=0)


def test_small_logarithms_keep_their_digits() -> None:
    """log(1 - e) = -e - e^2 / 2 - ..., where 1 - e is 1."""
    values, _ = values_and_slopes("log1m_exp", torch.tensor([-40.0, -100.0, -700.0], dtype=F64))
    assert values.tolist() == pytest.approx([-math.exp(-40), -math.exp(-100), -math.exp(-700)], rel=1e-15, abs=0)
    values, _ = values_and_slopes("log1m_exp", torch.tensor([-20.0, -80.0, -87.0, -1e9]))
    assert values[:3].tolist() == pytest.approx([-math.exp(-20), -math.exp(-80), -math.exp(-87)], rel=2e-7, abs=0)
    assert values[3] == 0


def test_nan_shows() -> None:
    for name in phi.NAMES:
        for dtype in (torch.float32, F64):
            stat = torch.tensor([math.nan, 2.0], dtype=dtype)
            sums = pair_sums(torch.ones(2, 1, dtype=dtype), torch.ones(3, 1, dtype=dtype), phi=name, row_stat=stat)
            assert sums.isnan().tolist() == [True, False]


def all_of(x: Tensor, y: Tensor | None, impl: str) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of every phi over rows and over columns beside a log-sum-exp, and of two extrema."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y) if t is not None]
    x, y = leaves[0], None if y is None else leaves[1]
    n, m = len(x), len(leaves[-1])
    wide = F64 if x.dtype == F64 else torch.float32
    own, others = torch.arange(n) % 5, torch.arange(m) % 5
    masks = PairMask(different=(own, others)), PairMask(same=(own, others), offset=1), PairMask(offset=0)
    stat, bias = torch.linspace(2.5, 3, n, dtype=wide), torch.linspace(-0.2, 0.1, m, dtype=wide)
    heads = [
        Head(torch.tensor(2.0, dtype=wide), mask, Shifted(2), 0.1, -stat, bias, axis, reduce=name)
        for name in phi.NAMES
        for axis, mask in zip(("row", "column"), masks[:2], strict=True)
    ]
    results = [t for pair in masked_lse(x, y, heads=[*heads, Head(5.0)], impl=impl) for t in pair]
    found = row_extrema(x, y, extrema=[("max", masks[0]), ("min", masks[2])], impl=impl)
    results += [v for v, _ in found]
    weights = [torch.linspace(-1, k % 3, len(r), dtype=F64).to(r.dtype) for k, r in enumerate(results)]
    total = sum((w * r).sum() for w, r in zip(weights, results, strict=True))
    return [*results, *(i for _, i in found)], list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("gemm", ["own", "blas"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gallery", [None, 257])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set_and_multiplier(
    isa: str, gemm: str, dtype: torch.dtype, gallery: int | None, threads: int
) -> None:
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    _C.set_gemm(gemm)
    x, y = torch.randn(333, 37).to(dtype), None if gallery is None else torch.randn(gallery, 37).to(dtype)
    values, gradients = all_of(x, y, "cpu")
    wanted, truth = all_of(x.to(F64), None if y is None else y.to(F64), "reference")
    narrow = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    for mine, expected in zip(values, wanted, strict=True):
        bound = BOUNDS[dtype] * (1 + expected.abs().max().item())
        torch.testing.assert_close(mine.to(F64), expected.to(F64), rtol=0, atol=bound)
    for mine, expected in zip(gradients, truth, strict=True):
        assert mine.dtype == dtype
        bound = (BOUNDS[dtype] + narrow) * (1 + expected.abs().max().item())
        torch.testing.assert_close(mine.to(F64), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("gallery", [True, False])
def test_runs_are_equal_bit_for_bit(gallery: bool) -> None:
    torch.set_num_threads(2)
    x, y = torch.randn(600, 24), torch.randn(700, 24) if gallery else None
    first = all_of(x, y, "cpu")
    for _ in range(3):
        torch.testing.assert_close(all_of(x, y, "cpu"), first, rtol=0, atol=0)


def test_memory_that_malloc_returns_dirty() -> None:
    """glibc fills every allocation with 0xfe: the result must not notice."""
    code = (
        "import torch\nfrom fastret.ops import *\nfrom fastret.backends.phi import NAMES\n"
        "x, y = (torch.randn(s, 33, generator=torch.Generator().manual_seed(s)) for s in (300, 259))\n"
        "for y in (y, None):\n"
        "  x = x.detach().requires_grad_()\n"
        "  m = PairMask(offset=1)\n"
        "  r = [pair_sums(x, y, phi=p, row_stat=torch.full((300,), 3.), mask=m, impl='cpu') for p in NAMES]\n"
        "  r += [v for v, _ in row_extrema(x, y, extrema=[('min', m), ('max', m)], impl='cpu')]\n"
        "  for t in (*r, *torch.autograd.grad(sum(t.sum() for t in r), x)):\n"
        "    print(t.double().sum().item().hex())\n"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"MALLOC_PERTURB_": "1"})
    }
    assert len(results) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ties_across_tiles(threads: int) -> None:
    """More columns than a tile has, in an order of tiles that differs from row block to row block."""
    torch.set_num_threads(threads)
    x = torch.eye(8)[torch.arange(1500) % 8]
    for others in (x, None):
        (low, low_at), (high, high_at) = extrema_kernels.forward(
            x, others, [("min", PairMask()), ("max", PairMask())], normalize=True, first_column=0
        )
        assert not low.any()
        assert (high == 1).all()
        assert torch.equal(low_at, (torch.arange(1500) % 8 == 0).long())
        assert torch.equal(high_at, torch.arange(1500) % 8)


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "position", "value", "message"),
    [
        ("x", 4, 4, "x: not a floating point type"),
        ("above", 2, 39, r"heads\[0\].mask.above: expected shape"),
        ("value", 2, 41, "value: expected shape"),
        ("value", 4, 1, "value: unexpected dtype code 1"),
        ("index", 4, 0, "index: unexpected dtype code 0"),
        ("index", 5, 8, "index: reaches beyond its storage"),
        ("index", 0, 0, "index: null pointer"),
    ],
)
def test_nothing_is_touched_through_a_wrong_description(what: str, position: int, value: int, message: str) -> None:
    tensors = {"x": torch.ones(40, 8), "above": torch.ones(40), "value": torch.ones(40), "index": torch.arange(40)}
    a = {name: array(t) for name, t in tensors.items()}

    def run(a: dict[str, ArrayTuple]) -> None:
        mask: _C.MaskTuple = (None, None, None, None, 0, a["above"], None)
        _C.row_extrema(a["x"], None, [(True, mask)], True, 0, 1, [(a["value"], a["index"])])

    run(a)
    with pytest.raises(ValueError, match=message):
        run({**a, what: _changed(a[what], position, value)})


@pytest.mark.parametrize("reduction", [-1, 5, 6])
def test_reductions_that_are_none(reduction: int) -> None:
    """5 is the greatest logit, which row_extrema alone returns."""
    x, out = torch.ones(4, 3), (array(torch.ones(4)), array(torch.ones(4)))
    *described, _ = kernels._head(Head(), 4)
    with pytest.raises(ValueError, match=r"heads\[0\].reduce: unknown kind"):
        _C.masked_lse_forward(array(x), None, [(*described, reduction)], [], True, 0, 1, [out], (1, 0.0))
    with pytest.raises(ValueError, match="results: expected one an extremum"):
        _C.row_extrema(array(x), None, [(True, described[2])], True, 0, 1, [])
