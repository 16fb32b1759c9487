"""Multi-Similarity against its formula written out densely, and against pytorch-metric-learning's loss and miner."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastret
from fastret import functional as F
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import masked_lse as tiled

F64 = torch.float64
IMPLS = [
    impl
    for impl in ("reference", "tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("row_extrema", "cpu", torch.float32)) is None
]
LABELS = torch.tensor([3, -1, 3, 8, 3, 100, -1, 8, 8, 7])  # two rows alone in their class
GALLERY_LABELS = torch.tensor([3, -1, 5, 8, 3, 7, 7, 2, 8])


def rows(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]


def dense(
    s: Tensor, same: Tensor, itself: Tensor, alpha: Any, beta: Any, base: float, mining_margin: float | None
) -> Tensor:
    """(N,) row by row, from lists of scores, as the official code walks through a batch."""
    losses = []
    for i in range(len(s)):
        positives, negatives = s[i][same[i] & ~itself[i]], s[i][~same[i]]
        if mining_margin is not None:
            if not len(positives) or not len(negatives):
                losses.append(0 * s[i].sum())
                continue
            hardest_positive, hardest_negative = positives.detach().min(), negatives.detach().max()
            positives = positives[positives - mining_margin < hardest_negative]
            negatives = negatives[negatives + mining_margin > hardest_positive]
        near = (1 + torch.exp(-alpha * (positives - base)).sum()).log() / alpha
        losses.append(near + (1 + torch.exp(beta * (negatives - base)).sum()).log() / beta)
    return torch.stack(losses)


def equal(loss: Tensor, expected: Tensor, inputs: list[Tensor], rtol: float = 1e-9) -> None:
    """Equal values, and equal gradients from an upstream one of 7."""
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-10)
    gradients = [
        torch.autograd.grad(7 * value.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in (loss, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("mining_margin", [None, 0.1, -0.2])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("learned", [False, True])
def test_formula(impl: str, gallery: bool, mining_margin: float | None, unit: bool, learned: bool) -> None:
    x, y = rows((10, 5), (9, 5))
    alpha, beta = (torch.tensor(v, dtype=F64, requires_grad=learned) for v in (3.0, 7.0))
    others = GALLERY_LABELS if gallery else LABELS
    given = {"ref_emb": y, "ref_labels": others} if gallery else {}
    u, v = (normalize(x), normalize(y)) if unit else (x, y)
    itself = torch.zeros(10, len(others), dtype=torch.bool) if gallery else torch.eye(10, dtype=torch.bool)
    expected = dense(u @ (v if gallery else u).T, LABELS[:, None] == others, itself, alpha, beta, 0.4, mining_margin)
    settings = (alpha, beta, 0.4) if learned else (3.0, 7.0, 0.4)
    inputs = [x, y, *([alpha, beta] if learned else [])]
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum()), ("none", expected)):
        options = {"mining_margin": mining_margin, "normalize": unit, "reduction": reduction, "impl": impl}
        equal(fastret.MultiSimilarity(*settings, **options)(x, LABELS, **given), value, inputs)


@pytest.fixture(params=[False, True], ids=["one tile", "several tiles"])
def tile_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(tiled, "ROWS", 16)
        monkeypatch.setattr(tiled, "COLUMNS", 24)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("mining_margin", [None, 0.1])
@pytest.mark.parametrize("classes", ["several", "one", "all distinct"])
@pytest.mark.usefixtures("tile_sizes")
def test_pytorch_metric_learning_agrees(impl: str, gallery: bool, mining_margin: float | None, classes: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    x, y = rows((45, 6), (50, 6))
    labels, others = torch.randint(0, 7, (45,)), torch.randint(0, 7, (50,))
    if classes == "one":
        labels, others = torch.zeros_like(labels), torch.zeros_like(others)
    elif classes == "all distinct":
        labels, others = torch.randperm(45), 45 + torch.randperm(50)
    given = {"ref_emb": y, "ref_labels": others} if gallery else {}
    mined = None if mining_margin is None else miners.MultiSimilarityMiner(mining_margin)(x, labels, **given)
    theirs = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)(x, labels, mined, **given)
    mine = fastret.MultiSimilarity(mining_margin=mining_margin, impl=impl)(x, labels, **given)
    equal(mine, theirs, [x, y])
    if mining_margin is not None and classes != "several":
        assert mine == 0  # no anchor has both positives and negatives


@pytest.mark.parametrize("impl", IMPLS)
def test_the_miner_keeps_the_same_pairs(impl: str) -> None:
    """The gradient of x is W y with the pairs' weights W: with independent rows of y, W can be read off it."""
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    x, y = (normalize(t.detach()) for t in rows((40, 40), (30, 40)))
    x.requires_grad_()
    labels, others = torch.randint(0, 6, (40,)), torch.randint(0, 6, (30,))
    labels[:3] = torch.arange(10, 13)  # without positives
    a1, p, a2, n = miners.MultiSimilarityMiner(0.1)(x, labels, ref_emb=y, ref_labels=others)
    kept = torch.zeros(40, 30, dtype=torch.bool)
    kept[a1, p] = kept[a2, n] = True
    loss = F.multi_similarity(
        x, labels, beta=2.0, ref_emb=y, ref_labels=others, mining_margin=0.1, normalize=False, impl=impl
    )
    (gradient,) = torch.autograd.grad(loss, x)
    weights = torch.linalg.lstsq(y.T, gradient.T).solution.T
    torch.testing.assert_close(weights.abs() > 1e-9, kept)
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mining_margin", [None, 0.1])
def test_degenerate_batches(impl: str, mining_margin: float | None) -> None:
    def value(labels: list[int], gallery: list[int] | None = None) -> float:
        x = torch.randn(len(labels), 4, requires_grad=True)
        names, given = torch.tensor(labels, dtype=torch.int64), {}
        if gallery is not None:
            given = {"ref_emb": torch.randn(len(gallery), 4), "ref_labels": torch.tensor(gallery, dtype=torch.int64)}
        loss = F.multi_similarity(x, names, **given, mining_margin=mining_margin, impl=impl)
        loss.backward()
        assert x.grad.isfinite().all()
        return loss.item()

    assert value([]) == value([3]) == value([1, 2], []) == value([], [1]) == 0
    lacking = [value([1, 2, 3]), value([5] * 4), value([1, 2], [3, 4, 4]), value([1], [1, 1])]
    assert all((v == 0) == (mining_margin is not None) for v in lacking)
    assert value([1, 1, 2]) >= 0
    duplicates = torch.ones(6, 3, requires_grad=True)
    loss = F.multi_similarity(duplicates, torch.arange(6) // 2, mining_margin=mining_margin, impl=impl)
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(-1)) / 2 + math.log1p(4 * math.exp(25)) / 50)
    loss.backward()
    assert duplicates.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mining_margin", [None, 0.1])
