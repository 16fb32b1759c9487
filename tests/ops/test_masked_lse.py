"""masked_lse against its definition: values, gradients, precision, and what PyTorch expects of an operator."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import masked_lse as tiled
from fastret.ops import (
    Circulant,
    Dense,
    Head,
    Indexed,
    Listed,
    Masked,
    PairMask,
    Shifted,
    masked_lse,
    masked_lse_sum,
)

F64 = torch.float64
# only those that exist and load here: an implementation is tested as soon as it serves the op
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


def labels(count: int, classes: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


MASKS: dict[str, Callable[[int, int], PairMask]] = {
    "any": lambda n, m: PairMask(),
    "same": lambda n, m: PairMask(same=(labels(n), labels(m, seed=3))),
    "different": lambda n, m: PairMask(different=(labels(n).to(torch.uint8), labels(m, seed=3).to(torch.int16))),
    "distinct": lambda n, m: PairMask(distinct=(labels(n, 9), labels(m, 9, seed=3))),
    "not self": lambda n, m: PairMask(offset=0),
    "offset, wrapped": lambda n, m: PairMask(offset=3, period=max(n, m)),
    "above": lambda n, m: PairMask(above=uniform(n) - 0.4),
    "between": lambda n, m: PairMask(above=-uniform(n), below=uniform(n, seed=4)),
    "positives": lambda n, m: PairMask(same=(labels(n, 2), labels(m, 2, seed=3))) & PairMask(offset=0),
    "all at once": lambda n, m: (
        PairMask(different=(labels(n), labels(m, seed=3)), distinct=(labels(n, 9), labels(m, 9, seed=3)), offset=1)
        & PairMask(above=uniform(n) - 1, below=uniform(n) + 0.2)
    ),
}


def listed(n: int, m: int) -> Listed:
    """Up to four entries a row, some of the same index."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), labels(n, 5, seed=6).cumsum(0)])
    entries = int(offsets[-1])
    return Listed(offsets, labels(entries, min(m, 6), seed=8), uniform(entries, seed=9))


TARGETS: dict[str, Callable[[int, int], object]] = {
    "none": lambda n, m: None,
    "index": lambda n, m: Indexed(labels(n, m)),
    "shifted": lambda n, m: Shifted(2),
    "shifted, wrapped": lambda n, m: Shifted(5, max(n, m)),
    "same label": lambda n, m: Masked(
        PairMask(same=(labels(n), labels(m, seed=3)), offset=0), 1 / (1 + 9 * uniform(n))
    ),
    "circulant": lambda n, m: Circulant((-1, 0, 1), (0.3, 0.5, 0.2), min(n, m), 0),
    "circulant, offset": lambda n, m: Circulant((0, 2), (0.5, 0.5), min(n, 7), max(0, m - 7)),
    "dense": lambda n, m: Dense(uniform(n, m)),
    "listed": lambda n, m: listed(n, m),
}
AXES = ("row", "column")


