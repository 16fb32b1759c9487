"""Normalised softmax, ProxyNCA++, CosFace, ArcFace and Proxy-Anchor against their formulas written out densely, and
against pytorch-metric-learning."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

import fastret
from fastret import functional as F
from fastret.backends import registry
from fastret.backends.registry import Call

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]
IMPLS = ["reference", *FUSED]
C, D = 11, 5
LABELS = torch.tensor([3, 0, 10, 3, 7, 7, 1, 3, 2])  # classes without a row, classes with several


def problem(rows: int = 9, classes: int = C, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(n, D, dtype=dtype).requires_grad_() for n in (rows, classes))


def same(loss: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    """Equal values and equal gradients, of an upstream gradient of 7."""
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(7 * value.sum(), inputs, retain_graph=True) for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def cosines(x: Tensor, p: Tensor) -> Tensor:
    return normalize(x) @ normalize(p).T


def dense_softmax(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(cosines(x, p) / 0.05, labels)


def dense_plus_plus(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(-torch.cdist(3 * normalize(x), 3 * normalize(p)).square(), labels)


def dense_cos_face(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(64 * (cosines(x, p) - 0.35 * one_hot(labels, len(p)).to(F64)), labels)


def dense_arc_face(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    c = cosines(x, p)
    theta = c.acos()
    turned = torch.where(theta + 0.5 <= math.pi, (theta + 0.5).cos(), c - 0.5 * math.sin(0.5))
    return cross_entropy(64 * torch.where(one_hot(labels, len(p)).bool(), turned, c), labels)


def dense_anchor(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    c, own = cosines(x, p), one_hot(labels, len(p)).bool()
    attract = (1 + torch.where(own, torch.exp(-32 * (c - 0.1)), 0).sum(0)).log()
    repel = (1 + torch.where(own, 0, torch.exp(32 * (c + 0.1))).sum(0)).log()
    return attract.sum() / own.any(0).sum() + repel.sum() / len(p)


FAMILY: dict[str, tuple[Callable[..., Tensor], type[torch.nn.Module], Callable[..., Tensor]]] = {
    "normalized_softmax": (F.normalized_softmax, fastret.NormalizedSoftmax, dense_softmax),
    "proxy_nca_plus_plus": (F.proxy_nca_plus_plus, fastret.ProxyNCAPlusPlus, dense_plus_plus),
    "cos_face": (F.cos_face, fastret.CosFace, dense_cos_face),
    "arc_face": (F.arc_face, fastret.ArcFace, dense_arc_face),
    "proxy_anchor": (F.proxy_anchor, fastret.ProxyAnchor, dense_anchor),
}
LEARNED = {
    "normalized_softmax": "temperature",
    "proxy_nca_plus_plus": "scale",
    "cos_face": "scale",
    "arc_face": "scale",
    "proxy_anchor": "alpha",
}
every_loss = pytest.mark.parametrize("name", FAMILY)


def obtuse(x: Tensor, p: Tensor) -> Tensor:
    """x with one row nearly opposite to its proxy, past ArcFace's turning point, and one nearly on it."""
    moved = x.detach().clone()
    moved[0] = -p[LABELS[0]].detach() + 0.1 * moved[0]
    moved[1] = p[LABELS[1]].detach() + 0.1 * moved[1]
    return moved.requires_grad_()


