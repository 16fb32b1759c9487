"""ProxyNCA against the reference codes written out densely, and against pytorch-metric-learning."""

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


def smoothed(labels: Tensor, classes: int, s: float) -> Tensor:
    targets = torch.full((len(labels), classes), s / (classes - 1), dtype=F64)
    targets[torch.arange(len(labels)), labels] = 1 - s
    return targets


def code_of_2020(x: Tensor, p: Tensor, labels: Tensor, s: float, sx: float, sp: float) -> Tensor:
    """The reference repository's last version."""
    distances = torch.cdist(sx * normalize(x), sp * normalize(p)).square()
    return torch.sum(-smoothed(labels, len(p), s) * torch.log_softmax(-distances, -1), -1).mean()


def code_of_2019(x: Tensor, p: Tensor, labels: Tensor, s: float, sx: float, sp: float) -> Tensor:
    """Its version before, which articles list: all pairs of the concatenation, and +D."""
    both = torch.cat([sx * normalize(x), sp * normalize(p)])
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares - 2 * both @ both.T).clamp(min=0)[: len(x), len(x) :]
    return (-smoothed(labels, len(p), s) * torch.log_softmax(distances, -1)).sum(-1).mean()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("sign", "code"), [(-1, code_of_2020), (1, code_of_2019)])
@pytest.mark.parametrize("s", [0.0, 0.1, 0.75])
@pytest.mark.parametrize(("sx", "sp"), [(3.0, 3.0), (1.0, 8.0)])
def test_reference_codes(impl: str, sign: int, code: Callable[..., Tensor], s: float, sx: float, sp: float) -> None:
    x, p = problem()
    loss = F.proxy_nca(x, p, LABELS, smoothing=s, scaling_x=sx, scaling_p=sp, sign=sign, impl=impl)
    same(loss, code(x, p, LABELS, s, sx, sp), (x, p))


@pytest.mark.parametrize("impl", IMPLS)
def test_paper_leaves_the_positive_out(impl: str) -> None:
    x, p = problem()
    distances = (9 + 9 - 18 * normalize(x) @ normalize(p).T).clamp(min=0)
    own = distances.gather(1, LABELS[:, None])[:, 0]
    others = distances.masked_fill(torch.nn.functional.one_hot(LABELS, C).bool(), math.inf)
    same(F.proxy_nca(x, p, LABELS, include_positive=False, impl=impl), (own + (-others).logsumexp(1)).mean(), (x, p))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_pytorch_metric_learning_agrees(impl: str, scale: float) -> None:
    theirs = pytest.importorskip("pytorch_metric_learning.losses").ProxyNCALoss(C, D, softmax_scale=scale)
    x, p = problem()
    theirs.proxies.data = p.detach().clone()
    root = math.sqrt(scale)
    mine = fastret.ProxyNCA(C, D, scaling_x=root, scaling_p=root, impl=impl).double()
    mine.proxies.data = p.detach().clone()
    loss, expected = mine(x, LABELS), theirs(x, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (x, mine.proxies)),
        torch.autograd.grad(expected, (x, theirs.proxies)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.2}, {"include_positive": False}])
def test_plus_d_is_minus_d_of_opposite_proxies(impl: str, options: dict[str, object]) -> None:
    x, p = problem()
    same(
        F.proxy_nca(x, p, LABELS, sign=1, impl=impl, **options),
        F.proxy_nca(x, -p, LABELS, impl=impl, **options),
        (x, p),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_both_names_of_the_width_and_the_positional_call(impl: str) -> None:
    x, _ = problem()
    first, second = fastret.ProxyNCA(C, D, 0.1, impl=impl), fastret.ProxyNCA(C, sz_embedding=D, smoothing_const=0.1)
    second.load_state_dict(first.state_dict())
    assert second.state_dict().keys() == {"proxies"}
    torch.testing.assert_close(first.double()(x, LABELS), second.double()(x, LABELS))
    assert repr(pickle.loads(pickle.dumps(first))) == repr(copy.deepcopy(first)) == repr(first)
    assert "11, 5" in repr(first)
    assert "smoothing_const=0.1" in repr(first)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{"smoothing": 0.3}, {"include_positive": False}, {"sign": 1}])