def by_loops(x: Tensor, y: Tensor, head: Head, normalize: bool) -> tuple[list[float], list[float]]:
    """The definition, one term at a time; masks and targets written out anew."""

    def unit(row: list[float]) -> list[float]:
        length = math.sqrt(sum(v * v for v in row)) if normalize else 1.0
        return [v / length for v in row]

    rows, columns = ([unit(r[: head.width].tolist()) for r in t] for t in (x, y))
    n, m = len(rows), len(columns)
    score = [[sum(a * b for a, b in zip(r, c, strict=True)) for c in columns] for r in rows]

    def allowed(mask: PairMask, i: int, j: int) -> bool:
        moved = i + (mask.offset or 0)
        return not (
            (mask.same is not None and mask.same[0][i] != mask.same[1][j])
            or (mask.different is not None and int(mask.different[0][i]) == int(mask.different[1][j]))
            or (mask.distinct is not None and mask.distinct[0][i] == mask.distinct[1][j])
            or (mask.offset is not None and j == (moved % mask.period if mask.period else moved))
            or (mask.above is not None and not score[i][j] > mask.above[i])
            or (mask.below is not None and not score[i][j] < mask.below[i])
        )

    def target(i: int, j: int) -> float:
        y = head.target
        if isinstance(y, Indexed):
            return float(j == y.index[i])
        if isinstance(y, Shifted):
            return float(j == ((i + y.offset) % y.period if y.period else i + y.offset))
        if isinstance(y, Masked):
            return float(y.weight[i]) * allowed(y.mask, i, j)
        if isinstance(y, Circulant):
            places = [y.offset + (i + shift) % y.period for shift in y.shifts]
            return sum(w for place, w in zip(places, y.weights, strict=True) if place == j)
        if isinstance(y, Listed):
            entries = range(int(y.offsets[i]), int(y.offsets[i + 1]))
            return sum(float(y.weight[p]) for p in entries if y.index[p] == j)
        return float(y.weights[i, j]) if isinstance(y, Dense) else 0.0

    def logit(i: int, j: int) -> float:
        bias = 0 if head.row_bias is None else float(head.row_bias[i])
        return float(head.scale) * score[i][j] + bias + (0 if head.column_bias is None else float(head.column_bias[j]))

    lines = (
        [[(i, j) for j in range(m)] for i in range(n)]
        if head.axis == "row"
        else [[(i, j) for i in range(n)] for j in range(m)]
    )
    s = head.smoothing
    lse, t = [], []
    for line in lines:
        total = sum(math.exp(logit(i, j)) for i, j in line if allowed(head.mask, i, j))
        lse.append(math.log(total) if total else -math.inf)
        t.append(sum(((1 - s) * target(i, j) + s / m) * logit(i, j) for i, j in line))
    return lse, t


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", MASKS)
def test_reference_is_the_definition(mask: str, target: str, axis: str, normalize: bool) -> None:
    n, m = 9, 11
    x, y = torch.randn(n, 4, dtype=F64), torch.randn(m, 4, dtype=F64)
    extra = {"row_bias": uniform(n), "column_bias": uniform(m), "smoothing": 0.3, "width": 3} if normalize else {}
    head = Head(1.7, MASKS[mask](n, m), TARGETS[target](n, m), axis=axis, **extra)
    ((lse, t),) = masked_lse(x, y, heads=[head], normalize=normalize, impl="reference")
    expected = [torch.tensor(v, dtype=F64) for v in by_loops(x, y, head, normalize)]
    torch.testing.assert_close([lse, t], expected, rtol=1e-12, atol=1e-12)


def learned(heads: list[Head]) -> list[Tensor]:
    values = [getattr(h, name) for h in heads for name in ("scale", "row_bias", "column_bias")]
    return [v for v in values if isinstance(v, Tensor)]


def fresh(heads: list[Head], dtype: torch.dtype) -> list[Head]:
    """Copies whose scales and biases are leaves."""

    def leaf(v: object) -> object:
        return v.detach().to(dtype).clone().requires_grad_() if isinstance(v, Tensor) else v

    return [replace(h, scale=leaf(h.scale), row_bias=leaf(h.row_bias), column_bias=leaf(h.column_bias)) for h in heads]


def values_and_gradients(x: Tensor, y: Tensor | None, heads: list[Head], **options: object) -> list[Tensor]:
    """(lse, t) of each head, and the gradients of a random linear form of what is finite of them."""
    x = x.detach().clone().requires_grad_()
    y = None if y is None else y.detach().clone().requires_grad_()
    heads = fresh(heads, F64 if x.dtype == F64 else torch.float32)
    results = [t for pair in masked_lse(x, y, heads=heads, **options) for t in pair]
    generator = torch.Generator().manual_seed(7)
    total = x.new_zeros((), dtype=results[0].dtype)
    for r in results:
        weight = torch.randn(r.shape, generator=generator, dtype=F64).to(r.dtype)
        total = total + (weight * torch.where(r == -math.inf, 0, r)).sum()
    inputs = [x, *([] if y is None else [y]), *learned(heads)]
    gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in results), *gradients]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("small_tiles")