@pytest.mark.parametrize("impl", IMPLS)
@every_loss
def test_formulas(impl: str, name: str) -> None:
    loss, module, dense = FAMILY[name]
    x, p = problem()
    x = obtuse(x, p)
    expected = dense(x, p, LABELS)
    same(loss(x, p, LABELS, impl=impl), expected, (x, p), 1e-9)
    owner = module(C, D, impl=impl).double()
    owner.proxies.data = p.detach().clone()
    torch.testing.assert_close(owner(x, LABELS), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("theirs", "mine", "options"),
    [
        ("NormalizedSoftmaxLoss", fastret.NormalizedSoftmax, {"temperature": 0.1}),
        ("CosFaceLoss", fastret.CosFace, {"margin": 0.2, "scale": 20.0}),
        ("ArcFaceLoss", fastret.ArcFace, {"margin": 0.6, "scale": 20.0}),
        ("ProxyAnchorLoss", fastret.ProxyAnchor, {"margin": 0.2, "alpha": 10.0}),
    ],
)
def test_pytorch_metric_learning_agrees(
    impl: str, theirs: str, mine: type[torch.nn.Module], options: dict[str, float]
) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, p = problem()
    x = obtuse(x, p)
    own = mine(C, D, impl=impl, **options).double()
    own.proxies.data = p.detach().clone()
    if theirs == "ArcFaceLoss":
        options = options | {"margin": math.degrees(options["margin"])}
    other = getattr(losses, theirs)(C, D, **options)
    parameter = other.proxies if hasattr(other, "proxies") else other.W  # W is (D, C)
    parameter.data = p.detach().clone() if hasattr(other, "proxies") else p.detach().T.clone()
    loss, expected = own(x, LABELS), other(x, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (dx, dp), (ex, ep) = (
        torch.autograd.grad(value, (x, leaf)) for value, leaf in ((loss, own.proxies), (expected, parameter))
    )
    torch.testing.assert_close((dx, dp), (ex, ep if ep.shape == dp.shape else ep.T), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_softmax_under_several_names(impl: str) -> None:
    x, p = problem()
    expected = F.normalized_softmax(x, p, LABELS, temperature=1 / 18, impl=impl)
    same(F.proxy_nca(x, p, LABELS, impl=impl), expected, (x, p))
    same(F.proxy_nca_plus_plus(x, p, LABELS, impl=impl), expected, (x, p))
    for face in (F.cos_face, F.arc_face):
        same(face(x, p, LABELS, margin=0, scale=18, impl=impl), expected, (x, p))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_loss
def test_gradcheck_through_the_kernels(impl: str, reduction: str, name: str) -> None:
    learned = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def run(x: Tensor, p: Tensor, value: Tensor) -> Tensor:
        return FAMILY[name][0](x, p, LABELS, reduction=reduction, impl=impl, **{LEARNED[name]: value})

    x, p = problem()
    assert torch.autograd.gradcheck(run, (obtuse(x, p), p, learned))


@pytest.mark.parametrize("impl", IMPLS)
@every_loss
def test_reductions(impl: str, name: str) -> None:
    loss, inputs = FAMILY[name][0], problem()
    none = loss(*inputs, LABELS, reduction="none", impl=impl)
    assert none.shape == ((C,) if name == "proxy_anchor" else (9,))
    same(loss(*inputs, LABELS, reduction="sum", impl=impl), none.sum(), inputs)
    if name != "proxy_anchor":
        same(loss(*inputs, LABELS, impl=impl), none.mean(), inputs)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_loss
def test_nothing_of_size_batch_times_classes_is_kept(impl: str, reduction: str, name: str) -> None:
    rows, classes = 64, 300
    x, p = problem(rows, classes, torch.float32)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in (x.data_ptr(), p.data_ptr()):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = FAMILY[name][0](x, p, torch.arange(rows), reduction=reduction, impl=impl).sum()
    one_sweep = reduction == "mean" and name in ("normalized_softmax", "proxy_nca_plus_plus")
    gradients = 4 * (x.numel() + p.numel()) if one_sweep else 0
    assert sum(kept.values()) <= gradients + 48 * (rows + classes) < 4 * rows * classes
    loss.backward()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@every_loss
def test_identities(impl: str, name: str) -> None:
    """Classes and rows may be renumbered, lengths do not count, gradients have no radial part."""
    loss = FAMILY[name][0]
    x, p = problem()
    value = loss(x, p, LABELS, impl=impl)
    order, rows = torch.randperm(C), torch.randperm(9)
    torch.testing.assert_close(loss(x[rows], p[order], order.argsort()[LABELS[rows]], impl=impl), value)
    torch.testing.assert_close(loss(4 * x, p * torch.rand(C, 1), LABELS.to(torch.int16), impl=impl), value)
    for side, gradient in zip((x, p), torch.autograd.grad(value, (x, p)), strict=True):
        torch.testing.assert_close((side * gradient).sum(1), torch.zeros(len(side), dtype=F64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_loss
def test_small_batches_and_proxies_of_no_length(impl: str, reduction: str, name: str) -> None:
    x, p = problem()
    for rows in (0, 1):
        loss = FAMILY[name][0](x[:rows], p, LABELS[:rows], reduction=reduction, impl=impl).sum()
        assert loss > 0 if rows else loss == 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, p)))
    two = FAMILY[name][0](x, p[:2], LABELS % 2, reduction=reduction, impl=impl)
    zero = torch.zeros_like(p).requires_grad_()
    loss = FAMILY[name][0](x, zero, LABELS, reduction=reduction, impl=impl)
    assert two.isfinite().all()
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), zero)[0].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-8, 1e-6, 1e-4, 1e-2])
def test_arc_face_at_the_ends(impl: str, dtype: torch.dtype, side: int, gap: float) -> None:
    """On the proxy and opposite to it: right to the resolution of the cosine, gradients finite and no steeper than
    the angle."""
    p = torch.randn(4, 6, dtype=dtype)
    x = (side * p[:1] + gap * torch.randn(1, 6, dtype=dtype)).requires_grad_()
    label = torch.tensor([0])
    loss = F.arc_face(x, p, label, scale=1.0, impl=impl)
    own = normalize(x.detach().to(F64)) @ normalize(p.to(F64)).T
    theta = own[0, 0].clamp(-1, 1).acos()
    z = (theta + 0.5).cos() if side == 1 else own[0, 0] - 0.5 * math.sin(0.5)
    expected = torch.cat([z[None], own[0, 1:]]).logsumexp(0) - z
    torch.testing.assert_close(loss.detach().to(F64), expected, rtol=0, atol=4 * torch.finfo(dtype).eps ** 0.5)
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.norm() * x.norm() < 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_loss
def test_bad_values_are_never_hidden(impl: str, bad: float, name: str) -> None:
    for side in range(2):
        inputs = [t.detach().clone() for t in problem()]
        inputs[side][4, 1] = bad
        assert FAMILY[name][0](*inputs, LABELS, impl=impl).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", FUSED)