def test_order_and_names_of_classes_do_not_matter(impl: str, mining_margin: float | None) -> None:
    (x,) = rows((24, 6))
    labels, order = torch.randint(0, 5, (24,)), torch.randperm(24)
    names = torch.tensor([200, 3, 77, 0, 12], dtype=torch.uint8)
    module = fastret.MultiSimilarity(mining_margin=mining_margin, impl=impl)
    equal(module(x[order], names[labels[order]]), module(x, labels), [x])
    (gradient,) = torch.autograd.grad(module(x, labels), x)
    torch.testing.assert_close((gradient * x).sum(1), torch.zeros(24, dtype=F64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mining_margin", [None, 0.1])
def test_gradcheck(impl: str, mining_margin: float | None) -> None:
    x, y = rows((7, 3), (6, 3))
    module = fastret.MultiSimilarity(2, 5, 0.3, mining_margin=mining_margin, impl=impl)
    torch.autograd.gradcheck(lambda u: module(u, LABELS[:7]), x)
    torch.autograd.gradcheck(lambda u, v: module(u, LABELS[:7], ref_emb=v, ref_labels=GALLERY_LABELS[:6]), (x, y))


@pytest.mark.parametrize("mining_margin", [None, 0.1])
def test_double_backward_of_the_definition(mining_margin: float | None) -> None:
    (x,) = rows((6, 3))
    module = fastret.MultiSimilarity(2, 5, 0.3, mining_margin=mining_margin, impl="reference")
    torch.autograd.gradgradcheck(lambda u: module(u, LABELS[:6]), x)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("mining_margin", [None, 0.1])
def test_torch_transforms(impl: str, gallery: bool, mining_margin: float | None) -> None:
    torch._dynamo.reset()
    x, y = (t.detach().float().requires_grad_() for t in rows((10, 4), (9, 4)))

    def loss(u: Tensor, v: Tensor) -> Tensor:
        given = {"ref_emb": v, "ref_labels": GALLERY_LABELS} if gallery else {}
        return F.multi_similarity(u, LABELS, mining_margin=mining_margin, **given, impl=impl) + 0 * v.sum()

    expected = torch.autograd.grad(loss(x, y), (x, y))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), (x, y)), expected)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, y), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mining_margin", [None, 0.1])
