"""What the tests of masked_lse by Triton run, and how it is compared with the definition in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype
from fastret.ops import Circulant, Dense, Head, Indexed, Listed, Masked, PairMask, Shifted, masked_lse

F64 = torch.float64
COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
N, M = (162, 201) if COMPILED else (18, 21)
WIDE = 600 if COMPILED else 100

# Errors of results and of the gradients of rows, relative to their norms where those are above 1. The gradients of
# scales and biases are sums in the dtype of accumulation, as results are.
BOUNDS = {
    F64: (1e-13, 1e-13),
    torch.float32: (3e-6, 3e-6),
    torch.bfloat16: (3e-6, 2**-7),
    torch.float16: (3e-6, 2**-10),
}
DTYPES = list(BOUNDS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(count: int, classes: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (count,), generator=seeded(seed)).to(DEVICE)


def uniform(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=F64).to(DEVICE)


def rows(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64).to(DEVICE)


def listed(n: int, m: int) -> Listed:
    """Rows without an entry, with several, with one twice."""
    counts = labels(n, 4, seed=8)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    entries = int(offsets[-1])
    return Listed(offsets, labels(entries, min(m, 6), seed=9), uniform(entries, seed=10))


MASKS: dict[str, Callable[[int, int], PairMask]] = {
    "any": lambda n, m: PairMask(),
    "same": lambda n, m: PairMask(same=(labels(n), labels(m, seed=3))),
    "different": lambda n, m: PairMask(different=(labels(n), labels(m, seed=3))),
    "distinct": lambda n, m: PairMask(distinct=(labels(n, 9), labels(m, 9, seed=3))),
    "not self": lambda n, m: PairMask(offset=0),
    "offset": lambda n, m: PairMask(offset=-3),
    "offset, wrapped": lambda n, m: PairMask(offset=-3, period=max(n, m)),
    "above": lambda n, m: PairMask(above=uniform(n) - 0.4),
    "below": lambda n, m: PairMask(below=uniform(n) - 0.2),
    "all at once": lambda n, m: (
        PairMask(different=(labels(n), labels(m, seed=3)), distinct=(labels(n, 9), labels(m, 9, seed=3)), offset=1)
        & PairMask(above=uniform(n) - 1, below=uniform(n) + 0.2)
    ),
}
TARGETS: dict[str, Callable[[int, int], object]] = {
    "none": lambda n, m: None,
    "index": lambda n, m: Indexed(labels(n, m)),
    "shifted": lambda n, m: Shifted(2),
    "shifted, wrapped": lambda n, m: Shifted(-5, max(n, m)),
    "same label": lambda n, m: Masked(PairMask(same=(labels(n), labels(m, seed=3)), offset=0), 0.1 + uniform(n)),
    "between": lambda n, m: Masked(PairMask(above=-uniform(n), below=uniform(n, seed=4)), uniform(n, seed=6)),
    "circulant": lambda n, m: Circulant((-1, 0, 1), (0.3, 0.5, 0.2), min(n, m), 0),
    "circulant, offset": lambda n, m: Circulant((0, 2), (0.5, 0.5), min(n, 7), m - 7),
    "dense": lambda n, m: Dense(uniform(n, m)),
    "listed": lambda n, m: listed(n, m),
}


def learned(heads: Sequence[Head]) -> list[Tensor]:
    values = [getattr(h, name) for h in heads for name in ("scale", "row_bias", "column_bias")]
    return [v for v in values if isinstance(v, Tensor)]


def values_and_gradients(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    *,
    rounded: torch.dtype | None = None,
    normalize: bool = True,
    **options: object,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Of a random linear form of what is finite: results with the gradients of scales and biases; gradients of rows;
    and their norms before the radial part is taken away, to which rounding is relative.

    rounded: (unit) rows are rounded to this dtype, as the kernels do for tl.dot; the gradient passes through.
    """
    leaves = [t.detach().clone().requires_grad_() for t in (x, y) if t is not None]

    def leaf(v: object) -> object:
        return v.detach().to(accumulation_dtype(x.dtype), copy=True).requires_grad_() if isinstance(v, Tensor) else v

    def unit(r: Tensor) -> Tensor:
        u = torch.nn.functional.normalize(r) if normalize else r
        return u + (u.to(rounded).to(F64) - u).detach()

    heads = [replace(h, scale=leaf(h.scale), row_bias=leaf(h.row_bias), column_bias=leaf(h.column_bias)) for h in heads]
    used = leaves if rounded is None else [unit(t) for t in leaves]
    options["normalize"] = normalize and rounded is None
    pairs = masked_lse(used[0], None if y is None else used[1], heads=heads, **options)
    results = [t for pair in pairs for t in pair]
    generator = seeded(7)
    total = results[0].new_zeros(())
    for r in results:
        weight = torch.randn(r.shape, generator=generator, dtype=F64).to(r)
        total = total + (weight * torch.where(r == -math.inf, 0, r)).sum()
    parameters = learned(heads)
    wanted = [*leaves, *parameters, *used]
    gradients = list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    sides, of_unit = len(leaves), gradients[len(leaves) + len(parameters) :]
    if rounded is not None and normalize:
        of_unit = [g / t.detach().norm(dim=1, keepdim=True) for g, t in zip(of_unit, leaves, strict=True)]
    return (
        [*(r.detach() for r in results), *gradients[sides:-sides]],
        gradients[:sides],
        [g.norm().item() for g in of_unit],
    )


def assert_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], bound: float, norms: Sequence[float] | None = None
) -> None:
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        finite = e.isfinite()
        assert torch.equal(finite, a.isfinite()), k
        assert torch.equal(a[~finite].to(F64), e[~finite].to(F64)), k
        error, norm = (a.to(F64) - e)[finite].norm().item(), norms[k] if norms else e[finite].norm().item()
        assert error <= bound * max(1.0, norm), (k, error / max(1.0, norm))


def check(x: Tensor, y: Tensor | None, heads: Sequence[Head], dtype: torch.dtype = F64, **options: object) -> None:
    """Values and all gradients; of half precision those of the rounded unit rows."""
    low = [None if t is None else t.to(dtype) for t in (x, y)]
    wide = [None if t is None else t.to(F64) for t in low]
    half = dtype if dtype.itemsize == 2 else None
    expected = values_and_gradients(*wide, heads, rounded=half, **options, impl="reference")
    actual = values_and_gradients(*low, heads, **options, impl="triton")
    assert all(g.dtype == dtype for g in actual[1])
    assert all(r.dtype == accumulation_dtype(dtype) for r in actual[0])
    of_results, of_rows = BOUNDS[dtype]
    assert_close(actual[0], expected[0], of_results)
    assert_close(actual[1], expected[1], of_rows, expected[2])