def test_float64_equals_reference(impl: str, mask: str, target: str, axis: str) -> None:
    for n, m, d, normalize in ((33, 50, 7, True), (40, 0, 5, False), (3, 70, 9, True), (65, 2, 1, False)):
        x, y = torch.randn(n, d, dtype=F64), torch.randn(m, d, dtype=F64) if m else None
        m = m or n
        head = Head(
            torch.tensor(2.5), MASKS[mask](n, m), TARGETS[target](n, m), 0.2, uniform(n), uniform(m) - 0.5, axis
        )
        expected = values_and_gradients(x, y, [head], normalize=normalize, impl="reference")
        actual = values_and_gradients(x, y, [head], normalize=normalize, impl=impl)
        for a, e in zip(actual, expected, strict=True):
            finite = e[e.isfinite()]
            scale = 1 + finite.abs().max().item() if finite.numel() else 1
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11 * scale)


def clip_heads(n: int, m: int) -> list[Head]:
    scale = torch.tensor(3.0)
    return [Head(scale, target=Shifted()), Head(scale, axis="column", target=Indexed(labels(n, m)))]


def similarity_heads(n: int, m: int) -> list[Head]:
    both = labels(n), labels(m, seed=3)
    return [Head(-2.0, PairMask(same=both, offset=0)), Head(5.0, PairMask(different=both), row_bias=uniform(n))]


def matryoshka_heads(n: int, m: int) -> list[Head]:
    return [Head(4.0, target=Indexed(labels(n, m)), width=w, smoothing=0.1) for w in (1, 4, None)]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("heads", [clip_heads, similarity_heads, matryoshka_heads])
@pytest.mark.parametrize("m", [0, 1, 49])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_heads_share_one_product(impl: str, heads: Callable[[int, int], list[Head]], m: int, normalize: bool) -> None:
    x, y = torch.randn(35, 8, dtype=F64), torch.randn(m, 8, dtype=F64) if m else None
    given = heads(35, m or 35)
    expected = values_and_gradients(x, y, given, normalize=normalize, impl="reference")
    actual = values_and_gradients(x, y, given, normalize=normalize, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [0, 90])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
@pytest.mark.usefixtures("small_tiles")
def test_low_precision_is_no_worse_than_dense_torch(impl: str, dtype: torch.dtype, m: int, scale: float) -> None:
    """|ours - float64| <= 2 |dense torch in the same dtype - float64| + a few units in the last place."""
    n = 70
    x, y = torch.randn(n, 32).to(dtype), torch.randn(m, 32).to(dtype) if m else None
    head = Head(scale, PairMask(offset=3), Indexed(labels(n, m or n)))
    truth = values_and_gradients(x.to(F64), None if y is None else y.to(F64), [head], impl="reference")
    ours = values_and_gradients(x, y, [head], impl=impl)

    def dense() -> list[Tensor]:
        a = x.clone().requires_grad_()
        b = a if y is None else y.clone().requires_grad_()
        unit = torch.nn.functional.normalize
        logits = unit(a) @ unit(b).T * scale
        mask = torch.arange(len(b)) != torch.arange(n)[:, None] + 3
        lse = torch.where(mask, logits, -math.inf).logsumexp(1)
        t = logits.gather(1, head.target.index[:, None])[:, 0]
        generator = torch.Generator().manual_seed(7)
        weights = [torch.randn(n, generator=generator, dtype=F64).to(lse.dtype) for _ in range(2)]
        gradients = torch.autograd.grad(weights[0] @ lse + weights[1] @ t, [a] if y is None else [a, b])
        return [lse.detach(), t.detach(), *gradients]

    for name, o, e, t in zip(("lse", "t", "dx", "dy"), ours, dense(), truth, strict=False):
        assert o.dtype == (torch.float32 if name in ("lse", "t") else dtype)
        error, naive = (o.to(F64) - t).abs().max(), (e.to(F64) - t).abs().max()
        assert error <= 2 * naive + 4 * torch.finfo(o.dtype).eps * t.abs().max(), (name, error.item(), naive.item())


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("axis", AXES)
def test_gradcheck_through_the_kernels(impl: str, axis: str) -> None:
    x, y, scale = torch.randn(7, 4, dtype=F64), torch.randn(9, 4, dtype=F64), torch.tensor(1.5, dtype=F64)
    row_bias, column_bias = uniform(7), uniform(9)
    mask, target = MASKS["positives"](7, 9), TARGETS["same label"](7, 9)

    def run(a: Tensor, b: Tensor | None, s: Tensor, r: Tensor, c: Tensor) -> list[Tensor]:
        ((lse, t),) = masked_lse(a, b, heads=[Head(s, mask, target, 0.1, r, c, axis)], impl=impl)
        return [torch.where(lse == -math.inf, 0, lse), t]

    leaves = [v.clone().requires_grad_() for v in (x, y, scale, row_bias, column_bias)]
    assert torch.autograd.gradcheck(run, leaves)
    itself = Head(3.0, PairMask(offset=0), Shifted(1, 7), axis=axis)
    assert torch.autograd.gradcheck(lambda a: masked_lse(a, heads=[itself], impl=impl)[0], (leaves[0],))


