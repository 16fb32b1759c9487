"""The one-sweep kernel of masked_lse where the matrix is wide or large: its plan, packing by blocks, 64-bit numbers."""

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu import masked_lse as kernels
from fastret.backends.pairs import Circulant, Head, Indexed, Listed, Need, PairMask
from fastret.backends.reference import masked_lse as reference
from fastret.backends.rows import accumulation_dtype

assert cpu.missing() is None
F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("target", ["index", "circulant", "listed", "smoothed", "none"])
def test_many_more_columns_than_rows(dtype: torch.dtype, normalize: bool, target: str) -> None:
    """Columns are packed block by block, and S is multiplied twice: a block of rows is too large to be kept."""
    n, m, d = 70, 52_000, 6
    assert not _C.sweep_plan(n, m, d, 4, torch.get_num_threads(), 1)[2]
    x, y = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    index = torch.randint(0, m, (n,))
    several = Listed(
        torch.arange(n + 1) * 9, torch.randint(0, m, (9 * n,)), torch.rand(9 * n, dtype=accumulation_dtype(dtype))
    )
    head = {
        "index": Head(3.0, target=Indexed(index)),
        "circulant": Head(3.0, PairMask(offset=2), Circulant((0, 5), (0.75, 0.25), 40)),
        "listed": Head(3.0, target=several),
        "smoothed": Head(3.0, target=Indexed(index), smoothing=0.25),
        "none": Head(3.0),
    }[target]
    options = {"normalize": normalize, "first_column": 0, "columns": m}
    weight = torch.linspace(0, 1, n, dtype=accumulation_dtype(dtype))
    need = Need(True, True, False, False, False)
    value, actual = kernels.sweep(x, y, head, weight, need=need, **options)

    def dense(precision: torch.dtype) -> list[Tensor]:
        rows = [r.to(precision).requires_grad_() for r in (x, y)]
        ((lse, t),) = reference.masked_lse(*rows, [head], **options)
        loss = (weight.to(precision) * (lse - t)).sum()
        return [g.to(F64) for g in (loss.detach(), *torch.autograd.grad(loss, rows))]

    exact, naive = dense(F64), dense(accumulation_dtype(dtype))
    resolution = 1e-11 if dtype == F64 else 4 * torch.finfo(torch.float32).eps
    assert actual.x is not None
    assert actual.y is not None
    for a, e, other in zip((value, actual.x, actual.y), exact, naive, strict=True):
        assert (a.to(F64) - e).norm() <= 2 * (other - e).norm() + resolution * e.norm()


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("item", [4, 8])
@pytest.mark.parametrize("d", [1, 64, 768, 4096])
@pytest.mark.parametrize("n", [0, 1, 33, 64, 256, 8192, 131072])
@pytest.mark.parametrize("m", [0, 1, 33, 8192, 20_000, 131072, 1_000_000])
@pytest.mark.parametrize("centers", [1, 10])
def test_sweep_plan(n: int, m: int, d: int, item: int, threads: int, centers: int) -> None:
    rows, columns, keep = _C.sweep_plan(n, m, d, item, threads, centers)
    item_bytes, item = item, item if centers == 1 else item * (1 + centers)
    assert 0 <= rows <= n
    assert (rows > 0) == (n > 0)
    assert columns % 32 == 0
    kept = rows * -(-m // columns) * columns * item
    assert not keep or kept <= 12 << 20
    assert keep or min(n, 64) * m * item > 12 << 20, "there was room for a block"
    assert rows <= 64 or rows * threads * d * item_bytes <= 8 << 20, "the threads' parts of dX are large"
    assert keep or rows * columns * item <= 512 << 10, "a tile leaves the L2"


def test_more_than_two_to_the_31_pairs() -> None:
    n = m = 46_400
    x, y = torch.randn(n, 1), torch.randn(m, 1)
    index = torch.arange(m).flip(0)
    head = Head(0.5, target=Indexed(index), axis="row")
    options = {"normalize": False, "first_column": 0, "columns": m}
    value, gradients = kernels.sweep(x, y, head, torch.ones(n), need=Need(True, True, False, False, False), **options)
    assert n * m > 2**31
    last = x[-3:].to(F64).requires_grad_()
    logits = 0.5 * last @ y.to(F64).T
    expected = logits.logsumexp(1) - logits[torch.arange(3), index[-3:]]
    (dx,) = torch.autograd.grad(expected.sum(), last)
    assert gradients.x is not None
    torch.testing.assert_close(gradients.x[-3:].to(F64), dx, rtol=1e-3, atol=1e-4)
    ((lse, t),) = kernels.forward(x, y, [head], **options)
    torch.testing.assert_close((lse - t)[-3:].to(F64), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.to(F64), (lse - t).to(F64).sum(), rtol=1e-5, atol=0.0)
