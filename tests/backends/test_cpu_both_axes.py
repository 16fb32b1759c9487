"""A row head and a column head of the same logits share exponentials in C++, where no row and no column of a tile lies
far below the others; elsewhere each goes by itself. Either way they are what the reference says."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.ops import Head, Indexed, PairMask, Shifted, masked_lse

F64 = torch.float64


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    _C.set_isa("")


def results(x: Tensor, y: Tensor | None, heads: list[Head], impl: str, *, learned: bool) -> list[Tensor]:
    """lse and t of both heads, and the gradients of a random linear form of them; the scale is one tensor."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, y) if t is not None]
    if learned:
        scale = torch.tensor(float(heads[0].scale), dtype=F64 if x.dtype == F64 else None, requires_grad=True)
        heads = [replace(head, scale=scale) for head in heads]
    pairs = masked_lse(inputs[0], inputs[1] if y is not None else None, heads=heads, normalize=False, impl=impl)
    flat = [t for pair in pairs for t in pair]
    generator = torch.Generator().manual_seed(5)
    total = sum((torch.randn(t.shape, generator=generator, dtype=F64).to(t.dtype) * t).sum() for t in flat)
    wanted = [*inputs, *([scale] if learned else [])]
    return [*(t.detach() for t in flat), *torch.autograd.grad(total, wanted)]


def spread(x: Tensor, y: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Rows whose logits are alike; those of a few rows, or columns, far from the others; or of all of them."""
    x, y = x.clone(), None if y is None else y.clone()
    if kind == "a row":
        x[3] = -60 * torch.ones_like(x[3])
    elif kind == "a column":
        (x if y is None else y)[2] += 90
    elif kind == "every row":
        x = x * torch.logspace(-1, 2.5, len(x), dtype=x.dtype)[:, None]
    return x, y


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("kind", ["alike", "a row", "a column", "every row"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (70, 33), (33, None), (300, 500)])
@pytest.mark.parametrize("learned", [False, True])
def test_equals_reference(isa: str, kind: str, n: int, m: int | None, learned: bool) -> None:
    _C.set_isa(isa)
    x, y = torch.rand(n, 5, dtype=F64) + 0.2, None if m is None else torch.rand(m, 5, dtype=F64) + 0.2
    x, y = spread(x, y, kind) if n > 3 and m != 3 else (x, y)
    columns = n if m is None else m
    heads = [
        Head(3.0, target=Indexed(torch.randint(columns, (n,)))),
        Head(3.0, axis="column", target=Shifted(1)),
    ]
    expected, mine = (results(x, y, heads, impl, learned=learned) for impl in ("reference", "cpu"))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(b.abs().max().clamp_min(1)))


def test_sharing_changes_little_and_is_shared() -> None:
    """With a mask, of all pairs, the heads go by themselves: other roundings, so that this would see a change."""
    x, y = torch.randn(300, 16), torch.randn(200, 16)
    same = torch.zeros(300, dtype=torch.int64), torch.zeros(200, dtype=torch.int64)
    shared = results(x, y, [Head(1.0), Head(1.0, axis="column")], "cpu", learned=False)
    mask = PairMask(same=same)
    apart = results(x, y, [Head(1.0, mask), Head(1.0, mask, axis="column")], "cpu", learned=False)
    torch.testing.assert_close(shared, apart, rtol=2e-5, atol=2e-5)
    assert any((a != b).any() for a, b in zip(shared, apart, strict=True))


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("noise", [0.02, 0.04, 0.06])
def test_confident_pairs_keep_their_digits(isa: str, noise: float) -> None:
    """Losses far below the resolution of logits: neither negative nor noise, nor is what their gradients leave of 1."""
    _C.set_isa(isa)
    x = torch.nn.functional.normalize(torch.randn(256, 64, dtype=F64))
    y = torch.nn.functional.normalize(x + noise * torch.randn_like(x))
    same = torch.zeros(256, dtype=torch.int64)
    plain = [Head(100.0, target=Shifted()), Head(100.0, target=Shifted(), axis="column")]
    apart = [replace(head, mask=PairMask(same=(same, same))) for head in plain]

    def run(dtype: torch.dtype, heads: list[Head], impl: str) -> tuple[Tensor, Tensor]:
        rows, columns = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        pairs = masked_lse(rows, columns, heads=heads, normalize=False, impl=impl)
        losses = torch.stack([lse - t for lse, t in pairs])
        gradients = torch.autograd.grad(losses.sum(), (rows, columns))
        return losses.detach().double(), torch.stack(gradients).double()

    exact = run(F64, plain, "reference")
    shared, separate = run(torch.float32, plain, "cpu"), run(torch.float32, apart, "cpu")
    assert (shared[0] >= 0).all()
    for ours, theirs, truth in zip(shared, separate, exact, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits(offset: float) -> None:
    x = torch.randn(40, 3)
    x[:, 0], y = offset, torch.ones(50, 3)
    for lse, _ in masked_lse(x, y, heads=[Head(1.0), Head(1.0, axis="column")], normalize=False, impl="cpu"):
        assert lse.isfinite().all()
        assert (lse - offset).abs().max() < 20 + math.log(50)