@every_loss
def test_low_precision(impl: str, dtype: torch.dtype, name: str) -> None:
    loss, module, _ = FAMILY[name]
    x, p = (t.detach().to(dtype).requires_grad_() for t in problem())
    value = loss(x, p, LABELS, impl=impl)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.to(F64), loss(x.to(F64), p.to(F64), LABELS, impl="reference"), rtol=1e-5, atol=0)
    assert [g.dtype for g in torch.autograd.grad(value, (x, p))] == [dtype, dtype]
    owner = module(C, D, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        owner(torch.nn.Linear(D, D)(torch.randn(9, D)), LABELS).backward()
    assert owner.proxies.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_loss
def test_compiles_without_a_graph_break(impl: str, reduction: str, name: str) -> None:
    torch._dynamo.reset()
    module = FAMILY[name][1](C, D, reduction=reduction, impl=impl).double()
    x, _ = problem()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    same(compiled(x, LABELS), module(x, LABELS), (x, module.proxies))


@every_loss
def test_modules_keep_their_proxies_and_cite(name: str) -> None:
    module, other = FAMILY[name][1](C, D), FAMILY[name][1](C, D)
    other.load_state_dict(module.state_dict())
    assert list(module.state_dict()) == ["proxies"]
    assert torch.equal(other.proxies, module.proxies)
    assert repr(pickle.loads(pickle.dumps(module))) == repr(copy.deepcopy(module)) == repr(module)
    assert "11, 5" in repr(module)
    assert "title=" in type(module).citation
    x = torch.randn(9, D)
    before = module(x, LABELS)
    module.init_from(x, LABELS)
    assert module(x, LABELS) < before


X, P = torch.randn(9, D), torch.randn(C, D)


@every_loss
def test_bad_rows_and_labels(name: str) -> None:
    loss, module, _ = FAMILY[name]
    for labels, error, message in (
        (LABELS + 1, ValueError, "labels: expected numbers from 0 to 10, got 11"),
        (LABELS - 1, ValueError, "labels: expected numbers from 0 to 10, got -1"),
        (LABELS * math.nan, TypeError, "labels: expected an integer dtype"),
        (LABELS[:4], ValueError, r"labels: expected shape \(9,\)"),
    ):
        with pytest.raises(error, match=message):
            loss(X, P, labels)
    with pytest.raises(ValueError, match="proxies: expected at least 2 rows"):
        loss(X, P[:1], LABELS * 0)
    with pytest.raises(ValueError, match="proxies: expected 5 columns"):
        loss(X, P[:, 1:], LABELS)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        loss(X, P, LABELS, reduction="max")
    with pytest.raises(ValueError, match="nb_classes: expected at least 2, got 1"):
        module(1, D)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"{LEARNED[name]}: expected a positive"):
            module(C, D, **{LEARNED[name]: wrong})


@pytest.mark.parametrize(
    ("module", "margin", "error", "message"),
    [
        (fastret.CosFace, -0.1, ValueError, "margin: expected a number from 0 to below inf, got -0.1"),
        (fastret.ArcFace, 28.6, ValueError, "margin: expected a number from 0 to below 3.14159, got 28.6"),
        (fastret.ArcFace, math.nan, ValueError, "margin: .*got nan"),
        (fastret.ArcFace, "0.5", TypeError, "margin: expected a number, got str"),
        (fastret.ProxyAnchor, math.inf, ValueError, "margin: expected a finite number, got inf"),
        (fastret.ProxyAnchor, None, TypeError, "margin: expected a number, got NoneType"),
    ],
)
def test_bad_margins(module: type[torch.nn.Module], margin: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module(C, D, margin=margin)


@pytest.mark.parametrize("loss", [F.proxy_anchor, F.normalized_softmax, F.cos_face, F.proxy_nca])
@pytest.mark.parametrize("label", [-1, 7])
def test_labels_are_checked_where_the_loss_is_compiled(loss: Callable[..., Tensor], label: int) -> None:
    torch._dynamo.reset()
    x, proxies, labels = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, label, 2])
    run = torch.compile(lambda a, b, c: loss(a, b, c, impl="tiled"), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=f"index: expected numbers from 0 to 6, got {label}"):
        run(x, proxies, labels)
