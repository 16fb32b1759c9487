"""row_extrema by Triton against its definition, and its scores against those of masked_lse: compiled where there is a
GPU, else interpreted in tiles of 16 by 16."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

from fastret.backends.triton import row_extrema as backend
from fastret.kernels.triton import config
from fastret.kernels.triton import row_extrema as kernels
from fastret.ops import Head, PairMask, masked_lse, pair_sums, row_extrema

F64 = torch.float64
COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
N, M = (162, 201) if COMPILED else (35, 53)
FEW = (162, 201) if COMPILED else (18, 21)  # for strips: two blocks each way, a launch each in the interpreter
DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 4, (count,), generator=seeded(seed)).to(DEVICE)


def uniform(count: int, seed: int = 2) -> Tensor:
    return torch.rand(count, generator=seeded(seed), dtype=F64).to(DEVICE)


def rows(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64).to(DEVICE)


MASKS: dict[str, Callable[[int, int], PairMask]] = {
    "any": lambda n, m: PairMask(),
    "same, not self": lambda n, m: PairMask(same=(labels(n), labels(m, 3)), offset=0),
    "different": lambda n, m: PairMask(different=(labels(n), labels(m, 3))),
    "distinct, wrapped offset": lambda n, m: PairMask(distinct=(labels(n), labels(m, 4)), offset=-2, period=max(n, m)),
    "between": lambda n, m: PairMask(above=-uniform(n), below=uniform(n, 4)),
    "none": lambda n, m: PairMask(same=(torch.zeros_like(labels(n)), torch.ones_like(labels(m)))),
}


@pytest.mark.parametrize(
    ("plan", "mask", "n", "m", "width"),
    [
        *(
            ("fused", mask, *shape)
            for mask in MASKS
            for shape in ((N, M, 7), (N, 0, 40), (3, M, 9), (17, 1, 1), (1, 16, 33))
        ),
        *(
            ("weights", "between", *FEW, 70),
            ("weights", "between", N, M, 7),
            ("strips", "between", *FEW, 520),
            ("strips", "distinct, wrapped offset", *FEW, 9),
            ("strips", "none", 3, 0, 9),
        ),
    ],
)
def test_equals_reference(request: pytest.FixtureRequest, plan: str, mask: str, n: int, m: int, width: int) -> None:
    """Values, places and gradients, in the batch where there is no gallery, and of columns that start at 5."""
    request.getfixturevalue(plan)
    normalize = width != 9
    leaves = [rows(n, width).requires_grad_(), *([rows(m, width, seed=6).requires_grad_()] if m else [])]
    extrema = [("min", MASKS[mask](n, m or n)), ("max", MASKS[mask](n, m or n)), ("max", PairMask(offset=5))]
    results, gradients = [], []
    for impl in ("triton", "reference"):
        options = {"normalize": normalize, "first_column": 5, "impl": impl}
        found = row_extrema(leaves[0], leaves[1] if m else None, extrema=extrema, **options)
        weight = torch.linspace(-1, 2, n, dtype=F64, device=DEVICE)
        total = sum((torch.where(v.isinf(), 0, v) * weight * (k + 1)).sum() for k, (v, _) in enumerate(found))
        results.append(found)
        gradients.append(torch.autograd.grad(total, leaves))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("plan", "gallery", "normalize", "width"),
    [
        *(("fused", *choice, 40) for choice in itertools.product((True, False), repeat=2)),
        *(("weights", True, True, 70), ("weights", False, False, 70), ("strips", True, True, 600)),
    ],
)
def test_scores_are_those_of_masked_lse(
    request: pytest.FixtureRequest, dtype: torch.dtype, gallery: bool, plan: str, normalize: bool, width: int
) -> None:
    """A threshold at an extremum excludes exactly it, in forward and in backward of heads of every kind."""
    request.getfixturevalue(plan)
    n, m = FEW if plan == "strips" else (N, M)
    x, y = rows(n, width).to(dtype).requires_grad_(), rows(m, width, seed=6).to(dtype) if gallery else None
    m = m if gallery else n
    others = PairMask() if gallery else PairMask(offset=0)
    options = {"normalize": normalize, "impl": "triton"}
    (high, place), (low, _) = row_extrema(x, y, extrema=[("max", others), ("min", others)], **options)
    high, low = high.detach(), low.detach()
    heads = [Head(0.0, others & mask) for mask in (PairMask(above=low, below=high), PairMask(above=high))]
    (within, _), (none, _) = masked_lse(x, y, heads=heads, **options)  # lse of zeros: log of the number of pairs
    assert (within.exp().round() == m - (not gallery) - 2).all()
    assert none.isneginf().all()
    # the only pair above the next smaller number is the extremum, in backward too
    mask = others & PairMask(above=torch.nextafter(high, torch.full_like(high, -math.inf)))
    sums = pair_sums(x, y, phi="hinge", row_stat=torch.full_like(high, -99.0), mask=mask, **options)
    torch.testing.assert_close(sums, high + 99, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(sums.sum(), x)
    ((again, same_place),) = row_extrema(x, y, extrema=[("max", others)], **options)
    assert torch.equal(same_place, place)
    (expected,) = torch.autograd.grad(again.sum(), x)
    tolerance = 1e-2 if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("plan", "gallery"), [("fused", True), ("fused", False), ("weights", True), ("strips", True)])
def test_of_equals_the_first(request: pytest.FixtureRequest, plan: str, gallery: bool) -> None:
    """Within a tile, across tiles, parts and blocks: every row stands there many times, exactly."""
    request.getfixturevalue(plan)
    one_hot = torch.eye(4, device=DEVICE)[torch.arange(150 if COMPILED else 70, device=DEVICE) % 4]
    x, y = (one_hot[:9], one_hot) if gallery else (one_hot, None)
    assert config.parts(DEVICE, 1, 5) > 1, "parts of the columns are compared"
    (low, low_at), (high, high_at) = row_extrema(
        x, y, extrema=[("min", PairMask()), ("max", PairMask(offset=0))], normalize=False, impl="triton"
    )
    i = torch.arange(len(x), device=DEVICE)
    assert not low.any()
    assert (high == 1).all()
    assert torch.equal(low_at, (i % 4 == 0).long())
    assert torch.equal(high_at, torch.where(i < 4, i + 4, i % 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["x", "y"])
def test_bad_values_are_never_hidden(bad: float, side: str) -> None:
    x, y = rows(8, 4), rows(19, 4, seed=6)
    (x if side == "x" else y)[3, 1] = bad
    extrema = [("min", PairMask()), ("max", MASKS["none"](8, 19))]
    for value, index in row_extrema(x, y, extrema=extrema, impl="triton"):
        assert value.isnan().all()
        assert ((index >= -1) & (index < 19)).all()


def test_kernel_is_compiled_on_a_gpu_and_only_there() -> None:
    assert isinstance(kernels.row_extrema_kernel, triton.JITFunction) == COMPILED


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, extrema = rows(N, 12), rows(M, 12, seed=6), [("min", MASKS["between"](N, M)), ("max", PairMask(offset=0))]

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read on the host")

    if COMPILED:
        torch.cuda.set_sync_debug_mode("error")
    else:
        for name in ("item", "tolist", "nonzero", "__int__", "__bool__", "__float__", "__index__"):
            monkeypatch.setattr(Tensor, name, refuse)
    try:
        backend.forward(x, y, extrema, normalize=True, first_column=0)
    finally:
        if COMPILED:
            torch.cuda.set_sync_debug_mode("default")
