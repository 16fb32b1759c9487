"""row_extrema against its definition: values, places, gradients, ties, and scores shared with masked_lse."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.pairs import Head, PairMask
from fastret.backends.registry import Call
from fastret.backends.tiled import masked_lse as tiled
from fastret.ops import masked_lse, pair_sums, row_extrema
from fastret.ops.heads import flatten

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("row_extrema", "cpu", torch.float32)) is None
]
EVERY = ["reference", *FUSED]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and a tail on both axes at test sizes."""
    monkeypatch.setattr(tiled, "ROWS", 16)
    monkeypatch.setattr(tiled, "COLUMNS", 24)


def labels(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))


def uniform(count: int, seed: int = 2) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


MASKS: dict[str, Callable[[int, int], PairMask]] = {
    "any": lambda n, m: PairMask(),
    "same, not self": lambda n, m: PairMask(same=(labels(n), labels(m, 3)), offset=0),
    "different": lambda n, m: PairMask(different=(labels(n), labels(m, 3))),
    "distinct, wrapped offset": lambda n, m: PairMask(distinct=(labels(n), labels(m, 4)), offset=-2, period=max(n, m)),
    "between": lambda n, m: PairMask(above=-uniform(n), below=uniform(n, 4)),
    "none": lambda n, m: PairMask(same=(torch.zeros(n).long(), torch.ones(m).long())),
}


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("kind", ["min", "max"])
def test_is_the_definition(impl: str, kind: str) -> None:
    """One pair at a time."""
    x, y, own, others = torch.randn(6, 3, dtype=F64), torch.randn(9, 3, dtype=F64), labels(6), labels(9, 3)
    own[4] = 17  # a row without a pair
    mask = PairMask(same=(own, others))
    ((value, index),) = row_extrema(x, y, extrema=[(kind, mask)], first_column=5, impl=impl)
    for i, a in enumerate(x.tolist()):
        scores = {
            j: sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            for j, b in enumerate(y.tolist())
            if own[i] == others[j]
        }
        if not scores:
            assert (value[i].item(), index[i].item()) == (math.inf if kind == "min" else -math.inf, -1)
            continue
        place = (min if kind == "min" else max)(scores, key=lambda j: scores[j])
        assert index[i] == place + 5
        assert value[i].item() == pytest.approx(scores[place], rel=1e-12)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("small_tiles")
def test_float64_equals_reference(impl: str, mask: str) -> None:
    for n, m, d, normalize in ((33, 50, 7, True), (40, 0, 5, True), (3, 70, 9, False), (65, 2, 2, True), (7, 0, 3, 0)):
        x, y = torch.randn(n, d, dtype=F64), torch.randn(m, d, dtype=F64) if m else None
        extrema = [("min", MASKS[mask](n, m or n)), ("max", MASKS[mask](n, m or n)), ("max", PairMask(offset=0))]
        leaves = [t.requires_grad_() for t in (x, y) if t is not None]
        expected, actual = (
            row_extrema(x, y, extrema=extrema, normalize=bool(normalize), impl=i) for i in ("reference", impl)
        )
        gradients = []
        for results in (expected, actual):
            total = sum(
                (torch.where(v.isinf(), 0, v) * torch.linspace(-1, k + 1, n, dtype=F64)).sum()
                for k, (v, _) in enumerate(results)
            )
            gradients.append(torch.autograd.grad(total, leaves))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_of_equals_the_first(impl: str, gallery: bool) -> None:
    """Whatever the order of the tiles: every row stands there many times, exactly."""
    rows = torch.eye(4)[torch.arange(600) % 4]
    x, y = (rows[:50], rows) if gallery else (rows, None)
    (low, (low_at)), (high, high_at) = row_extrema(
        x, y, extrema=[("min", PairMask()), ("max", PairMask(offset=0))], normalize=False, impl=impl
    )
    i = torch.arange(len(x))
    assert not low.any()
    assert (high == 1).all()
    assert torch.equal(low_at, (i % 4 == 0).long())
    assert torch.equal(high_at, torch.where(i < 4, i + 4, i % 4))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("n", [63, 257, 700])
@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_are_those_of_masked_lse(impl: str, dtype: torch.dtype, n: int, gallery: bool, normalize: bool) -> None:
    """A threshold at an extremum excludes exactly it, in forward and in backward of any head over the same rows."""
    x, y = torch.randn(n, 40).to(dtype), torch.randn(n + 30, 40).to(dtype) if gallery else None
    x.requires_grad_()
    m = n if y is None else len(y)
    others = PairMask() if gallery else PairMask(offset=0)
    options = {"normalize": normalize, "impl": impl}
    (high, place), (low, _) = row_extrema(x, y, extrema=[("max", others), ("min", others)], **options)
    wide = high.dtype
    high, low = high.detach(), low.detach()
    inner = others & PairMask(above=low, below=high)
    beyond = others & PairMask(above=high)
    heads = [Head(0.0, mask) for mask in (others, inner, beyond)]  # lse of zeros: log of the number of pairs
    (everything, _), (within, _), (none, _) = masked_lse(x, y, heads=heads, **options)
    assert (everything.exp().round() == m - (not gallery)).all()
    assert (within.exp().round() == m - (not gallery) - 2).all()
    assert none.isneginf().all()
    # the only pair not below the extremum is the extremum: backward's mask is forward's
    nearest = torch.nextafter(high, torch.full_like(high, -math.inf))
    mask, stat = PairMask(above=nearest) & others, torch.full((n,), -99.0, dtype=wide)
    sums = pair_sums(x, y, phi="hinge", row_stat=stat, mask=mask, **options)
    torch.testing.assert_close(sums, high + 99, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(sums.sum(), x)
    again = row_extrema(x, y, extrema=[("max", others)], **options)[0]
    (expected,) = torch.autograd.grad(again[0].sum(), x)
    assert torch.equal(again[1], place)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", FUSED)
def test_pieces_of_the_columns_merge(impl: str) -> None:
    x, y = torch.randn(20, 5), torch.randn(31, 5)
    extrema = [("max", PairMask(offset=3))]
    ((value, index),) = row_extrema(x, y, extrema=extrema, impl=impl)
    parts = [
        row_extrema(x, y[a:b], extrema=extrema, first_column=a, impl=impl)[0] for a, b in ((0, 12), (12, 13), (13, 31))
    ]
    values, indices = torch.stack([v for v, _ in parts]), torch.stack([i for _, i in parts])
    best = values.argmax(0, keepdim=True)
    torch.testing.assert_close(values.gather(0, best)[0], value)
    assert torch.equal(indices.gather(0, best)[0], index)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65])