def test_low_precision(impl: str, mining_margin: float | None) -> None:
    x = torch.randn(10, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = x.to(dtype, copy=True).requires_grad_()
        loss = F.multi_similarity(low, LABELS, mining_margin=mining_margin, impl=impl)
        exact = F.multi_similarity(low.double(), LABELS, mining_margin=mining_margin, impl="reference")
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=1e-6)
        loss.backward()
        assert low.grad.dtype == dtype
        assert low.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        given = torch.nn.Linear(8, 8)(x)
        assert F.multi_similarity(given, LABELS, mining_margin=mining_margin, impl=impl).dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mining_margin", [None, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_values_are_never_hidden(impl: str, mining_margin: float | None, bad: float, reduction: str) -> None:
    x, y = torch.randn(10, 4), torch.randn(9, 4)
    y[5, 1] = bad
    options: dict[str, Any] = {"mining_margin": mining_margin, "reduction": reduction, "impl": impl}
    assert F.multi_similarity(x, LABELS, ref_emb=y, ref_labels=GALLERY_LABELS, **options).mean().isnan()
    assert F.multi_similarity(y, GALLERY_LABELS, **options).mean().isnan()


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize("mining_margin", [None, 0.1])
def test_what_is_kept_for_backward_grows_with_n(impl: str, mining_margin: float | None) -> None:
    n, width, kept = 600, 4, {}

    def count(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(n, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        F.multi_similarity(x, torch.arange(n) // 4, mining_margin=mining_margin, impl=impl).backward()
    assert sum(kept.values()) < 4 * n * (width + 40)


def test_copies_and_cites() -> None:
    module = fastret.MultiSimilarity(2, 40, mining_margin=0.1)
    assert repr(copy.deepcopy(module)) == repr(pickle.loads(pickle.dumps(module))) == repr(module)
    assert "beta=40" in repr(module)
    assert "title=" in module.citation


X, L = torch.randn(8, 4), torch.arange(8) // 2
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "alpha": (lambda: fastret.MultiSimilarity(0), ValueError, "alpha: expected a positive.*got 0"),
    "NaN beta": (lambda: fastret.MultiSimilarity(2, math.nan), ValueError, "beta: expected a positive.*got nan"),
    "negative beta": (lambda: F.multi_similarity(X, L, beta=-1), ValueError, "beta: expected a positive.*got -1"),
    "tensor": (
        lambda: F.multi_similarity(X, L, alpha=torch.tensor(-2.0)),
        ValueError,
        "alpha: expected a positive.*got -2",
    ),
    "base": (lambda: fastret.MultiSimilarity(base=math.inf), ValueError, "base: expected a finite number, got inf"),
    "base type": (lambda: fastret.MultiSimilarity(base="a"), TypeError, "base: expected a number, got str"),
    "margin": (
        lambda: fastret.MultiSimilarity(mining_margin=math.nan),
        ValueError,
        "mining_margin: expected a finite number, got nan",
    ),
    "margin type": (lambda: F.multi_similarity(X, L, mining_margin=True), TypeError, "mining_margin: .*got bool"),
    "reduction": (lambda: fastret.MultiSimilarity(reduction="max"), ValueError, "reduction: expected one of"),
    "labels": (lambda: F.multi_similarity(X, L[:5]), ValueError, r"labels: expected shape \(8,\)"),
    "gallery alone": (lambda: F.multi_similarity(X, L, ref_emb=X), ValueError, "ref_emb, ref_labels: expected both"),
    "width": (
        lambda: F.multi_similarity(X, L, ref_emb=X[:, :3], ref_labels=L),
        ValueError,
        "ref_emb: expected 4 columns",
    ),
    "impl": (lambda: F.multi_similarity(X, L, mining_margin=0.1, impl="gpu"), ValueError, "impl: expected one of"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
