"""SoftTriple and sub-center ArcFace against loops written from the papers, and against pytorch-metric-learning."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastret
from fastret import functional as F
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.losses.proxies import ProxyLoss
from fastret.ops.center_distances import center_distances

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32, ("centers",))) is None
]
IMPLS = ["reference", *FUSED]
C, K, D = 11, 4, 5
LABELS = torch.tensor([3, 0, 10, 3, 7, 7, 1, 3, 2])  # classes without a row, classes with several


def problem(rows: int = 9, classes: int = C, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((rows, D), (classes, K, D)))


def same(loss: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    """Equal values and equal gradients, of an upstream gradient of 7."""
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(7 * value.sum(), inputs, retain_graph=True) for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def soft_triple_by_loops(x: Tensor, p: Tensor, labels: Tensor, tau: float = 0.2) -> Tensor:
    """Every term by itself, of scalars that autograd follows."""
    la, gamma, margin = 20.0, 0.1, 0.01
    u, w = normalize(x), normalize(p, dim=2)
    classes, centers = p.shape[:2]
    losses = []
    for i, label in enumerate(labels.tolist()):
        scores = []
        for c in range(classes):
            s = [u[i] @ w[c, k] for k in range(centers)]
            weights = [(v / gamma).exp() for v in s]
            scores.append(sum(a * v for a, v in zip(weights, s, strict=True)) / sum(weights))
        own = (la * (scores[label] - margin)).exp()
        others = sum((la * scores[c]).exp() for c in range(classes) if c != label)
        losses.append(-(own / (own + others)).log())
    loss = sum(losses) / len(losses)
    for c in range(classes):
        for s in range(centers):
            for t in range(s + 1, centers):
                distance = (2 - 2 * w[c, s] @ w[c, t]).sqrt()
                loss = loss + tau * distance / (classes * centers * (centers - 1))
    return loss


def sub_center_by_loops(x: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    scale, margin = 64.0, 0.5
    u, w = normalize(x), normalize(p, dim=2)
    losses = []
    for i, label in enumerate(labels.tolist()):
        scores = [torch.stack([u[i] @ w[c, k] for k in range(p.shape[1])]).max(0).values for c in range(len(p))]
        theta = scores[label].acos()
        turned = (theta + margin).cos() if theta + margin <= math.pi else scores[label] - margin * math.sin(margin)
        logits = [scale * (turned if c == label else s) for c, s in enumerate(scores)]
        losses.append(torch.stack(logits).logsumexp(0) - logits[label])
    return sum(losses) / len(losses)


FAMILY: dict[str, tuple[Callable[..., Tensor], type[ProxyLoss], Callable[..., Tensor]]] = {
    "soft_triple": (F.soft_triple, fastret.SoftTriple, soft_triple_by_loops),
    "sub_center_arc_face": (F.sub_center_arc_face, fastret.SubCenterArcFace, sub_center_by_loops),
}
LEARNED = {"soft_triple": "la", "sub_center_arc_face": "scale"}
every_loss = pytest.mark.parametrize("name", FAMILY)


def near(x: Tensor, p: Tensor) -> Tensor:
    """x with one row nearly on a centre of its class."""
    moved = x.detach().clone()
    moved[1] = normalize(p[LABELS[1], 2].detach(), dim=0) + 0.1 * moved[1]
    return moved.requires_grad_()


@pytest.mark.parametrize("impl", IMPLS)
@every_loss
def test_formulas(impl: str, name: str) -> None:
    loss, module, by_loops = FAMILY[name]
    x, p = problem()
    with torch.no_grad():
        p[3] = -x[0] + 0.05 * p[3]  # all opposite to a row of their class, past ArcFace's turning point
    x = near(x, p)
    expected = by_loops(x, p, LABELS)
    same(loss(x, p, LABELS, impl=impl), expected, (x, p), 1e-9)
    owner = module(C, D, centers_per_class=K, impl=impl).double()
    owner.proxies.data = p.detach().clone()
    torch.testing.assert_close(owner(x, LABELS), expected.detach(), rtol=1e-9, atol=1e-9)


def gradients(loss: Tensor, x: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    dx, dp = torch.autograd.grad(loss, (x, leaf))
    return dx, dp if dp.dim() == 3 else dp.T.reshape(C, K, D)


@pytest.mark.parametrize("impl", IMPLS)
def test_pytorch_metric_learning_has_the_same_sub_center_arc_face(impl: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, p = problem()
    x = near(x, p)
    own = fastret.SubCenterArcFace(C, D, 0.6, 20.0, K, impl=impl).double()
    own.proxies.data = p.detach().clone()
    other = losses.SubCenterArcFaceLoss(
        num_classes=C, embedding_size=D, margin=math.degrees(0.6), scale=20, sub_centers=K
    )
    other.W.data = p.detach().flatten(0, 1).T.clone()
    loss, expected = own(x, LABELS), other(x, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    pair = gradients(loss, x, own.proxies), gradients(expected, x, other.W)
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_pytorch_metric_learning_has_the_same_soft_triple(impl: str, tau: float) -> None:
    """Its regulariser is another class, with a small number under the root, and its weight a factor of the loss."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")
    x, p = problem()
    options = {"la": 12.0, "gamma": 0.2, "margin": 0.05}
    own = fastret.SoftTriple(C, D, K, **options, tau=tau, impl=impl).double()
    own.proxies.data = p.detach().clone()
    other = losses.SoftTripleLoss(
        C,
        D,
        K,
        **options,
        weight_regularizer=regularizers.SparseCentersRegularizer(C, K) if tau else None,
        weight_reg_weight=tau or 1,
    )
    other.fc.data = p.detach().flatten(0, 1).T.clone()
    loss, expected = own(x, LABELS), other(x, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    pair = gradients(loss, x, own.proxies), gradients(expected, x, other.fc)
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_center_is_a_proxy(impl: str) -> None:
    x, p = problem()
    single = p[:, :1]
    same(F.soft_triple(x, single, LABELS, impl=impl), F.cos_face(x, p[:, 0], LABELS, margin=0.01, scale=20), (x, p))
    same(F.sub_center_arc_face(x, single, LABELS, impl=impl), F.arc_face(x, p[:, 0], LABELS), (x, p))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_loss
def test_gradcheck_through_the_kernels(impl: str, reduction: str, name: str) -> None:
    learned = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def run(x: Tensor, p: Tensor, value: Tensor) -> Tensor:
        return FAMILY[name][0](x, p, LABELS, reduction=reduction, impl=impl, **{LEARNED[name]: value})

    x, p = problem()
    assert torch.autograd.gradcheck(run, (near(x, p), p, learned))


@every_loss
def test_reference_differentiates_twice(name: str) -> None:
    x, p = problem(3, 3)
    run = lambda x, p: FAMILY[name][0](x, p, torch.tensor([0, 2, 1]), impl="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, (x, p))


@pytest.mark.parametrize("impl", FUSED)
@every_loss
def test_no_second_derivative_is_an_error(impl: str, name: str) -> None:
    x, p = problem()
    (gradient,) = torch.autograd.grad(FAMILY[name][0](x, p, LABELS, impl=impl), p, create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@every_loss
def test_reductions(impl: str, name: str) -> None:
    loss, inputs = FAMILY[name][0], problem()
    none = loss(*inputs, LABELS, reduction="none", impl=impl)
    assert none.shape == (9,)
    same(loss(*inputs, LABELS, reduction="sum", impl=impl), none.sum(), inputs)
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
    assert sum(kept.values()) <= 48 * (rows + classes) < 4 * rows * classes
    loss.backward()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@every_loss
def test_identities(impl: str, name: str) -> None:
    """Classes, their centres and rows may be renumbered, lengths do not count, gradients have no radial part."""
    loss = FAMILY[name][0]
    x, p = problem()
    value = loss(x, p, LABELS, impl=impl)
    order, centers, rows = torch.randperm(C), torch.randperm(K), torch.randperm(9)
    torch.testing.assert_close(loss(x[rows], p[order][:, centers], order.argsort()[LABELS[rows]], impl=impl), value)
    torch.testing.assert_close(loss(4 * x, p * torch.rand(C, K, 1), LABELS.to(torch.int16), impl=impl), value)
    for side, gradient in zip((x, p), torch.autograd.grad(value, (x, p)), strict=True):
        radial = (side * gradient).sum(-1)
        torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_loss
def test_small_batches_and_centers_that_coincide(impl: str, reduction: str, name: str) -> None:
    loss = FAMILY[name][0]
    x, p = problem()
    for rows in (0, 1):
        value = loss(x[:rows], p, LABELS[:rows], reduction=reduction, impl=impl).sum()
        assert value > 0 if rows else value == 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, (x, p)))
    for centers in (torch.zeros_like(p), p[:, :1].detach().expand(-1, K, -1), p[:, :1].detach() * torch.ones(K, 1)):
        centers = centers.clone().requires_grad_()
        value = loss(x, centers, LABELS, reduction=reduction, impl=impl)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), centers)[0].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_loss