def test_sizes(impl: str, n: int) -> None:
    for m in (0, 1, 65):
        x, y = torch.randn(n, 3, requires_grad=True), torch.randn(m, 3, requires_grad=True)
        (low, at), (high, _) = row_extrema(x, y, extrema=[("min", PairMask()), ("max", PairMask())], impl=impl)
        assert low.shape == at.shape == high.shape == (n,)
        if m == 0:
            assert low.isposinf().all()
            assert high.isneginf().all()
            assert (at == -1).all()
            continue
        dx, dy = torch.autograd.grad(low.sum() + high.sum(), (x, y))
        assert dx.shape == (n, 3)
        assert dy.isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_any_strides(impl: str, layout: str) -> None:
    full = torch.randn(41, 41, dtype=F64)
    x = {"transposed": full[:20, :7].T.contiguous().T, "strided": full[:20, :14:2], "offset": full[20:40, 8:15]}[layout]
    extrema = [("max", PairMask(offset=0))]
    expected = row_extrema(x.contiguous(), extrema=extrema, impl="reference")
    torch.testing.assert_close(row_extrema(x, extrema=extrema, impl=impl), expected)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["x", "y"])
def test_bad_values_are_never_hidden(impl: str, bad: float, side: str) -> None:
    x, y = torch.randn(8, 4), torch.randn(9, 4)
    (x if side == "x" else y)[3, 1] = bad
    for value, _ in row_extrema(x, y, extrema=[("min", PairMask()), ("max", MASKS["none"](8, 9))], impl=impl):
        assert value.isnan().all()


OWN, OTHERS = labels(6), labels(9, 3)


def loss(x: Tensor, y: Tensor, impl: str) -> Tensor:
    mask = PairMask(same=(OWN, OTHERS))
    results = row_extrema(x, y, extrema=[("min", mask), ("max", PairMask(offset=1))], impl=impl)
    return sum(torch.where(v.isinf(), 0, v).sin().sum() for v, _ in results)


@pytest.mark.parametrize("impl", FUSED)
def test_what_pytorch_expects(impl: str) -> None:
    x, y = torch.randn(6, 4, dtype=F64, requires_grad=True), torch.randn(9, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, impl), (x, y))
    (gradient,) = torch.autograd.grad(loss(x, y, impl), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()
    flat = flatten([Head(mask=PairMask(offset=1, above=uniform(6)), reduce="max")], F64)
    for gallery in (y.detach(), None):
        problem = (x.detach(), gallery, flat.tensors, flat.numbers, flat.factors, flat.spec, True, 2, impl)
        torch.library.opcheck(torch.ops.fastret.row_extrema.default, problem)


@pytest.mark.parametrize("impl", FUSED)
def test_compiles_and_transforms(impl: str) -> None:
    x, y = torch.randn(6, 4, dtype=F64, requires_grad=True), torch.randn(9, 4, dtype=F64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: loss(a, b, impl), fullgraph=True, backend="aot_eager")
    value, expected = compiled(x, y), loss(x, y, impl)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y)))
    batch, other = torch.randn(3, 6, 4, dtype=F64), y.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one = torch.func.grad(lambda a: loss(a, other, impl))
        singles = torch.stack([one(a) for a in batch])
        torch.testing.assert_close(torch.vmap(one)(batch), singles)
    reference = torch.func.grad(lambda a: loss(a, other, "reference"))
    torch.testing.assert_close(singles, torch.stack([reference(a) for a in batch]))


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: row_extrema(X, extrema=[("mean", PairMask())]), ValueError, r"extrema\[0\]: expected 'min' or 'max'"),
        (lambda: row_extrema(X, extrema=[]), ValueError, "expected at least one"),
        (lambda: row_extrema(X, X[:, :2], extrema=[("min", PairMask())]), ValueError, "y: expected 3 columns"),
        (lambda: row_extrema(X, extrema=[("min", PairMask(above=X[:2, 0]))]), ValueError, "mask.above: expected shape"),
        (
            lambda: row_extrema(X, extrema=[("min", PairMask())], first_column=-1),
            ValueError,
            "first_column: expected at least 0",
        ),
    ],
)
def test_bad_input_names_the_argument(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("impl", EVERY)
def test_gradients_of_a_gallery_without_rows(impl: str) -> None:
    x, y = torch.randn(4, 8, requires_grad=True), torch.randn(0, 8, requires_grad=True)
    for kind in ("max", "min"):
        ((value, index),) = row_extrema(x, y, extrema=[(kind, PairMask())], impl=impl)
        assert value.isinf().all()
        assert (index == -1).all()
        dx, dy = torch.autograd.grad(value.sum(), [x, y])
        assert dx.shape == x.shape
        assert dx.count_nonzero() == 0
        assert dy.shape == y.shape