def test_reference_differentiates_twice() -> None:
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    head = Head(3.0, PairMask(offset=0), Shifted(1, 5))
    assert torch.autograd.gradgradcheck(lambda a: masked_lse(a, heads=[head], impl="reference")[0], (x,))


@pytest.mark.parametrize("impl", FUSED)
def test_only_requested_gradients(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.IMPLEMENTATIONS[impl].module("masked_lse")
    seen, backward = [], module.backward
    monkeypatch.setattr(module, "backward", lambda *a, need, **k: seen.append(need) or backward(*a, need=need, **k))
    values = [torch.randn(20, 6, dtype=F64), torch.randn(30, 6, dtype=F64), torch.tensor(2.0), uniform(20), uniform(30)]
    everything: list[Tensor] = []
    for wanted in [range(5), *([k] for k in range(5))]:
        x, y, s, r, c = leaves = [v.clone().requires_grad_(k in wanted) for k, v in enumerate(values)]
        ((lse, t),) = masked_lse(x, y, heads=[Head(s, target=Shifted(1), row_bias=r, column_bias=c)], impl=impl)
        gradients = torch.autograd.grad((lse.sin() + t.cos()).sum(), [leaves[k] for k in wanted])
        everything = everything or list(gradients)
        assert list(seen[-1]) == [k in wanted for k in range(5)]
        for k, gradient in zip(wanted, gradients, strict=True):
            torch.testing.assert_close(gradient, everything[k], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("axis", AXES)
def test_rows_without_a_pair(impl: str, axis: str) -> None:
    """-inf and no gradient, whatever the upstream gradient; the others are not touched."""
    x, y = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    head = Head(2.0, PairMask(same=(torch.tensor([0, 0, 1, 1, 2, 5]), torch.tensor([0, 1, 1, 0, 7, 7]))), axis=axis)
    ((lse, t),) = masked_lse(x, y, heads=[head], impl=impl)
    assert lse.isneginf().tolist() == [False] * 4 + [True] * 2
    assert not t.any()
    for upstream in (1.0, math.inf, math.nan):
        dx, dy = torch.autograd.grad(lse, (x, y), torch.tensor([1.0] * 4 + [upstream] * 2), retain_graph=True)
        assert not dx[4:].any()
        assert not dy[4:].any()
        assert dx[:4].isfinite().all()
        assert dy[:4].isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.usefixtures("small_tiles")
def test_large_logits_stay_finite(impl: str, scale: float) -> None:
    x, y = torch.randn(25, 6), torch.randn(49, 6)  # a tail tile of one column
    heads = [Head(scale, target=Shifted()), Head(-scale, PairMask(offset=0), axis="column")]
    actual = values_and_gradients(x, y, heads, impl=impl)
    expected = values_and_gradients(x.to(F64), y.to(F64), heads, impl="reference")
    for a, e in zip(actual[:4], expected[:4], strict=True):
        torch.testing.assert_close(a.to(F64), e, rtol=1e-5, atol=1e-2)
    assert all(a.isfinite().all() for a in actual)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("side", ["x", "y", "both"])
def test_bad_values_are_never_hidden(impl: str, bad: float, normalize: bool, side: str) -> None:
    """Not even by a mask that forbids every pair of the row, nor by a row of weight 0."""
    x, y = torch.randn(8, 4), None if side == "both" else torch.randn(9, 4)
    (y if side == "y" else x)[3, 1] = bad
    ids = torch.arange(8), torch.arange(8 if y is None else 9)
    head = Head(2.0, PairMask(distinct=ids), Shifted())
    ((lse, t),) = masked_lse(x, y, heads=[head], normalize=normalize, impl=impl)
    assert (lse - t).mean().isnan()
    weight = torch.ones(8)
    weight[3] = 0
    assert masked_lse_sum(x, y, head=head, row_weight=weight, normalize=normalize, impl=impl).isnan()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", MASKS)
def test_key_pieces_merge_exactly(impl: str, mask: str, target: str) -> None:
    """lse by logaddexp, t by addition, and autograd weights the pieces."""
    n, m = 20, 31
    x, y = torch.randn(n, 5, dtype=F64, requires_grad=True), torch.randn(m, 5, dtype=F64, requires_grad=True)
    whole = Head(3.0, MASKS[mask](n, m), TARGETS[target](n, m), 0.2, column_bias=uniform(m))

    def piece(a: int, b: int) -> Head:
        """The head for columns a to b: what stands one per column is cut, column numbers stay."""

        def cut(mask: PairMask) -> PairMask:
            names = [name for name in ("same", "different", "distinct") if getattr(mask, name) is not None]
            return replace(mask, **{name: (getattr(mask, name)[0], getattr(mask, name)[1][a:b]) for name in names})

        goal = whole.target
        if isinstance(goal, Masked):
            goal = replace(goal, mask=cut(goal.mask))
        if isinstance(goal, Dense):
            goal = Dense(goal.weights[:, a:b])
        return replace(whole, mask=cut(whole.mask), target=goal, column_bias=whole.column_bias[a:b])

    expected = masked_lse(x, y, heads=[whole], impl=impl)[0]
    lse, t = torch.full((n,), -math.inf, dtype=F64), torch.zeros(n, dtype=F64)
    for a, b in ((0, 12), (12, 13), (13, 31)):
        options = {"first_column": a, "columns": m, "impl": impl}
        ((part, some),) = masked_lse(x, y[a:b], heads=[piece(a, b)], **options)
        either = (lse > -math.inf) | (part > -math.inf)  # autograd of logaddexp has NaN at (-inf, -inf)
        lse = torch.where(either, torch.logaddexp(torch.where(either, lse, 0), torch.where(either, part, 0)), -math.inf)
        t = t + some
    torch.testing.assert_close((lse, t), expected, rtol=1e-11, atol=1e-11)
    finite = expected[0] > -math.inf
    mine = torch.autograd.grad(torch.where(finite, lse, 0).sin().sum() + t.cos().sum(), (x, y))
    whole_gradient = torch.autograd.grad(
        torch.where(finite, expected[0], 0).sin().sum() + expected[1].cos().sum(), (x, y)
    )
    torch.testing.assert_close(mine, whole_gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.usefixtures("small_tiles")
def test_free_identities(impl: str) -> None:
    """lse - t does not see a shift of all keys; normalised gradients have no radial part; lse and t shift by a bias."""
    x, y = torch.randn(30, 6, dtype=F64, requires_grad=True), torch.randn(41, 6, dtype=F64, requires_grad=True)
    head = Head(2.0, PairMask(), Indexed(labels(30, 41)))
    ((lse, t),) = masked_lse(x, y, heads=[head], normalize=False, impl=impl)
    (dy,) = torch.autograd.grad((lse - t).sum(), y)
    torch.testing.assert_close(dy.sum(0), torch.zeros(6, dtype=F64), rtol=0, atol=1e-11)
    ((moved, u),) = masked_lse(x, y + torch.randn(6, dtype=F64), heads=[head], normalize=False, impl=impl)
    torch.testing.assert_close(lse - t, moved - u, rtol=1e-10, atol=1e-10)
    ((lse, t),) = masked_lse(x, y, heads=[head], impl=impl)
    dx, dy = torch.autograd.grad((lse - t).square().sum(), (x, y))
    for gradient, rows in ((dx, x), (dy, y)):
        torch.testing.assert_close((gradient * rows).sum(1), torch.zeros(len(rows), dtype=F64), rtol=0, atol=1e-11)
    ((biased, u),) = masked_lse(x, y, heads=[replace(head, row_bias=uniform(30))], impl=impl)
    torch.testing.assert_close((biased - lse, u - t), (uniform(30), uniform(30)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_any_strides(impl: str, layout: str) -> None:
    full = torch.randn(41, 41, dtype=F64)
    x = {"transposed": full[:20, :7].T.contiguous().T, "strided": full[:20, :14:2], "offset": full[20:40, 8:15]}[layout]
    head = [Head(2.0, PairMask(offset=0), Shifted(1, 20))]
    expected = values_and_gradients(x.contiguous(), None, head, impl="reference")
    torch.testing.assert_close(values_and_gradients(x, None, head, impl=impl), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_empty_sides(impl: str) -> None:
    none, some = torch.empty(0, 3), torch.randn(4, 3, requires_grad=True)
    for x, y, lengths in ((none, None, (0, 0)), (none, some, (0, 4)), (some, none, (4, 0))):
        heads = [Head(2.0), Head(axis="column", target=Shifted())]
        results = masked_lse(x, y, heads=heads, impl=impl)
        for (lse, t), length in zip(results, lengths, strict=True):
            assert lse.shape == t.shape == (length,)
            assert lse.isneginf().all()
            assert not t.any()
        if some is x or some is y:
            (gradient,) = torch.autograd.grad(sum(lse.sum() + t.sum() for lse, t in results), some)
            assert not gradient.any()
    assert masked_lse_sum(none, head=Head(), row_weight=torch.empty(0), impl=impl) == 0


@pytest.mark.parametrize("impl", FUSED)
def test_saved_for_backward_is_linear(impl: str) -> None:
    """Rows (which the caller holds anyway), what the heads refer to, and lse."""
    n, d = 512, 16
    x = torch.randn(n, d, requires_grad=True)
    names = torch.arange(n) // 8
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in (x.data_ptr(), names.data_ptr()):
            saved[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ((lse, t),) = masked_lse(x, heads=[Head(20.0, PairMask(same=(names, names), offset=0), Shifted())], impl=impl)
        loss = (lse - t).mean()
    assert sum(saved.values()) <= 4 * n
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.usefixtures("small_tiles")
def test_same_bits_every_run(impl: str) -> None:
    x, y = torch.randn(60, 24), torch.randn(75, 24)
    first = values_and_gradients(x, y, clip_heads(60, 75), impl=impl)
    for _ in range(3):
        again = values_and_gradients(x, y, clip_heads(60, 75), impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("impl", FUSED)
def test_several_labels_a_row(impl: str) -> None:
    """A list of labels a row is the dense matrix of their weights, compiled and under torch.func as well."""
    torch._dynamo.reset()
    x, y = torch.randn(12, 4, dtype=F64, requires_grad=True), torch.randn(9, 4, dtype=F64)
    target = listed(12, 9)
    dense = torch.zeros(12, 9, dtype=F64)
    rows = torch.repeat_interleave(target.offsets.diff())
    dense.index_put_((rows, target.index), target.weight, accumulate=True)

    def loss(u: Tensor, goal: Listed | Dense) -> Tensor:
        return masked_lse_sum(u, y, head=Head(5.0, target=goal), row_weight=torch.ones(12), impl=impl)

    expected = torch.autograd.grad(loss(x, Dense(dense)), x)
    compiled = torch.compile(lambda u: loss(u, target), fullgraph=True, backend="aot_eager")
    for value in (loss(x, target), compiled(x)):
        torch.testing.assert_close(value, loss(x, Dense(dense)))
        torch.testing.assert_close(torch.autograd.grad(value, x), expected)
    torch.testing.assert_close(torch.func.grad(lambda u: loss(u, target))(x.detach()), expected[0])