def test_bad_values_are_never_hidden(impl: str, bad: float, name: str) -> None:
    for side in range(2):
        inputs = [t.detach().clone() for t in problem()]
        inputs[side][4, ..., 1] = bad
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
def test_modules_keep_their_centers_start_at_class_means_and_cite(name: str) -> None:
    module, other = FAMILY[name][1](C, D), FAMILY[name][1](C, D)
    other.load_state_dict(module.state_dict())
    assert list(module.state_dict()) == ["proxies"]
    assert torch.equal(other.proxies, module.proxies)
    assert repr(pickle.loads(pickle.dumps(module))) == repr(copy.deepcopy(module)) == repr(module)
    count = module.proxies.shape[1]
    assert f"11, {count}, 5" in repr(module)
    assert "title=" in type(module).citation
    x = torch.randn(9, D)
    before = module(x, LABELS)
    module.init_from(x, LABELS)
    assert module(x, LABELS) < before
    other.init_from_loader(torch.nn.Identity(), [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])])
    units = normalize(x)
    for owner in (module, other):
        torch.testing.assert_close(owner.proxies.norm(dim=2), torch.ones(C, count))
        for label in set(LABELS.tolist()):
            toward = normalize(units[LABELS.eq(label)].mean(0) - units.mean(0), dim=0)
            assert (owner.proxies[label] @ toward > 0.9).all()
        assert (torch.cdist(owner.proxies, owner.proxies) + 9 * torch.eye(count) > 1e-3).all()


