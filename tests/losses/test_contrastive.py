"""InfoNCE, CLIP, SupCon, NT-Xent, CQC, soft targets and instance softmax against the official formulas written out
densely, and against pytorch-metric-learning."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

import fastret
from fastret import functional as F
from fastret.backends import registry
from fastret.backends.registry import Call

F64 = torch.float64
IMPLS = [
    impl
    for impl in ("reference", "tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]


def rows(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]


def same(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values and equal gradients; unused inputs have gradient 0."""
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    gradients = [
        torch.autograd.grad(7 * value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in (loss, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("given", ["diagonal", "more keys", "index", "symmetric"])
def test_info_nce(impl: str, learned: bool, unit: bool, given: str) -> None:
    n, m = 9, 9 if given in ("diagonal", "symmetric") else 14
    query, key = rows((n, 5), (m, 5))
    tau = torch.tensor(0.2, dtype=F64, requires_grad=True) if learned else 0.2
    target = torch.randint(0, m, (n,)) if given == "index" else None
    module = fastret.InfoNCE(tau, symmetric=given == "symmetric", normalize=unit, impl=impl)
    logits = (normalize(query) @ normalize(key).T if unit else query @ key.T) / tau
    positive = torch.arange(n) if target is None else target
    expected = cross_entropy(logits, positive)
    if given == "symmetric":
        expected = (expected + cross_entropy(logits.T, positive)) / 2
    same(module(query, key, target), expected, [query, key, *([tau] if learned else [])])


@pytest.mark.parametrize("impl", IMPLS)
def test_clip_as_open_clip(impl: str) -> None:
    image, text = rows((8, 6), (8, 6))
    parameter = torch.tensor(math.log(1 / 0.07), dtype=F64, requires_grad=True)
    logits = parameter.exp() * image @ text.T
    truth = torch.arange(8)
    expected = (cross_entropy(logits, truth) + cross_entropy(logits.T, truth)) / 2
    same(fastret.CLIPLoss(impl=impl)(image, text, parameter.exp()), expected, [image, text, parameter])


def dense_sup_con(s: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """Mean over anchors with positives of -mean over positives of log P."""
    log_p = s - torch.where(candidate, s, -math.inf).logsumexp(1, keepdim=True)
    anchors = positive.any(1)
    return -(torch.where(positive, log_p, 0).sum(1) / positive.sum(1).clamp_min(1))[anchors].mean()


def dense_nt_xent(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Mean over positive pairs of -log(e^p / (e^p + sum of negatives))."""
    losses = []
    for a, p in positive.nonzero().tolist():
        negatives = s[a][negative[a]]
        losses.append(torch.cat([s[a, p][None], negatives]).logsumexp(0) - s[a, p])
    return torch.stack(losses).mean()


LABELS = torch.tensor([3, -1, 3, 8, 3, 100, -1, 8, 8, 7])
GALLERY_LABELS = torch.tensor([3, -1, 5, 8, 3, 7, 7, 2, 8])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("loss", "dense"), [(fastret.SupCon, dense_sup_con), (fastret.NTXent, dense_nt_xent)])
def test_labelled_losses(
    impl: str, gallery: bool, learned: bool, loss: type[torch.nn.Module], dense: Callable[..., Tensor]
) -> None:
    x, y = rows((10, 5), (9, 5))
    tau = torch.tensor(0.3, dtype=F64, requires_grad=True) if learned else 0.3
    others = GALLERY_LABELS if gallery else LABELS
    given = {"ref_emb": y, "ref_labels": others} if gallery else {}
    equal = LABELS[:, None] == others
    itself = torch.zeros_like(equal) if gallery else torch.eye(10, dtype=torch.bool)
    s = normalize(x) @ normalize(y if gallery else x).T / tau
    expected = dense(s, equal & ~itself, ~itself if dense is dense_sup_con else ~equal)
    same(loss(tau, impl=impl)(x, LABELS, **given), expected, [x, y, *([tau] if learned else [])])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_pytorch_metric_learning_agrees(impl: str, gallery: bool, name: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = rows((24, 6), (30, 6))
    labels, others = torch.randint(0, 7, (24,)), torch.randint(0, 7, (30,))
    given = {"ref_emb": y, "ref_labels": others} if gallery else {}
    theirs = getattr(losses, name)(temperature=0.1)(x, labels, **given)
    mine = {"SupConLoss": fastret.SupCon, "NTXentLoss": fastret.NTXent}[name](0.1, impl=impl)(x, labels, **given)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    wanted = [x, y] if gallery else [x]
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted), torch.autograd.grad(theirs, wanted), rtol=1e-5, atol=1e-6
    )


def official_cqc(halves: list[Tensor], tau: float) -> Tensor:
    """The official program: a (2N, 2N) matrix of cosines, its diagonal dropped, cross-entropy of the positive first."""
    total = halves[0].new_zeros(())
    xa, xb, za, zb = halves
    n = len(xa)
    for u in (torch.cat([xa, zb]), torch.cat([xb, za])):
        s = torch.nn.functional.cosine_similarity(u[:, None], u[None], dim=2) / tau
        positive = torch.cat([s.diagonal(n), s.diagonal(-n)])[:, None]
        image = torch.arange(2 * n) % n
        negative = s[image[:, None] != image].view(2 * n, -1)
        total = total + cross_entropy(
            torch.cat([positive, negative], 1), torch.zeros(2 * n, dtype=torch.int64), reduction="sum"
        )
    return total / (2 * n)


def dense_cqc(halves: list[Tensor], tau: float, pairs: str, included: bool) -> Tensor:
    xa, xb, za, zb = map(normalize, halves)
    n = len(xa)
    if pairs == "cross" and not included:
        problems = [(xa, zb, 0, torch.eye(n)), (xb, za, 0, torch.eye(n))]
    elif pairs == "cross":
        problems = [(torch.cat([xa, xb]), torch.cat([za, zb]), n, torch.eye(2 * n))]
    else:
        problems = []
        for u in (torch.cat([xa, zb]), torch.cat([xb, za])):
            problems.append((u, u, n, torch.eye(2 * n) if included else torch.eye(n).repeat(2, 2)))
    total = halves[0].new_zeros(())
    for x, y, shift, excluded in problems:
        s = x @ y.T / tau
        positive = s[torch.arange(len(x)), (torch.arange(len(x)) + shift) % len(x)]
        total = total + (torch.where(excluded.bool(), -math.inf, s).logsumexp(1) - positive).sum()
    return total / (2 * n)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pairs", ["stacked", "cross"])
@pytest.mark.parametrize("included", [True, False])
def test_cqc(impl: str, pairs: str, included: bool) -> None:
    halves = rows(*[(7, 5)] * 4)
    module = fastret.CQCLoss(None, 7, 0.5, pairs=pairs, positive_in_denominator=included, impl=impl)
    same(module(*halves), dense_cqc(halves, 0.5, pairs, included), halves)
    if pairs == "stacked" and included:
        same(module(*halves), official_cqc(halves, 0.5), halves)


def test_cqc_batch_size_is_not_fixed_and_tau_may_be_learned() -> None:
    halves, tau = rows(*[(5, 4)] * 4), torch.tensor(0.4, dtype=F64, requires_grad=True)
    loss = fastret.CQCLoss("cuda:0", 512, tau, impl="tiled")(*halves)
    same(loss, dense_cqc(halves, tau, "stacked", True), [*halves, tau])


def patchmix_labels(kind: str, b: int, m: int, s: float, offset: int, columns: int) -> Tensor:
    """As the official mixer builds them: scatter into a matrix of s / C."""
    labels = torch.full((b, columns), s / columns, dtype=F64)
    for i in range(b):
        if kind == "origin":
            places = {i: 1.0}
        elif kind == "mix-to-origin":
            places = {(i + j) % b: 1 / m for j in range(m)}
        else:
            places = {(i + d) % b: (1 - abs(d) / m) / m for d in range(1 - m, m)}
        for column, value in places.items():
            labels[i, offset + column] = (1 - s) * value + s / columns
    return labels


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["origin", "mix-to-origin", "mix-to-mix"])
@pytest.mark.parametrize(("m", "smoothing", "offset", "columns"), [(2, 0.0, 0, 9), (3, 0.1, 9, 27), (5, 0.3, 4, 20)])
def test_patchmix_contrasts(impl: str, kind: str, m: int, smoothing: float, offset: int, columns: int) -> None:
    b = 9
    query, key = rows((b, 6), (columns, 6))
    tau = torch.tensor(0.2, dtype=F64, requires_grad=True)
    targets = fastret.PatchMixTargets(kind, b, m, smoothing=smoothing, offset=offset, columns=columns)
    labels = patchmix_labels(kind, b, m, smoothing, offset, columns)
    torch.testing.assert_close(targets.dense(), labels)
    torch.testing.assert_close(labels.sum(1), torch.ones(b, dtype=F64))
    expected = cross_entropy(normalize(query) @ normalize(key).T / tau, labels)
    module = fastret.SoftTargetInfoNCE(tau, impl=impl)
    for given in (targets, labels):
        same(module(query, key, given, detach_keys=False), expected, [query, key, tau])
        same(module(query, key, given), expected, [query, tau])
        assert torch.autograd.grad(module(query, key, given), key, allow_unused=True) == (None,)


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_targets_of_any_row_sum(impl: str) -> None:
    query, key = rows((6, 4), (8, 4))
    labels = torch.rand(6, 8, dtype=F64)
    expected = cross_entropy(normalize(query) @ normalize(key).T / 0.3, labels)
    same(fastret.SoftTargetInfoNCE(0.3, impl=impl)(query, key, labels), expected, [query])


@pytest.mark.parametrize("impl", IMPLS)
def test_instance_softmax(impl: str) -> None:
    (x,), bank = rows((6, 5)), torch.randn(40, 5, dtype=F64)
    index = torch.randint(0, 40, (6,))
    expected = cross_entropy(normalize(x) @ normalize(bank).T / 0.07, index)
    same(fastret.InstanceSoftmax(impl=impl)(x, index, bank), expected, [x])


X, Y, L = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) // 2
CALLS: dict[str, tuple[Callable[..., Tensor], int]] = {  # a call with (x, y, **options), values of "none"
    "info_nce": (lambda x, y, **o: F.info_nce(x, y, **o), 8),
    "info_nce, symmetric": (lambda x, y, **o: F.info_nce(x, y, symmetric=True, **o), 8),
    "info_nce, index": (lambda x, y, **o: F.info_nce(x, y, L, **o), 8),
    "clip": (lambda x, y, **o: F.clip(x, y, 10.0, **o), 8),
    "sup_con": (lambda x, y, **o: F.sup_con(x, L, **o) + 0 * y.sum(), 8),
    "sup_con, gallery": (lambda x, y, **o: F.sup_con(x, L, ref_emb=y, ref_labels=L, **o), 8),
    "nt_xent": (lambda x, y, **o: F.nt_xent(x, L, **o) + 0 * y.sum(), 8),
    "nt_xent, gallery": (lambda x, y, **o: F.nt_xent(x, L, ref_emb=y, ref_labels=L, **o), 16),
    "cqc": (lambda x, y, **o: F.cqc(x, y, 2 * x + y, x - y, **o), 32),
    "cqc, cross": (lambda x, y, **o: F.cqc(x, y, 2 * x + y, x - y, pairs="cross", **o), 16),
    "soft targets": (lambda x, y, **o: F.soft_target_info_nce(x, y, torch.ones(8, 8) / 8, detach_keys=False, **o), 8),
    "patchmix": (
        lambda x, y, **o: F.soft_target_info_nce(
            x, y, fastret.PatchMixTargets("mix-to-mix", 8, 2, smoothing=0.1), detach_keys=False, **o
        ),
        8,
    ),
    "instance_softmax": (lambda x, y, **o: F.instance_softmax(x, L, y, **o), 8),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_reductions_differentiate_alike(impl: str, name: str) -> None:
    call, count = CALLS[name]
    x, y = rows((8, 4), (8, 4))
    none = call(x, y, reduction="none", impl=impl)
    assert none.shape == (count,)
    divisor = 16 if name.startswith("cqc") else count  # 2N of CQC, N rows or P pairs of the others
    for reduction, factor in (("sum", 1.0), ("mean", 1 / divisor)):
        same(call(x, y, reduction=reduction, impl=impl), none.sum() * factor, [x, y])


@pytest.mark.parametrize("name", CALLS)
def test_low_precision_and_autocast(name: str) -> None:
    call, _ = CALLS[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = (t.detach().to(dtype, copy=True).requires_grad_() for t in (X, Y))
        loss = call(x, y, impl="tiled")
        assert loss.dtype == torch.float32
        loss.backward()
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert call(torch.nn.Linear(4, 4)(X), Y, impl="tiled").dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_values_are_never_hidden(impl: str, name: str, bad: float, reduction: str) -> None:
    x = X.clone()
    x[5, 1] = bad
    assert CALLS[name][0](x, Y, impl=impl, reduction=reduction).mean().isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_show_where_nothing_is_positive(impl: str, bad: float) -> None:
    x = X.clone()
    x[5, 1] = bad
    assert F.nt_xent(x, torch.arange(8), impl=impl).isnan()
    assert F.nt_xent(X, torch.arange(8), ref_emb=x, ref_labels=torch.arange(8, 16), impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(impl: str, name: str, reduction: str) -> None:
    call, _ = CALLS[name]
    x, y = rows((8, 4), (8, 4))
    recomputed = checkpoint(lambda a, b: call(a, b, reduction=reduction, impl=impl).sum(), x, y, use_reentrant=False)
    same(recomputed, call(x, y, reduction=reduction, impl=impl).sum(), [x, y])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["info_nce", "sup_con", "nt_xent", "cqc", "patchmix"])
def test_half_precision_temperature_is_used_as_given(impl: str, name: str) -> None:
    """0.07 is 0.0698 in bfloat16; one over that is 14.3125 there, and 14.3218 where logits are computed."""
    call, _ = CALLS[name]
    half = torch.tensor(0.07, dtype=torch.bfloat16)
    loss, expected = (call(X, Y, temperature=tau, impl=impl) for tau in (half, half.float()))
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(name: str, reduction: str) -> None:
    torch._dynamo.reset()
    call, _ = CALLS[name]
    x, y = rows((8, 4), (8, 4))
    x, y = x.detach().float().requires_grad_(), y.detach().float().requires_grad_()
    run = torch.compile(
        lambda a, b: call(a, b, reduction=reduction, impl="tiled").sum(), fullgraph=True, backend="aot_eager"
    )
    loss, expected = run(x, y), call(x, y, reduction=reduction, impl="tiled").sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(expected, (x, y)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pairs", ["stacked", "cross"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cqc_of_one_image(impl: str, pairs: str, reduction: str) -> None:
    """Without the positive nothing is left in the denominator."""
    inputs = rows(*[(1, 4)] * 4)
    loss = F.cqc(*inputs, pairs=pairs, positive_in_denominator=False, reduction=reduction, impl=impl)
    assert not loss.any()
    loss.sum().backward()
    assert not any(t.grad.any() for t in inputs)
    bad = F.cqc(inputs[0] * math.nan, *inputs[1:], pairs=pairs, positive_in_denominator=False, impl=impl)
    assert bad.isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", [F.sup_con, F.nt_xent])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_degenerate_batches(impl: str, loss: Callable[..., Tensor], reduction: str) -> None:
    def value(labels: list[int], gallery: list[int] | None = None) -> Tensor:
        x = torch.randn(len(labels), 4, requires_grad=True)
        given = {}
        if gallery is not None:
            given = {"ref_emb": torch.randn(len(gallery), 4), "ref_labels": torch.tensor(gallery, dtype=torch.int64)}
        names = torch.tensor(labels, dtype=torch.int64)
        result = loss(x, names, **given, reduction=reduction, impl=impl)
        result.sum().backward()
        assert x.grad.isfinite().all()
        assert result.isfinite().all()
        return result.detach().sum()

    assert value([]) == value([3]) == value([1, 2, 3]) == 0
    assert value([1, 2], [3, 4, 4]) == value([1, 2], []) == 0
    assert value([2, 2]).abs() < 1e-6  # the positive is the only candidate
    assert value([1, 2, 2]) > 0
    assert value([5] * 4) >= 0


def test_modules_copy_and_cite() -> None:
    modules = [
        fastret.InfoNCE(0.2),
        fastret.CLIPLoss(),
        fastret.SupCon(0.2),
        fastret.NTXent(0.2),
        fastret.CQCLoss(tau_cqc=0.2),
        fastret.SoftTargetInfoNCE(0.25),
        fastret.InstanceSoftmax(0.2),
    ]
    for module in modules:
        assert repr(copy.deepcopy(module)) == repr(pickle.loads(pickle.dumps(module))) == repr(module)
        assert "title=" in type(module).citation
    assert "0.2" in repr(modules[0])


T = fastret.PatchMixTargets
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "zero temperature": (lambda: fastret.InfoNCE(0), ValueError, "temperature: expected a positive.*got 0"),
    "NaN temperature": (lambda: F.sup_con(X, L, temperature=math.nan), ValueError, "temperature: .*got nan"),
    "NaN tensor": (lambda: F.nt_xent(X, L, temperature=torch.tensor(math.nan)), ValueError, "temperature: .*nan"),
    "negative scale": (
        lambda: F.clip(X, Y, -1.0),
        ValueError,
        "logit_scale: expected a positive.*got -1",
    ),
    "negative tau_cqc": (lambda: fastret.CQCLoss(None, 8, -0.5), ValueError, "tau_cqc: expected a positive"),
    "reduction": (lambda: fastret.SupCon(reduction="max"), ValueError, "reduction: expected one of.*got 'max'"),
    "few keys": (lambda: F.info_nce(X, Y[:5]), ValueError, "key: expected at least 8 rows like the queries, got 5"),
    "unequal sides": (
        lambda: F.info_nce(X[:5], Y, symmetric=True),
        ValueError,
        "key: expected 5 rows like the queries, got 8",
    ),
    "symmetric with target": (
        lambda: F.info_nce(X, Y, L, symmetric=True),
        ValueError,
        "target: expected None with symmetric=True",
    ),
    "target beyond": (lambda: F.info_nce(X, Y, L + 6), ValueError, "target: expected numbers from 0 to 7, got 8"),
    "target below": (lambda: F.info_nce(X, Y, L - 1), ValueError, "target: expected numbers from 0 to 7, got -1"),
    "target length": (lambda: F.info_nce(X, Y, L[:3]), ValueError, r"target: expected shape \(8,\)"),
    "float target": (lambda: F.info_nce(X, Y, L.float()), TypeError, "target: expected an integer dtype"),
    "width": (lambda: F.info_nce(X, Y[:, :3]), ValueError, "key: expected 4 columns like the queries, got 3"),
    "device": (lambda: F.info_nce(X, Y.to("meta")), ValueError, "key: expected device cpu"),
    "unequal clip": (lambda: F.clip(X, Y[:5], 1.0), ValueError, "text_features: expected 8 rows, got 5"),
    "labels": (lambda: F.sup_con(X, L[:5]), ValueError, r"labels: expected shape \(8,\)"),
    "gallery alone": (lambda: F.nt_xent(X, L, ref_emb=Y), ValueError, "ref_emb, ref_labels: expected both"),
    "gallery labels": (
        lambda: F.sup_con(X, L, ref_emb=Y, ref_labels=L[:3]),
        ValueError,
        r"ref_labels: expected shape \(8,\)",
    ),
    "unequal views": (lambda: F.cqc(X, X, X[:3], X), ValueError, "Za: expected 8 rows like Xa, got 3"),
    "pairs": (lambda: fastret.CQCLoss(pairs="all"), ValueError, "pairs: expected one of stacked, cross, got 'all'"),
    "kind": (lambda: T("mixed", 8, 2), ValueError, "kind: expected one of origin.*got 'mixed'"),
    "labels collide": (
        lambda: T("mix-to-mix", 4, 3),
        ValueError,
        "batch: expected at least 2m - 1 = 5.*got 4",
    ),
    "and to origin": (lambda: T("mix-to-origin", 4, 3), ValueError, "collide"),
    "no m": (lambda: T("mix-to-mix", 8, None), TypeError, "m: expected an integer, got NoneType"),
    "offset as a float": (lambda: T("origin", 8, 1, offset=1.5), TypeError, "offset: expected an integer, got float"),
    "no keys": (
        lambda: F.soft_target_info_nce(X, Y[:0], torch.ones(8, 0)),
        ValueError,
        "key: expected at least one row, got none",
    ),
    "temperature elsewhere": (
        lambda: F.info_nce(X, Y, temperature=torch.ones((), device="meta")),
        ValueError,
        "temperature: expected device cpu like the rows, got meta",
    ),
    "m of zero": (lambda: T("origin", 4, 0), ValueError, "m: expected at least 1, got 0"),
    "smoothing": (
        lambda: T("origin", 4, 1, smoothing=2),
        ValueError,
        "smoothing: expected.*0 to 1, got 2",
    ),
    "offset": (lambda: T("origin", 4, 1, offset=-1), ValueError, "offset: expected at least 0"),
    "columns": (lambda: T("origin", 4, 1, offset=2, columns=5), ValueError, "columns: expected at least.*= 6, got 5"),
    "batch of targets": (
        lambda: F.soft_target_info_nce(X, Y, T("origin", 4, 1)),
        ValueError,
        "targets: expected a batch of 8 like the queries, got 4",
    ),
    "columns of targets": (
        lambda: F.soft_target_info_nce(X, Y, T("origin", 8, 1, columns=16)),
        ValueError,
        "targets: expected columns for 8 keys, got 16",
    ),
    "dense targets": (
        lambda: F.soft_target_info_nce(X, Y, torch.ones(8, 7)),
        ValueError,
        r"targets: expected shape \(8, 8\), a column per key, got \(8, 7\)",
    ),
    "integer targets": (
        lambda: F.soft_target_info_nce(X, Y, torch.eye(8, dtype=torch.int64)),
        TypeError,
        "targets: expected a floating point tensor or a PatchMixTargets, got torch.int64",
    ),
    "bank index": (
        lambda: F.instance_softmax(X, L + 9, torch.ones(10, 4)),
        ValueError,
        "index: expected numbers from 0 to 9, got 10",
    ),
    "bank width": (lambda: F.instance_softmax(X, L, torch.ones(10, 5)), ValueError, "bank: expected 4 columns"),
    "impl": (lambda: F.info_nce(X, Y, impl="gpu"), ValueError, "impl: expected one of.*got 'gpu'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