def test_gradcheck_through_the_kernels(impl: str, reduction: str, options: dict[str, object]) -> None:
    sx, sp = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.5, 0.8))

    def run(x: Tensor, p: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.proxy_nca(x, p, LABELS, scaling_x=a, scaling_p=b, reduction=reduction, impl=impl, **options)

    assert torch.autograd.gradcheck(run, (*problem(), sx, sp))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"smoothing": 0.3}, {"include_positive": False}])
def test_reductions(impl: str, options: dict[str, object]) -> None:
    inputs = problem()
    none = F.proxy_nca(*inputs, LABELS, reduction="none", impl=impl, **options)
    assert none.shape == (9,)
    same(F.proxy_nca(*inputs, LABELS, reduction="sum", impl=impl, **options), none.sum(), inputs)
    same(F.proxy_nca(*inputs, LABELS, impl=impl, **options), none.mean(), inputs)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_of_size_batch_times_classes_is_kept(impl: str, reduction: str) -> None:
    rows, classes = 64, 300
    x, p = problem(rows, classes, torch.float32)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in (x.data_ptr(), p.data_ptr()):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.proxy_nca(x, p, torch.arange(rows), smoothing=0.1, reduction=reduction, impl=impl).sum()
    gradients = 4 * (x.numel() + p.numel()) if reduction == "mean" else 0
    assert sum(kept.values()) <= gradients + 16 * (rows + classes)
    loss.backward()
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_identities(impl: str) -> None:
    """Classes may be renumbered, lengths do not count, gradients have no radial part, and equal targets are uniform."""
    x, p = problem()
    loss = F.proxy_nca(x, p, LABELS, smoothing=0.1, impl=impl)
    order = torch.randperm(C)
    torch.testing.assert_close(F.proxy_nca(x, p[order], order.argsort()[LABELS], smoothing=0.1, impl=impl), loss)
    torch.testing.assert_close(F.proxy_nca(4 * x, p * torch.rand(C, 1), LABELS, smoothing=0.1, impl=impl), loss)
    for rows, gradient in zip((x, p), torch.autograd.grad(loss, (x, p)), strict=True):
        torch.testing.assert_close((rows * gradient).sum(1), torch.zeros(len(rows), dtype=F64), rtol=0, atol=1e-12)
    evenly = [F.proxy_nca(x, p, t, smoothing=(C - 1) / C, impl=impl) for t in (LABELS, (LABELS + 1) % C)]
    torch.testing.assert_close(*evenly)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_batches_and_proxies_of_no_length(impl: str) -> None:
    x, p = problem()
    for rows in (0, 1):
        loss = F.proxy_nca(x[:rows], p, LABELS[:rows], smoothing=0.1, impl=impl)
        gradients = torch.autograd.grad(loss, (x, p))
        assert loss > 0 if rows else loss == 0
        assert all(g.isfinite().all() for g in gradients)
    assert F.proxy_nca(x[:0], p, LABELS[:0], reduction="none", impl=impl).shape == (0,)
    for classes in (2, 3):
        assert F.proxy_nca(x, p[:classes], LABELS % classes, impl=impl).isfinite()
    zero = torch.zeros_like(p).requires_grad_()
    loss = F.proxy_nca(x, zero, LABELS, impl=impl)
    torch.testing.assert_close(loss, torch.tensor(math.log(C), dtype=F64))
    assert torch.autograd.grad(loss, zero)[0].isfinite().all()
    for dtype in (torch.uint8, torch.int8, torch.int32):
        torch.testing.assert_close(F.proxy_nca(x, p, LABELS.to(dtype), impl=impl), F.proxy_nca(x, p, LABELS, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"smoothing": 0.2}, {"include_positive": False}])
