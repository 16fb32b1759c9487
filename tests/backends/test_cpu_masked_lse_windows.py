"""masked_lse in C++ where columns are many more than rows: packed a window at a time, never copied as a whole."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu
from fastret.ops import Head, Indexed, Listed, Masked, PairMask, masked_lse, row_extrema

assert cpu.missing() is None
F64 = torch.float64
BOUNDS = {F64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5}
N, M, D = 40, 1300, 420


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("item", [4, 8])
@pytest.mark.parametrize("d", [1, 64, 768, 4096])
@pytest.mark.parametrize("n", [0, 1, 33, 256, 8192])
@pytest.mark.parametrize("m", [1, 33, 8192, 1_000_000])
def test_window(n: int, m: int, d: int, item: int, threads: int) -> None:
    window, block = _C.window(n, m, d, item, threads), _C.plan(n, m, False, threads)[1]
    assert 0 < window <= m
    assert window == m or window % block == 0, "a tile would be cut"
    assert window == m or window >= threads * block, "a thread would idle"
    assert window * d * item <= max(1 << 20, threads * block * d * item)


def heads_of(dtype: torch.dtype, normalize: bool) -> list[Head]:
    """Over rows and columns, of two widths, with everything that is found by number, given per column, or learned."""
    wide = F64 if dtype == F64 else torch.float32
    scale, names = 5.0 if normalize else 0.1, (torch.arange(N) % 7, torch.arange(M) % 7)
    learned = {
        "scale": torch.tensor(scale, dtype=wide, requires_grad=True),
        "row_bias": normal(N, seed=1).to(wide).requires_grad_(),
        "column_bias": normal(M, seed=2).to(wide).requires_grad_(),
    }
    index = torch.randint(0, M, (6 * N,), generator=torch.Generator().manual_seed(3))
    several = Listed(torch.arange(N + 1) * 6, index, normal(6 * N, seed=4).to(wide))
    positives = Masked(PairMask(same=names), torch.linspace(0.1, 1, N, dtype=wide))
    return [
        Head(mask=PairMask(different=names), target=several, smoothing=0.2, **learned),
        Head(scale, PairMask(offset=700), positives, axis="column"),
        Head(scale, target=Indexed(index[:N]), width=64),
    ]


def differentiated(impl: str, dtype: torch.dtype, given: torch.dtype, normalize: bool, heads: int) -> list[Tensor]:
    """Results, and gradients of x, y and of what the first head learns, in float64, of rows exact in ``given``."""
    used = heads_of(dtype, normalize)[:heads]
    sides = [normal(count, D, seed=count).to(given).to(dtype).requires_grad_() for count in (N, M)]
    results = [r for pair in masked_lse(*sides, heads=used, normalize=normalize, impl=impl) for r in pair]
    loss = sum((r.to(F64) * normal(len(r), seed=20 + k)).sum() for k, r in enumerate(results))
    learned = [used[0].scale, used[0].row_bias, used[0].column_bias]
    return [t.detach().to(F64) for t in (*results, *torch.autograd.grad(loss, [*sides, *learned]))]


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads", [2, 3], ids=["one width", "two widths"])
def test_windows_against_the_definition(
    isa: str, dtype: torch.dtype, normalize: bool, threads: int, heads: int
) -> None:
    assert _C.window(N, M, D, 8 if dtype == F64 else 4, threads) <= M // 2
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    actual = differentiated("cpu", dtype, dtype, normalize, heads)
    expected = differentiated("reference", F64, dtype, normalize, heads)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 and k in (2 * heads, 2 * heads + 1) else 0
        torch.testing.assert_close(a, e, rtol=0, atol=(BOUNDS[dtype] + rounding) * (1 + e.abs().max().item()))


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("normalize", [True, False])
def test_windows_of_classes_with_several_centers(isa: str, temperature: float | None, normalize: bool) -> None:
    _C.set_isa(isa)
    x, y = normal(N, D, seed=1).float(), normal(3 * M, D, seed=2).float()
    results = []
    for impl in ("cpu", "reference"):
        sides = [(t if impl == "cpu" else t.double()).requires_grad_() for t in (x.clone(), y.clone())]
        head = Head(0.05, target=Indexed(torch.arange(N) * 31))
        ((lse, t),) = masked_lse(
            *sides, heads=[head], centers=3, center_temperature=temperature, normalize=normalize, impl=impl
        )
        results.append([lse, t, *torch.autograd.grad((lse - t).sum(), sides)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=3e-5 * (1 + e.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", _C.supported_isas())
def test_scores_are_the_same_bits_in_every_pass(isa: str, dtype: torch.dtype) -> None:
    """A pair whose score is the threshold is on the same side of it in row_extrema, forward and backward."""
    _C.set_isa(isa)
    x, y = normal(N, D, seed=5).to(dtype), normal(M, D, seed=6).to(dtype).requires_grad_()
    (high, best), (low, worst) = row_extrema(x, y, extrema=[("max", PairMask()), ("min", PairMask())], impl="cpu")
    high, low = high.detach(), low.detach()
    for mask in (PairMask(above=high), PairMask(below=low)):
        ((lse, _),) = masked_lse(x, y, heads=[Head(mask=mask)], impl="cpu")
        assert lse.isneginf().all()
    for row in range(0, N, 13):
        ((lse, _),) = masked_lse(x, y, heads=[Head(mask=PairMask(above=low, below=high))], impl="cpu")
        (dy,) = torch.autograd.grad(lse[row], y)
        without = dy.abs().sum(1) == 0
        assert without.nonzero().flatten().tolist() == sorted((int(best[row]), int(worst[row])))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, M - 1])
def test_nan_and_infinity_of_any_window_show(bad: float, column: int) -> None:
    x, y = torch.randn(N, D), torch.randn(M, D)
    y[column, 3] = bad
    for normalize in (True, False):
        ((lse, t),) = masked_lse(x, y, heads=[Head(mask=PairMask(offset=column))], normalize=normalize, impl="cpu")
        assert lse.isnan().all()
        assert t.isnan().all()


def test_no_rows() -> None:
    y = torch.randn(M, D, requires_grad=True)
    ((lse, t),) = masked_lse(torch.empty(0, D), y, heads=[Head(axis="column")], impl="cpu")
    assert lse.isneginf().all()
    (dy,) = torch.autograd.grad(lse.sum() + t.sum(), y)
    assert not dy.any()


def test_memory_that_malloc_returns_dirty() -> None:
    """glibc fills every allocation with 0xfe (-1.7e38 as floats): the result must not notice."""
    code = (
        "import torch\nfrom fastret.ops import Head, Indexed, masked_lse\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "  x, y = (torch.randn(s, 420, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (40, 1300))\n"
        "  y.requires_grad_()\n"
        "  for widths in ((None,), (64, None)):\n"
        "    heads = [Head(9.0, target=Indexed(torch.arange(40)), width=w) for w in widths]\n"
        "    lse, t = masked_lse(x, y, heads=heads, impl='cpu')[0]\n"
        "    for r in (lse, t, torch.autograd.grad((lse - t).sum(), y)[0]):\n"
        "      print(r.double().sum().item().hex())\n"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"MALLOC_PERTURB_": "1"})
    }
    assert len(results) == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_parameters_and_their_gradient(reduction: str) -> None:
    """200,000 proxies are 49 MiB: neither a copy of them nor a second gradient is made."""
    code = (
        "import torch\nfrom pathlib import Path\nfrom fastret.functional import normalized_softmax\n"
        "def status(field):\n"
        "  lines = Path('/proc/self/status').read_text().splitlines()\n"
        "  return next(int(v.split()[1]) for v in lines if v.startswith(field)) / 1024\n"
        "def run(x, w):\n"
        f"  normalized_softmax(x, w, torch.arange(len(x)), reduction={reduction!r}).sum().backward()\n"
        "run(*(torch.randn(n, 64, requires_grad=True) for n in (256, 3000)))\n"
        "x, w = (torch.randn(n, 64, requires_grad=True) for n in (256, 200_000))\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = status('VmRSS')\nrun(x, w)\nprint(status('VmHWM') - before - 4 * 64 * len(w) / 2**20)\n"
    )
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "FASTRET_IMPL": "cpu"}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env={**os.environ, **freed}, capture_output=True, text=True, check=True)
    assert float(child.stdout) <= 24
