"""Feature widths of masked_lse in C++, from prefix sums of one product, against the definition; when they are not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu import masked_lse as kernels
from fastret.backends.cpu.array import array
from fastret.backends.pairs import Head, Indexed, Masked, PairMask, Shifted
from fastret.ops import masked_lse, masked_lse_sum

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


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(count: int, seed: int) -> Tensor:
    return torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))


def heads_of(n: int, m: int, widths: Sequence[int | None], dtype: torch.dtype = F64) -> list[Head]:
    """Two heads a width, rows and columns in turn, with everything that a head may learn."""
    wide = F64 if dtype == F64 else torch.float32
    learned = {
        "scale": torch.tensor(5.0, dtype=wide),
        "row_bias": normal(n, seed=1).to(wide),
        "column_bias": normal(m, seed=2).to(wide),
    }
    names = (labels(n, 3), labels(m, 4))
    target = Masked(PairMask(same=names), torch.linspace(0.1, 1, n, dtype=wide))
    heads = []
    for k, width in enumerate(widths):
        axis = ("row", "column")[k % 2]
        heads.append(Head(mask=PairMask(offset=0), target=target, width=width, axis=axis, **learned))
        heads.append(Head(3.0 + k, PairMask(different=names), Indexed(torch.arange(n) % m), 0.1, width=width))
    return heads


def differentiated(
    x: Tensor, y: Tensor | None, heads: Sequence[Head], impl: str, dtype: torch.dtype, normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients that a fixed upstream gives to x, y and what heads learn, in float64."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype, copy=True).requires_grad_()

    sides = [leaf(t) for t in (x, y) if t is not None]
    wide = F64 if dtype == F64 else torch.float32
    heads = [
        replace(
            h,
            **{k: v.detach().to(wide, copy=True).requires_grad_() for k in LEARNED if (v := _tensor(h, k)) is not None},
        )
        for h in heads
    ]
    results = masked_lse(sides[0], sides[1] if len(sides) > 1 else None, heads=heads, normalize=normalize, impl=impl)
    loss = torch.zeros((), dtype=F64)
    for k, (lse, t) in enumerate(results):
        g, h = normal(len(lse), seed=20 + k), normal(len(t), seed=40 + k)
        loss = loss + (lse.masked_fill(lse.isinf(), 0) * g).sum() + (t * h).sum()
    leaves = [*sides, *(v for h in heads for k in LEARNED if (v := _tensor(h, k)) is not None)]
    gradients = torch.autograd.grad(loss, leaves)
    return [r.detach().to(F64) for pair in results for r in pair], [g.to(F64) for g in gradients]


LEARNED = ("scale", "row_bias", "column_bias")


def _tensor(head: Head, name: str) -> Tensor | None:
    value = getattr(head, name)
    return value if isinstance(value, Tensor) else None


def check(x: Tensor, y: Tensor | None, heads: Sequence[Head], bound: float, normalize: bool = True) -> None:
    """Against the definition in float64, each row's gradient on its own scale."""
    actual = differentiated(x, y, heads, "cpu", x.dtype, normalize)
    expected = differentiated(x, y, heads, "reference", F64, normalize)
    half = torch.finfo(x.dtype).eps if x.dtype in (torch.bfloat16, torch.float16) else 0.0
    for parts, wanted, rounding in ((actual[0], expected[0], 0.0), (actual[1], expected[1], half)):
        for a, w in zip(parts, wanted, strict=True):
            finite = torch.where(w.isfinite(), w, 0).abs()
            scale = 1 + (finite.amax(1, keepdim=True) if w.dim() == 2 else finite.max())
            torch.testing.assert_close(a / scale, w / scale, rtol=0, atol=bound + rounding)


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
    x, y = normal(333, 37, seed=7).to(dtype), None if gallery is None else normal(gallery, 37, seed=8).to(dtype)
    check(x, y, heads_of(333, gallery or 333, (5, 16, None), dtype), BOUNDS[dtype])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("widths", [(1, 2), (8, 3, None, 12), (3, 11), (12, 5), tuple(range(1, 13))], ids=str)