def test_bad_values_are_never_hidden(impl: str, bad: float, options: dict[str, object]) -> None:
    for side in range(2):
        inputs = [t.detach().clone() for t in problem()]
        inputs[side][4, 1] = bad
        assert F.proxy_nca(*inputs, LABELS, impl=impl, **options).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", FUSED)
def test_low_precision(impl: str, dtype: torch.dtype) -> None:
    x, p = (t.detach().to(dtype).requires_grad_() for t in problem())
    loss = F.proxy_nca(x, p, LABELS, smoothing=0.1, impl=impl)
    assert loss.dtype == torch.float32
    expected = F.proxy_nca(x.to(F64), p.to(F64), LABELS, smoothing=0.1, impl="reference")
    torch.testing.assert_close(loss.to(F64), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, (x, p))
    assert [g.dtype for g in gradients] == [dtype, dtype]
    module = fastret.ProxyNCA(C, D, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.nn.Linear(D, D)(torch.randn(9, D)), LABELS).backward()
    assert module.proxies.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(impl: str, reduction: str) -> None:
    torch._dynamo.reset()
    for options in ({"smoothing_const": 0.1}, {"include_positive": False}):
        module = fastret.ProxyNCA(C, D, reduction=reduction, impl=impl, **options).double()
        x, _ = problem()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        same(compiled(x, LABELS), module(x, LABELS), (x, module.proxies))


def dense_means(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    centred = normalize(embeddings) - normalize(embeddings).mean(0)
    return normalize(torch.stack([centred[labels == c].sum(0) for c in range(classes)]))


@pytest.mark.parametrize("sign", [-1, 1])
def test_class_means(sign: int) -> None:
    embeddings = torch.randn(9, D) + 2
    module = fastret.ProxyNCA(C, D, sign=sign)
    module.init_from(embeddings, LABELS.to(torch.uint8))
    seen = LABELS.unique()
    torch.testing.assert_close(module.proxies[seen].detach(), -sign * dense_means(embeddings, LABELS, C)[seen])
    torch.testing.assert_close(module.proxies.detach().norm(dim=1), torch.ones(C))
    assert module.proxies.requires_grad
    better = module(embeddings, LABELS)
    assert better < fastret.ProxyNCA(C, D, sign=sign)(embeddings, LABELS)
    module.init_from(embeddings, torch.zeros_like(LABELS))  # one class alone: its mean is that of all rows
    torch.testing.assert_close(module.proxies.detach().norm(dim=1), torch.ones(C))
    embeddings[4, 2] = math.nan
    module.init_from(embeddings, LABELS)
    assert module.proxies[7].isnan().all()


def test_class_means_of_a_loader(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, D), torch.nn.BatchNorm1d(D), torch.nn.Dropout(0.5))
    model[1].eval()  # frozen, as some recipes have it
    inputs = torch.randn(9, 3)
    pairs = torch.utils.data.TensorDataset(inputs, LABELS)
    module = fastret.ProxyNCA(C, D)
    module.init_from_loader(model, torch.utils.data.DataLoader(pairs, batch_size=4))
    assert "class means" in capsys.readouterr().err
    assert [m.training for m in model] == [True, False, True]
    assert not model[1].running_mean.any()
    with torch.no_grad():
        expected = dense_means(model.eval()(inputs), LABELS, C)
    seen = LABELS.unique()
    torch.testing.assert_close(module.proxies[seen].detach(), expected[seen])
    model.train()
    with pytest.raises(ValueError, match="labels: expected numbers from 0 to 10, got 12"):
        module.init_from_loader(model, [(inputs, LABELS + 2)])
    assert model.training


