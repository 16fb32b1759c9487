"""pair_sums against its definition: values, gradients, floors, and what PyTorch expects of an operator."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastret.backends import phi as functions
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import masked_lse as tiled
from fastret.ops import Head, PairMask, Shifted, masked_lse, masked_lse_sum, pair_sums
from fastret.ops.heads import flatten

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]


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
    "same": lambda n, m: PairMask(same=(labels(n), labels(m, 3))),
    "different": lambda n, m: PairMask(different=(labels(n), labels(m, 3)), offset=0),
    "between": lambda n, m: PairMask(above=-uniform(n), below=uniform(n, 4)),
    "none": lambda n, m: PairMask(same=(torch.zeros(n).long(), torch.ones(m).long())),
}


def by_hand(phi: str, z: float) -> float:
    return {
        "log1m_exp": lambda: math.log1p(-math.exp(z)),
        "hinge": lambda: max(0.0, z),
        "distance": lambda: math.sqrt(-z),
        "inverse_distance": lambda: 1 / math.sqrt(-z),
    }[phi]()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("phi", functions.NAMES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_is_the_definition(impl: str, phi: str, masked: bool, normalize: bool) -> None:
    """One term at a time."""
    x, y = torch.randn(5, 3, dtype=F64) / 2, torch.randn(7, 3, dtype=F64) / 2
    own, others, stat, bias = labels(5), labels(7, 3), uniform(5) + 9, uniform(7)
    if phi == "hinge":
        stat = stat - 9
    mask = PairMask(same=(own, others)) if masked else None
    options = {"scale": 1.5, "mask": mask, "row_stat": stat, "column_bias": bias, "normalize": normalize}
    sums = pair_sums(x, y, phi=phi, impl=impl, **options)
    for i, a in enumerate(x.tolist()):
        total = 0.0
        for j, b in enumerate(y.tolist()):
            if masked and own[i] != others[j]:
                continue
            score = sum(p * q for p, q in zip(a, b, strict=True))
            score /= math.hypot(*a) * math.hypot(*b) if normalize else 1
            total += by_hand(phi, 1.5 * score + float(bias[j]) - float(stat[i]))
        assert sums[i].item() == pytest.approx(total, rel=1e-12)


def values_and_gradients(
    x: Tensor, y: Tensor | None, head: Head, normalize: bool, impl: str, others: tuple[Head, ...] = ()
) -> list[Tensor]:
    """Results of the head (and of others beside it), and the gradients of a random linear form of them."""
    x, y = (None if t is None else t.detach().clone().requires_grad_() for t in (x, y))
    wide = F64 if x.dtype == F64 else torch.float32
    learned = {
        name: value.detach().to(wide).clone().requires_grad_()
        for name in ("scale", "row_bias", "column_bias")
        if isinstance(value := getattr(head, name), Tensor)
    }
    heads = [replace(head, **learned), *others]
    results = [t for pair in masked_lse(x, y, heads=heads, normalize=normalize, impl=impl) for t in pair]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(r.shape, generator=generator, dtype=F64).to(r.dtype) for r in results]
    total = sum((w * r).sum() for w, r in zip(weights, results, strict=True))
    inputs = [x, *([] if y is None else [y]), *learned.values()]
    return [*(r.detach() for r in results), *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("phi", functions.NAMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.usefixtures("small_tiles")
def test_float64_equals_reference(impl: str, phi: str, mask: str, axis: str) -> None:
    for n, m, d, normalize in ((33, 50, 7, True), (40, 0, 5, True), (3, 70, 9, False), (65, 2, 1, True), (7, 0, 3, 0)):
        x, y = torch.randn(n, d, dtype=F64) / 2, torch.randn(m, d, dtype=F64) / 2 if m else None
        m = m or n
        # what the target adds must not see phi
        target, stat = Shifted(1), (uniform(n) if phi == "hinge" else uniform(n) + 20)
        scale = torch.tensor(1.5, dtype=F64)
        head = Head(scale, MASKS[mask](n, m), target, 0.2, -stat, uniform(m), axis, reduce=phi)
        expected = values_and_gradients(x, y, head, bool(normalize), "reference")
        actual = values_and_gradients(x, y, head, bool(normalize), impl)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("gallery", [True, False])
def test_beside_a_log_sum_exp(impl: str, gallery: bool) -> None:
    x, y = torch.randn(20, 6, dtype=F64), torch.randn(31, 6, dtype=F64) if gallery else None
    head = Head(torch.tensor(2.0, dtype=F64), PairMask(offset=0), row_bias=-uniform(20) - 3, reduce="log1m_exp")
    others = Head(3.0, target=Shifted()), Head(1.0, row_bias=uniform(20), axis="column", reduce="hinge")
    expected, actual = (values_and_gradients(x, y, head, True, i, others) for i in ("reference", impl))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("phi", functions.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_dense_torch(impl: str, phi: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(40, 32).to(dtype), torch.randn(90, 32).to(dtype)
    stat = uniform(40).float() + (0 if phi == "hinge" else 2.5)

    def run(x: Tensor, y: Tensor, impl: str | None) -> list[Tensor]:
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        if impl is None:
            unit = torch.nn.functional.normalize
            r = functions.value(phi, 2 * (unit(a) @ unit(b).T) - stat[:, None].to(dtype)).sum(1)
        else:
            r = pair_sums(a, b, phi=phi, row_stat=stat, scale=2.0, impl=impl)
        return [r.detach(), *torch.autograd.grad((r * torch.linspace(-1, 1, 40).to(r.dtype)).sum(), (a, b))]

    for ours, naive, truth in zip(
        run(x, y, impl), run(x, y, None), run(x.to(F64), y.to(F64), "reference"), strict=True
    ):
        error, bound = (ours.to(F64) - truth).abs().max(), 2 * (naive.to(F64) - truth).abs().max()
        assert error <= bound + 4 * torch.finfo(ours.dtype).eps * truth.abs().max()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("phi", functions.NAMES)
@pytest.mark.parametrize("m", [31, 3000, None], ids=["batch", "windows", "itself"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_sweep_form(impl: str, phi: str, m: int | None, smoothing: float) -> None:
    x, y, stat = torch.randn(20, 400, dtype=F64), None, uniform(20) + 3
    stat.requires_grad_()
    sides = [x.requires_grad_()]
    if m is not None:
        y = torch.randn(m, 400, dtype=F64, requires_grad=True)
        sides.append(y)
    weight = uniform(20, 9)
    head = Head(2.0, MASKS["same"](20, m or 20), Shifted(2), smoothing, row_bias=-stat, reduce=phi)
    results = [masked_lse_sum(x, y, head=head, row_weight=weight, impl=i) for i in ("reference", impl)]
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(masked_lse_sum(x, y, head=head, row_weight=weight, impl=impl), results[0])
    torch.testing.assert_close(*(torch.autograd.grad(r, [*sides, stat]) for r in results))


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_floors(impl: str, dtype: torch.dtype) -> None:
    """Rows that coincide, and probabilities that round to 1: finite, with the documented values and slopes."""
    eps = torch.finfo(dtype).eps
    x = torch.eye(3, dtype=dtype)[[0, 0, 1]].requires_grad_()
    half = {"scale": 2.0, "mask": PairMask(offset=0), "row_stat": torch.full((3,), 2.0), "normalize": False}
    for phi, near, far in (("distance", 0.0, 2**0.5), ("inverse_distance", (32 * eps) ** -0.5, 2**-0.5)):
        sums = pair_sums(x, phi=phi, impl=impl, **half)
        expected = torch.tensor([near + far, near + far, 2 * far], dtype=dtype)
        torch.testing.assert_close(sums, expected)
        (gradient,) = torch.autograd.grad(sums.sum(), x)
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient[0], gradient[1])  # nothing from the pair without a direction
    ones = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    for above in (0.0, 0.5, 2.0, 59.0, -eps / 4):
        sums = pair_sums(ones, phi="log1m_exp", row_stat=1 - torch.full((1,), above, dtype=dtype), impl=impl)
        torch.testing.assert_close(sums.item(), math.log(-math.expm1(-eps)), rtol=1e-6, atol=0)
        stat = torch.full((1,), 1 - above, dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(pair_sums(ones, phi="log1m_exp", row_stat=stat, impl=impl).sum(), stat)
        torch.testing.assert_close(gradient.item(), 1 / math.expm1(eps), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("phi", ["distance", "inverse_distance"])
@pytest.mark.parametrize("d", [2, 16, 128, 1000])
def test_equal_rows_have_no_direction(impl: str, phi: str, d: int) -> None:
    """Cosines of equal rows come out as 1 to a few units in the last place: no slope is made of those."""
    x = torch.randn(40, d).repeat_interleave(2, 0).requires_grad_()
    image = torch.arange(80) // 2
    mask = PairMask(same=(image, image), offset=0)
    sums = pair_sums(x, phi=phi, scale=2.0, row_stat=torch.full((80,), 2.0), mask=mask, impl=impl)
    assert not torch.autograd.grad(sums.sum(), x)[0].any()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("phi", functions.NAMES)
def test_masked_pairs_add_nothing(impl: str, phi: str) -> None:
    """Also where phi has no number for them, and whatever gradient arrives at a row without a pair."""
    x, y = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    bias = torch.tensor([0.0, 0, 0, 0, 0, -math.inf])
    mask = PairMask(same=(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 7, 7])))
    sums = pair_sums(x, y, phi=phi, row_stat=torch.full((6,), 3.0), column_bias=bias, mask=mask, impl=impl)
    assert sums.isfinite().all()
    assert not sums[4:].any()
    for upstream in (1.0, math.inf, math.nan):
        dx, dy = torch.autograd.grad(sums, (x, y), torch.tensor([1.0] * 4 + [upstream] * 2), retain_graph=True)
        assert not dx[4:].any()
        assert not dy[4:].any()
        assert dx.isfinite().all()
        assert dy.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("phi", functions.NAMES)
@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65])
def test_sizes(impl: str, phi: str, n: int) -> None:
    for m in (0, 1, 65):
        x, y = torch.randn(n, 3, dtype=F64, requires_grad=True), torch.randn(m, 3, dtype=F64, requires_grad=True)
        sums = pair_sums(x, y, phi=phi, row_stat=uniform(n) + 2, impl=impl)
        assert sums.shape == (n,)
        expected = pair_sums(x, y, phi=phi, row_stat=uniform(n) + 2, impl="reference")
        torch.testing.assert_close(sums, expected)
        pairs = (torch.autograd.grad(s.sin().sum(), (x, y)) for s in (sums, expected))
        torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("impl", FUSED)
def test_pieces_of_the_columns_add(impl: str) -> None:
    x, y, stat = torch.randn(20, 5, dtype=F64), torch.randn(31, 5, dtype=F64), uniform(20) + 1
    options = {"phi": "log1m_exp", "row_stat": stat, "impl": impl, "columns": 31, "mask": PairMask(offset=3, period=31)}
    whole = pair_sums(x, y, **options)
    parts = sum(pair_sums(x, y[a:b], first_column=a, **options) for a, b in ((0, 12), (12, 13), (13, 31)))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("phi", functions.NAMES)
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_what_arrives_where_no_pair_is_allowed_counts_nothing(impl: str, phi: str, axis: str, upstream: float) -> None:
    """Nor what arrives at a line that has pairs where it has none."""
    one, two = torch.tensor([0, 0, 1, 1, 2, 5]), torch.tensor([0, 1, 1, 0, 7, 7])
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)
    learned = [torch.tensor(1.5, dtype=F64), -uniform(6) - 9, uniform(6)]

    def gradients(arriving: list[float]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y, *learned)]
        scale, row_bias, column_bias = leaves[2:]
        head = Head(scale, PairMask(same=(one, two)), None, 0.0, row_bias, column_bias, axis, reduce=phi)
        ((total, _),) = masked_lse(*leaves[:2], heads=[head], impl=impl)
        return list(torch.autograd.grad(total, leaves, torch.tensor(arriving, dtype=F64)))

    expected = gradients([1.0] * 6)
    torch.testing.assert_close(gradients([1.0] * 4 + [upstream] * 2), expected, rtol=0, atol=0)
    dx, dy, *_ = gradients([1.0] * 2 + [upstream] * 4)  # lines 2 and 3 have pairs: rows with columns 1 and 2 only
    of_lines, of_others = (dx, dy) if axis == "row" else (dy, dx)
    apart = torch.tensor([0, 3, 4, 5] if axis == "row" else [4, 5])
    torch.testing.assert_close(of_others[apart], (expected[1] if axis == "row" else expected[0])[apart], rtol=0, atol=0)
    assert of_lines[:2].isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_any_strides(impl: str, layout: str) -> None:
    full = torch.randn(41, 41, dtype=F64)
    x = {"transposed": full[:20, :7].T.contiguous().T, "strided": full[:20, :14:2], "offset": full[20:40, 8:15]}[layout]
    stat = (uniform(40) + 2)[::2]
    expected = pair_sums(x.contiguous(), phi="distance", row_stat=stat.clone(), impl="reference")
    torch.testing.assert_close(pair_sums(x, phi="distance", row_stat=stat, impl=impl), expected)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("phi", functions.NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_are_never_hidden(impl: str, phi: str, bad: float) -> None:
    x, y = torch.randn(8, 4), torch.randn(9, 4)
    y[3, 1] = bad
    mask = PairMask(distinct=(torch.zeros(8).long(), torch.zeros(9).long()))
    assert pair_sums(x, y, phi=phi, row_stat=torch.full((8,), 2.0), mask=mask, impl=impl).isnan().all()
    if phi != "hinge":
        y[3, 1] = 0
        assert pair_sums(x, y, phi=phi, row_stat=torch.full((8,), math.nan), impl=impl).isnan().all()


def loss(x: Tensor, y: Tensor, scale: Tensor, stat: Tensor, bias: Tensor, impl: str) -> Tensor:
    mask = PairMask(offset=1)
    options = {"row_stat": stat, "scale": scale, "column_bias": bias, "mask": mask, "impl": impl}
    return sum(pair_sums(x, y, phi=phi, **options).sin().sum() for phi in functions.NAMES)


def leaves(requires_grad: bool = True) -> list[Tensor]:
    """x, y, scale, row statistic, column bias: all logits below 0 except for some margin."""
    values = [torch.randn(6, 4, dtype=F64), torch.randn(9, 4, dtype=F64), torch.tensor(1.5, dtype=F64)]
    return [t.requires_grad_(requires_grad) for t in (*values, uniform(6) + 3, uniform(9))]


@pytest.mark.parametrize("impl", FUSED)
def test_what_pytorch_expects(impl: str) -> None:
    inputs = leaves()
    assert torch.autograd.gradcheck(lambda *a: loss(*a, impl), inputs)
    (gradient,) = torch.autograd.grad(loss(*inputs, impl), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()
    x, y, scale, stat, bias = leaves(requires_grad=False)
    for phi in functions.NAMES:
        flat = flatten([Head(scale, PairMask(offset=1), row_bias=-stat, column_bias=bias, reduce=phi)], F64)
        problem = (x, y, flat.scale, flat.row_bias, flat.column_bias, flat.tensors, flat.numbers, flat.factors)
        options = (flat.spec, True, 0, 9, 1, None, impl)
        torch.library.opcheck(torch.ops.fastret.masked_lse.default, (*problem, *options))
        results = torch.ops.fastret.masked_lse.default(*problem, *options)
        backward = ([torch.ones_like(r) for r in results], results[::2], *problem, *options, [True] * 5)
        torch.library.opcheck(torch.ops.fastret.masked_lse_backward.default, backward)


@pytest.mark.parametrize("impl", FUSED)
def test_compiles_and_transforms(impl: str) -> None:
    inputs = leaves()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: loss(*a, impl), fullgraph=True, backend="aot_eager")
    value, expected = compiled(*inputs), loss(*inputs, impl)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))
    _, *others = leaves(requires_grad=False)
    batch = torch.randn(3, 6, 4, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one = torch.func.grad(lambda a: loss(a, *others, impl))
        singles = torch.stack([one(a) for a in batch])
        torch.testing.assert_close(torch.vmap(one)(batch), singles)
    reference = torch.func.grad(lambda a: loss(a, *others, "reference"))
    torch.testing.assert_close(singles, torch.stack([reference(a) for a in batch]))


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pair_sums(X, phi="square"), ValueError, "phi: expected one of log1m_exp, .*, got 'square'"),
        (lambda: pair_sums(X, phi="lse"), ValueError, "phi: expected one of"),
        (lambda: pair_sums(X, phi="hinge", row_stat=X[:2, 0]), ValueError, r"row_stat: expected shape \(4,\)"),
        (lambda: pair_sums(X, phi="hinge", row_stat=1.0), TypeError, "row_stat: expected a tensor"),
        (lambda: pair_sums(X, phi="hinge", row_stat=torch.ones(4).long()), TypeError, "row_stat: expected a floating"),
        (lambda: pair_sums(X[0], phi="hinge"), ValueError, r"x: expected shape \(rows, width\)"),
        (lambda: masked_lse(X, heads=[Head(reduce="min")]), ValueError, r"heads\[0\].reduce: expected 'lse' or one of"),
    ],
)
def test_bad_input_names_the_argument(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_a_hinge_is_flat_where_it_begins(impl: str) -> None:
    """Scores that equal the row's number, as the hardest of a row does: its slope there is 0."""
    x, stat = torch.eye(3, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)
    total = pair_sums(x, phi="hinge", row_stat=stat, normalize=False, impl=impl).sum()
    for gradient in torch.autograd.grad(total, [x, stat]):
        assert gradient.count_nonzero() == 0