@pytest.mark.parametrize(("n", "m"), [(61, None), (61, 7), (1, 70), (33, 290)])
def test_any_order_of_widths(widths: tuple[int | None, ...], n: int, m: int | None, normalize: bool) -> None:
    """Also 12 beside None, which are one level, and none as wide as the rows. The gradient of a unit row of one feature
    is 0, the rest of what 1 / norm makes larger than others."""
    x, y = normal(n, 12, seed=7), None if m is None else normal(m, 12, seed=8)
    check(x, y, heads_of(n, m or n, widths), 1e-11 if 1 in widths else 1e-12, normalize)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("m", [None, 0, 1])
def test_next_to_no_rows(n: int, m: int | None) -> None:
    x, y = normal(n, 12, seed=7), None if m is None else normal(m, 12, seed=8)
    heads = [Head(2.0, PairMask(offset=0), Shifted(1), width=w) for w in (3, None)]
    results = masked_lse(x, y, heads=heads, impl="cpu")
    for pair, wanted in zip(results, masked_lse(x, y, heads=heads, impl="reference"), strict=True):
        torch.testing.assert_close(pair, wanted)


@pytest.mark.parametrize("side", ["x", "y", "both"])
def test_one_side_alone(side: str) -> None:
    """The gradient of one side does not depend on whether the other's is wanted."""
    x, y = normal(61, 12, seed=7), normal(70, 12, seed=8)
    heads = [Head(4.0, target=Shifted(2), width=w) for w in (3, 8, None)]

    def gradients(wanted: str) -> dict[str, Tensor]:
        leaves = {"x": x.clone(), "y": y.clone()}
        for name in leaves if wanted == "both" else [wanted]:
            leaves[name].requires_grad_()
        results = masked_lse(*leaves.values(), heads=heads, impl="cpu")
        sum((lse - t).sum() for lse, t in results).backward()
        return {name: t.grad for name, t in leaves.items() if t.grad is not None}

    both = gradients("both")
    for name, gradient in gradients(side).items():
        assert torch.equal(gradient, both[name])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gallery", [None, 300])
def test_masks_by_score_are_the_same_in_both_directions(gallery: int | None, normalize: bool) -> None:
    """Every bound is some pair's score to the last bit or so. The probabilities that backward finds add up to 1, as
    the gradient of a row's bias, only if it allows the pairs that forward did."""
    m = gallery or 280
    x, y = normal(280, 40, seed=7).float(), None if gallery is None else normal(m, 40, seed=8).float()
    other = x if y is None else y
    bias = torch.zeros(280, requires_grad=True)
    heads = []
    for width in (7, 24, None):
        u, v = x[:, :width], other[:, :width]
        if normalize:
            u, v = torch.nn.functional.normalize(u), torch.nn.functional.normalize(v)
        bound = (u @ v.T)[torch.arange(280), (torch.arange(280) + 5) % m]
        heads.append(Head(0.5, PairMask(below=bound), row_bias=bias, width=width))
    results = masked_lse(x.requires_grad_(), y, heads=heads, normalize=normalize, impl="cpu")
    for lse, _ in results:
        some = lse.isfinite().float()
        (gradient,) = torch.autograd.grad(lse.masked_fill(lse.isinf(), 0).sum(), bias, retain_graph=True)
        torch.testing.assert_close(gradient, some, rtol=0, atol=1e-5)


def with_prefix(rows: Tensor, factor: float) -> Tensor:
    """Every third row with its first four features scaled, one row of zeros."""
    rows = rows.clone()
    rows[::3, :4] *= factor
    rows[1] = 0
    return rows