X, P = torch.randn(9, D), torch.randn(C, D)
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "label beyond": (
        lambda: F.proxy_nca(X, P, LABELS + 1),
        ValueError,
        "labels: expected numbers from 0 to 10, got 11",
    ),
    "label below": (lambda: F.proxy_nca(X, P, LABELS - 1), ValueError, "labels: expected numbers from 0 to 10, got -1"),
    "floating labels": (lambda: F.proxy_nca(X, P, LABELS * math.nan), TypeError, "labels: expected an integer dtype"),
    "label count": (lambda: F.proxy_nca(X, P, LABELS[:4]), ValueError, r"labels: expected shape \(9,\)"),
    "one class": (lambda: F.proxy_nca(X, P[:1], LABELS * 0), ValueError, "proxies: expected at least 2 rows"),
    "width": (lambda: F.proxy_nca(X, P[:, 1:], LABELS), ValueError, "proxies: expected 5 columns"),
    "smoothing below": (
        lambda: F.proxy_nca(X, P, LABELS, smoothing=-0.1),
        ValueError,
        "smoothing: expected a number from 0 to .*got -0.1",
    ),
    "smoothing of one": (lambda: F.proxy_nca(X, P, LABELS, smoothing=1.0), ValueError, "smoothing: expected.*got 1.0"),
    "smoothing of NaN": (lambda: fastret.ProxyNCA(C, D, math.nan), ValueError, "smoothing: expected.*got nan"),
    "smoothing of two classes": (lambda: fastret.ProxyNCA(2, D, 0.6), ValueError, "smoothing: expected.*to 0.5,"),
    "smoothing as text": (lambda: fastret.ProxyNCA(C, D, "0.1"), TypeError, "smoothing: expected a number, got str"),
    "smoothing without the positive": (
        lambda: fastret.ProxyNCA(C, D, 0.1, include_positive=False),
        ValueError,
        "smoothing: expected 0 with include_positive=False, got 0.1",
    ),
    "scaling_x": (lambda: fastret.ProxyNCA(C, D, scaling_x=0), ValueError, "scaling_x: expected a positive"),
    "scaling_p": (lambda: fastret.ProxyNCA(C, D, scaling_p=-1), ValueError, "scaling_p: expected a positive"),
    "sign": (lambda: fastret.ProxyNCA(C, D, sign=0), ValueError, "sign: expected -1 or 1, got 0"),
    "reduction": (lambda: fastret.ProxyNCA(C, D, reduction="max"), ValueError, "reduction: expected one of"),
    "nb_classes": (lambda: fastret.ProxyNCA(1, D), ValueError, "nb_classes: expected at least 2, got 1"),
    "nb_classes type": (lambda: fastret.ProxyNCA(2.0, D), TypeError, "nb_classes: expected an integer, got float"),
    "sz_embed": (lambda: fastret.ProxyNCA(C, 0), ValueError, "sz_embed: expected at least 1, got 0"),
    "no width": (lambda: fastret.ProxyNCA(C), ValueError, "sz_embed: expected it or sz_embedding, got None and None"),
    "two widths": (lambda: fastret.ProxyNCA(C, D, sz_embedding=D), ValueError, "sz_embed: expected it or sz_embedding"),
    "batch width": (lambda: fastret.ProxyNCA(C, D + 1)(X, LABELS), ValueError, "proxies: expected 5 columns"),
    "init width": (
        lambda: fastret.ProxyNCA(C, D + 1).init_from(X, LABELS),
        ValueError,
        "embeddings: expected 6 columns like the proxies, got 5",
    ),
    "init labels": (lambda: fastret.ProxyNCA(C, D).init_from(X, LABELS + 5), ValueError, "labels: .*got 15"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_reference_constructor_by_position() -> None:
    module = fastret.ProxyNCA(C, D, 0.1, 1, 3)
    assert (module.smoothing_const, module.scaling_x, module.scaling_p) == (0.1, 1, 3)


def test_a_loader_without_rows_starts_nothing() -> None:
    with pytest.raises(ValueError, match="loader: expected at least one row, got none"):
        fastret.ProxyNCA(C, D).init_from_loader(torch.nn.Identity(), [])