# center_distances: what the regulariser is a sum of


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("centers", [1, 2, 7])
def test_center_distances(impl: str, centers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastret.backends.tiled.center_distances.ELEMENTS", 100)  # several pieces, and a tail
    w = torch.randn(13 * centers, 4, dtype=F64, requires_grad=True)
    units = normalize(w).view(13, centers, 4)
    pairs = [(s, t) for s in range(centers) for t in range(s)]
    expected = torch.stack([sum(((u[s] - u[t]).norm() for s, t in pairs), 0 * u.sum()) for u in units])
    rows, sums = center_distances(w, centers, impl=impl)
    assert torch.equal(rows, w)
    same(sums, expected, (w,))
    weight = torch.randn_like(w)
    same((rows.square() * weight).sum() + sums.sin().sum(), (w.square() * weight).sum() + expected.sin().sum(), (w,))

    def run(w: Tensor) -> Tensor:
        rows, sums = center_distances(w, centers, impl=impl)
        return (rows.square() * weight).sum() + sums.sin().sum()

    assert torch.autograd.gradcheck(run, w)
    torch.testing.assert_close(torch.func.grad(run)(w.detach()), torch.autograd.grad(run(w), w)[0])
    assert center_distances(w[:0], centers, impl=impl)[1].shape == (0,)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_dense_gradient_of_the_centers(autocast: bool) -> None:
    """The reduction's own gradient, with the regulariser's added to it, is what the parameter gets."""
    p = torch.randn(6, 4, requires_grad=True)
    made = []

    class Reduction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, rows: Tensor) -> Tensor:
            return rows.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            made.append(torch.full((6, 4), 3.0))
            return made[0]

    rows, sums = center_distances(p, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (gradient,) = torch.autograd.grad(Reduction.apply(rows) + sums.sum(), p)
    assert gradient.data_ptr() == made[0].data_ptr()
    (expected,) = torch.autograd.grad(center_distances(p, 3, impl="reference")[1].sum(), p)
    torch.testing.assert_close(gradient, expected + 3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_close_centers_keep_their_direction(impl: str, gap: float) -> None:
    """In float32, where sqrt(2 - 2 cos) would have lost it: 2 - 2 cos is 1e-6 and 1e-10 here."""
    w = normalize(torch.randn(8, 1, 6) + gap * torch.randn(8, 2, 6), dim=2).flatten(0, 1).requires_grad_()
    exact = w.detach().to(F64).requires_grad_()
    value, expected = center_distances(w, 2, impl=impl)[1], center_distances(exact, 2, impl="reference")[1]
    tolerance = 4 * torch.finfo(torch.float32).eps / gap
    torch.testing.assert_close(value.to(F64), expected, rtol=tolerance, atol=0)
    (gradient,), (wanted,) = (torch.autograd.grad(v.sum(), leaf) for v, leaf in ((value, w), (expected, exact)))
    assert (gradient - wanted).norm() <= tolerance * wanted.norm()


def test_center_distances_is_a_registered_operator() -> None:
    w, grad = torch.randn(12, 3), torch.randn(4)
    torch.library.opcheck(torch.ops.fastret.center_distances.default, (w, 3))
    torch.library.opcheck(torch.ops.fastret.center_distances_backward.default, (w, grad, w, 3))


X, P = torch.randn(9, D), torch.randn(C, K, D)


@every_loss
def test_bad_rows_and_labels(name: str) -> None:
    loss, module, _ = FAMILY[name]
    for labels, error, message in (
        (LABELS + 1, ValueError, "labels: expected numbers from 0 to 10, got 11"),
        (LABELS * math.nan, TypeError, "labels: expected an integer dtype"),
        (LABELS[:4], ValueError, r"labels: expected shape \(9,\)"),
    ):
        with pytest.raises(error, match=message):
            loss(X, P, labels)
    for proxies, error, message in (
        (P[:, 0], ValueError, r"proxies: expected shape \(classes, centers, width\), got \(11, 5\)"),
        (P[:, :0], ValueError, r"proxies: expected shape \(classes, centers, width\), got \(11, 0, 5\)"),
        (None, TypeError, "proxies: expected a tensor.*got NoneType"),
        (P[:1], ValueError, "proxies: expected at least 2 rows, one a class, got 1"),
        (P[..., 1:], ValueError, "proxies: expected 5 columns"),
    ):
        with pytest.raises(error, match=message):
            loss(X, proxies, LABELS * 0)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        loss(X, P, LABELS, reduction="max")
    with pytest.raises(ValueError, match="centers_per_class: expected at least 1, got 0"):
        module(C, D, centers_per_class=0)
    with pytest.raises(ValueError, match="nb_classes: expected at least 2, got 1"):
        module(1, D)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"{LEARNED[name]}: expected a positive"):
            module(C, D, **{LEARNED[name]: wrong})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": 0.0}, ValueError, "gamma: expected a positive"),
        ({"gamma": torch.tensor(0.1)}, TypeError, "gamma: expected a number, got Tensor"),
        ({"tau": -0.1}, ValueError, "tau: expected a number >= 0, got -0.1"),
        ({"tau": math.nan}, ValueError, "tau: expected a finite number"),
        ({"margin": -0.1}, ValueError, "margin: expected a number from 0 to below inf, got -0.1"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastret.SoftTriple(C, D, **options)