@pytest.mark.parametrize(("factor", "shared"), [(1.0, True), (1e-4, True), (1e-7, False), (1e-25, False), (0.0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("gallery", [None, 70])
def test_short_prefixes(factor: float, shared: bool, dtype: torch.dtype, gallery: int | None) -> None:
    x = with_prefix(normal(61, 12, seed=7), factor).to(dtype)
    y = None if gallery is None else with_prefix(normal(gallery, 12, seed=8), factor).to(dtype)
    heads = [Head(4.0, target=Shifted(1), width=w) for w in (4, 9, None)]
    assert (len(kernels._shares(x, y, heads, True)) == 1) == shared
    assert len(kernels._shares(x, y, heads, False)) == 1
    check(x, y, heads, {torch.float32: 1e-4, F64: 1e-11}[dtype])


@pytest.mark.parametrize("norm", [3e-13, 1.5e-12, 3e-12, 1e-9, 1e-3, 1e10, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_about_the_shortest_norm_and_large_ones(norm: float, dtype: torch.dtype) -> None:
    """Prefixes are divided by their own norms, or by the smallest that counts, whatever the whole row's is."""
    x, y = torch.nn.functional.normalize(normal(61, 12, seed=7)).to(dtype), normal(70, 12, seed=8).to(dtype)
    x[::2] *= norm
    heads = [Head(4.0, target=Shifted(1), width=w) for w in (4, 9, None)]
    check(x, y, heads, {torch.float32: 1e-4, F64: 1e-11}[dtype])
    check(y, x, [replace(h, axis="column") for h in heads], {torch.float32: 1e-4, F64: 1e-11}[dtype])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("feature", [0, 11])
def test_nan_and_infinity_are_never_hidden(bad: float, normalize: bool, feature: int) -> None:
    """Nor by heads that see none of the bad feature's products."""
    x, y = normal(40, 12, seed=7).float(), normal(50, 12, seed=8).float()
    y[3, feature] = bad
    heads = [Head(width=4), Head(width=12, axis="column")]
    (lse, t), (column_lse, column_t) = masked_lse(x, y, heads=heads, normalize=normalize, impl="cpu")
    assert all(r.isnan().all() for r in (lse, t, column_lse, column_t))
    (narrow,) = masked_lse(x, y, heads=heads[:1], normalize=normalize, impl="cpu")
    assert all(r.isnan().all() for r in narrow)
    assert masked_lse_sum(x, y, head=heads[0], row_weight=torch.ones(40), normalize=normalize, impl="cpu").isnan()


def test_runs_are_equal_bit_for_bit() -> None:
    torch.set_num_threads(2)
    for y in (None, normal(700, 24, seed=8).float()):
        x = normal(600, 24, seed=7).float()
        heads = heads_of(600, 700 if y is not None else 600, (5, 16, None), torch.float32)
        first, *others = (differentiated(x, y, heads, "cpu", torch.float32, True) for _ in range(4))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*other[0], *other[1]), strict=True))


@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(gallery: bool, normalize: bool) -> None:
    x, y = normal(9, 7, seed=7).requires_grad_(), normal(11, 7, seed=8).requires_grad_()
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def program(x: Tensor, y: Tensor, scale: Tensor) -> list[Tensor]:
        heads = [
            Head(scale, PairMask(offset=0), Shifted(1), width=w, axis=a) for w in (2, 5, 7) for a in ("row", "column")
        ]
        given = y if gallery else None
        return [r for pair in masked_lse(x, given, heads=heads, normalize=normalize, impl="cpu") for r in pair]

    assert torch.autograd.gradcheck(program, (x, y, scale))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([(4, 1)], "levels: expected the last to be as wide as the rows"),
        ([(4, 1), (8, 2)], "levels: expected the last to be as wide as the rows, and a level for each head"),
        ([(8, 1), (8, 1)], "levels: expected ascending widths"),
        ([(0, 1), (8, 1)], "levels: expected ascending widths"),
        ([(4, 2), (8, 0)], "levels: expected ascending widths, and heads for each"),
        ([(4, -1), (8, 3)], "levels: expected ascending widths, and heads for each"),
    ],
)
def test_levels_that_do_not_fit_the_call(levels: list[tuple[int, int]], message: str) -> None:
    x = torch.ones(40, 8)
    head = kernels._head(Head(), 40)
    results = [(array(torch.empty(40)), array(torch.empty(40))) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        _C.masked_lse_forward(array(x), None, [head, head], levels, True, 0, 1, results, (1, 0.0))
