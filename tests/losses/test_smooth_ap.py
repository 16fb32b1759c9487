"""Smooth-AP against the published formula, written out as the official code materialises it, and against loops."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import fastret
from fastret.functional import smooth_ap

F64 = torch.float64
IMPLS = ("reference", "tiled", "cpu")


def official(x: Tensor, num_id: int, tau: float) -> Tensor:
    """The N x N x N formulation of Smooth-AP on unit rows: equal consecutive classes, exponent clamped at +-50."""
    n = len(x)
    group = n // num_id

    def steps(scores: Tensor) -> Tensor:
        """sum over j != i of step(s_qj - s_qi), (..., n) for (..., n) scores of a query's list."""
        size = scores.shape[-1]
        difference = scores[..., None, :] - scores[..., :, None]
        step = 1 / (1 + torch.exp(torch.clamp(-difference / tau, -50, 50)))
        return (step * (1 - torch.eye(size, dtype=x.dtype))).sum(-1)

    rank_all = 1 + steps(x @ x.T)
    blocks = x.view(num_id, group, -1)
    rank_pos = 1 + steps(blocks @ blocks.transpose(1, 2))
    total = x.new_zeros(())
    for c in range(num_id):
        rows = slice(c * group, (c + 1) * group)
        total = total + (rank_pos[c] / rank_all[rows, rows]).sum() / group
    return 1 - total / n


def by_loops(x: Tensor, labels: Tensor, y: Tensor, y_labels: Tensor, tau: float, skip_self: bool) -> list[float | None]:
    """1 - AP of each query; None where it has no positive."""
    unit = torch.nn.functional.normalize
    s = (unit(x) @ unit(y).T).tolist()
    losses: list[float | None] = []
    for q in range(len(x)):
        items = [j for j in range(len(y)) if not (skip_self and j == q)]
        positives = [i for i in items if y_labels[i] == labels[q]]
        total = 0.0
        for i in positives:
            step = {j: 1 / (1 + math.exp(-(s[q][j] - s[q][i]) / tau)) for j in items if j != i}
            total += (1 + sum(step[j] for j in positives if j != i)) / (1 + sum(step.values()))
        losses.append(1 - total / len(positives) if positives else None)
    return losses


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("classes", "group"), [(4, 3), (3, 5), (12, 4), (1, 6), (6, 1)])
@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_official_constructor_call_and_value(impl: str, classes: int, group: int, tau: float) -> None:
    n = classes * group
    x = torch.nn.functional.normalize(torch.randn(n, 8, dtype=F64)).requires_grad_()
    loss = fastret.SmoothAP(tau, n, classes, 8, impl=impl)(x)
    expected = official(x, classes, tau)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert loss.shape == ()
    raw = fastret.SmoothAP(tau, n, classes, 8, normalize=False, impl=impl)(
        x
    )  # the official gradient is that of raw dots
    (mine,), (theirs,) = torch.autograd.grad(raw, x), torch.autograd.grad(expected, x)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("include_self", [True, False])
def test_any_labels_by_loops(impl: str, include_self: bool) -> None:
    x = torch.randn(23, 6, dtype=F64)
    labels = torch.tensor([5, -3, 5, 8, 5, 100, -3, 5, 8, 8, 7, 7, 5, -3, 7, 7, 7, 7, 7, 0, 0, 1, 2])[
        torch.randperm(23)
    ]
    options = {"temperature": 0.05, "include_self": include_self, "impl": impl}
    expected = by_loops(x, labels, x, labels, 0.05, not include_self)
    values = [e for e in expected if e is not None]
    none = smooth_ap(x, labels, **options, reduction="none")
    torch.testing.assert_close(none, torch.tensor([e or 0.0 for e in expected], dtype=F64), rtol=1e-10, atol=1e-12)
    assert smooth_ap(x, labels, **options).item() == pytest.approx(sum(values) / len(values), rel=1e-10)
    assert smooth_ap(x, labels, **options, reduction="sum").item() == pytest.approx(sum(values), rel=1e-10)
    assert len(values) == (23 if include_self else 20)  # 100, 1 and 2 are alone in their class


@pytest.mark.parametrize("impl", IMPLS)
def test_query_against_gallery_by_loops(impl: str) -> None:
    x, y = torch.randn(9, 5, dtype=F64), torch.randn(14, 5, dtype=F64)
    labels, y_labels = torch.randint(0, 5, (9,)), torch.randint(1, 6, (14,))
    expected = by_loops(x, labels, y, y_labels, 0.1, False)
    loss = fastret.SmoothAP(0.1, reduction="none", impl=impl)(x, labels, ref_emb=y, ref_labels=y_labels)
    torch.testing.assert_close(loss, torch.tensor([e or 0.0 for e in expected], dtype=F64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions_differentiate_alike(impl: str) -> None:
    x, labels = torch.randn(15, 4, dtype=F64, requires_grad=True), torch.randint(0, 8, (15,))
    options = {"temperature": 0.2, "include_self": False, "impl": impl}
    none = smooth_ap(x, labels, **options, reduction="none")
    valid = int((labels[:, None] == labels).sum(1).gt(1).sum())
    (of_none,) = torch.autograd.grad(none.sum(), x)
    (of_sum,) = torch.autograd.grad(smooth_ap(x, labels, **options, reduction="sum"), x)
    (of_mean,) = torch.autograd.grad(smooth_ap(x, labels, **options) * 7, x)  # upstream 7
    torch.testing.assert_close(of_none, of_sum)
    torch.testing.assert_close(of_mean, of_sum * 7 / valid)


@pytest.mark.parametrize("impl", ["tiled", "cpu"])
def test_permuting_the_batch(impl: str) -> None:
    x, labels, order = torch.randn(40, 6, dtype=F64), torch.arange(40) // 5, torch.randperm(40)
    a, b = x.clone().requires_grad_(), x[order].clone().requires_grad_()
    first, second = smooth_ap(a, labels, impl=impl), smooth_ap(b, labels[order], impl=impl)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    first.backward()
    second.backward()
    torch.testing.assert_close(a.grad[order], b.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("impl", ["tiled", "cpu"])
def test_scale_of_the_rows_does_not_matter(impl: str) -> None:
    x, labels = torch.randn(20, 6, dtype=F64), torch.arange(20) // 4
    scaled = x * torch.rand(20, 1, dtype=F64).mul(5).add(0.1)
    torch.testing.assert_close(smooth_ap(x, labels, impl=impl), smooth_ap(scaled, labels, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_degenerate_batches(impl: str) -> None:
    def loss(x: Tensor, labels: list[int], **options: object) -> Tensor:
        value = smooth_ap(x, torch.tensor(labels, dtype=torch.int64), temperature=0.1, impl=impl, **options)
        value.backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        return value

    def rows(n: int) -> Tensor:
        return torch.randn(n, 4, requires_grad=True)

    assert loss(rows(0), []) == 0
    assert loss(rows(1), [3]) == 0  # its own only item, at rank 1
    assert loss(rows(1), [3], include_self=False) == 0  # skipped
    assert loss(rows(5), [1, 2, 3, 4, 5], include_self=False) == 0
    assert loss(rows(6), [2] * 6).abs() < 1e-6  # all relevant
    same = torch.ones(6, 4, requires_grad=True)
    assert loss(same, [0, 0, 0, 1, 1, 1]).item() == pytest.approx(1 - 2 / 3.5)  # ties count a half
    x = rows(3)
    singleton = loss(x, [0, 1, 2])
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    others = torch.sigmoid((s - s.diagonal()[:, None]) / 0.1).sum(1) - 0.5
    assert singleton.item() == pytest.approx((1 - 1 / (1 + others)).mean().item(), abs=1e-6)


@pytest.mark.parametrize("impl", ["tiled", "cpu"])
def test_temperature_may_be_learned(impl: str) -> None:
    x, labels = torch.randn(12, 5, dtype=F64), torch.arange(12) // 3
    tau = torch.tensor(0.1, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(fastret.SmoothAP(tau, impl=impl)(x, labels), tau)
    (expected,) = torch.autograd.grad(smooth_ap(x, labels, temperature=tau, impl="reference"), tau)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


def test_blocks_do_not_depend_on_the_batch_size() -> None:
    x = torch.randn(24, 5, dtype=F64)
    loss = fastret.SmoothAP(0.1, batch_size=12, num_id=3)
    torch.testing.assert_close(loss(x), smooth_ap(x, torch.arange(24) // 4, temperature=0.1))
    torch.testing.assert_close(fastret.SmoothAP(0.1, num_id=3)(x), smooth_ap(x, torch.arange(24) // 8, temperature=0.1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_labels_of_any_dtype(dtype: torch.dtype) -> None:
    x, labels = torch.randn(12, 4, dtype=F64), torch.arange(12) % 5
    torch.testing.assert_close(smooth_ap(x, labels.to(dtype)), smooth_ap(x, labels))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(impl: str, dtype: torch.dtype) -> None:
    x, labels = torch.randn(40, 6).to(dtype).requires_grad_(), torch.arange(40) // 4
    expected = smooth_ap(x, labels, impl=impl)
    (gradient,) = torch.autograd.grad(expected, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = smooth_ap(x, labels, impl=impl)
        (under_autocast,) = torch.autograd.grad(loss, x)
    assert torch.equal(loss, expected)
    if impl != "reference":  # PyTorch differentiates that one, and autocasts the products of its backward
        assert torch.equal(under_autocast, gradient)


def test_labels_of_different_integer_dtypes() -> None:
    x, y, labels = torch.randn(12, 4, dtype=F64), torch.randn(8, 4, dtype=F64), torch.arange(12) % 5
    wide = smooth_ap(x, labels, ref_emb=y, ref_labels=labels[:8])
    mixed = smooth_ap(x, labels.to(torch.uint8), ref_emb=y, ref_labels=labels[:8].to(torch.int16))
    torch.testing.assert_close(mixed, wide)


def test_include_self_has_no_effect_on_a_gallery() -> None:
    x, labels = torch.randn(12, 4, dtype=F64), torch.arange(12) // 3
    options = {"ref_emb": x, "ref_labels": labels}
    torch.testing.assert_close(
        smooth_ap(x, labels, include_self=False, **options), smooth_ap(x, labels, include_self=True, **options)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "gallery"])
@pytest.mark.parametrize("matched", [True, False])
def test_bad_values_show_where_no_positive_sees_them(impl: str, bad: float, where: str, matched: bool) -> None:
    """Raw dot products with an infinite row are infinite: bounded sigmoids of them look harmless."""
    x, y = torch.randn(5, 4), torch.randn(7, 4)
    (x if where == "query" else y)[3] = bad
    labels = torch.tensor([0, 1, 2, 9, 1])
    y_labels = torch.tensor([0, 1, 2, 8, 0, 1, 2]) if matched else torch.full((7,), 7)
    loss = smooth_ap(x, labels, ref_emb=y, ref_labels=y_labels, normalize=False, temperature=0.1, impl=impl)
    assert loss.isnan()


def test_autocast_and_mixed_dtypes() -> None:
    net, labels = torch.nn.Linear(6, 8), torch.arange(12) // 3
    x, y = torch.randn(12, 6), torch.randn(9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = net(x)
        assert embeddings.dtype == torch.bfloat16
        loss = fastret.SmoothAP()(embeddings, labels)
        mixed = fastret.SmoothAP()(embeddings, labels, ref_emb=y, ref_labels=torch.arange(9) // 3)
    assert loss.dtype == mixed.dtype == torch.float32
    (loss + mixed).backward()
    assert net.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["official", "labels", "no gradient", "dynamic", "gallery"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    torch._dynamo.reset()
    labels = torch.tensor([0, 1, 1, 2, 0, 5] * 4)
    module = fastret.SmoothAP(0.1, 24, 6, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=kind == "dynamic" or None)
    for n in (24, 48) if kind == "dynamic" else (24,):
        x = torch.randn(n, 5, dtype=F64, requires_grad=kind != "no gradient")
        given = (x, labels) if kind in ("labels", "gallery") else (x,)
        other = {"ref_emb": x, "ref_labels": labels} if kind == "gallery" else {}
        loss, expected = compiled(*given, **other), module(*given, **other)
        torch.testing.assert_close(loss, expected)
        if kind != "no gradient":
            torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_inductor_smoke() -> None:
    torch._dynamo.reset()
    x = torch.randn(24, 5, requires_grad=True)
    module = fastret.SmoothAP(0.1, 24, 6, 5)
    loss = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(loss, module(x))
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(module(x), x)[0])


def test_checkpointing_and_copies() -> None:
    x, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) // 3
    module = fastret.SmoothAP(0.05, include_self=False, reduction="sum")
    expected = module(x, labels)
    recomputed = torch.utils.checkpoint.checkpoint(module, x, labels, use_reentrant=False)
    (gradient,) = torch.autograd.grad(recomputed, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(x, labels), expected)
    assert "0.05" in repr(module)
    assert "Smooth" in fastret.SmoothAP.citation


X, L = torch.randn(6, 4), torch.arange(6) // 2
BAD_CALLS = {
    "labels of another length": (lambda: smooth_ap(X, L[:5]), ValueError, r"labels: expected shape \(6,\).*got \(5,\)"),
    "float labels": (
        lambda: smooth_ap(X, L.float()),
        TypeError,
        "labels: expected an integer dtype, got torch.float32",
    ),
    "bool labels": (lambda: smooth_ap(X, L > 0), TypeError, "labels: expected an integer dtype, got torch.bool"),
    "labels as a list": (lambda: smooth_ap(X, [0] * 6), TypeError, "labels: expected an integer tensor.*got list"),
    "labels of two axes": (lambda: smooth_ap(X, L[None]), ValueError, r"labels: expected shape.*got \(1, 6\)"),
    "one axis": (lambda: smooth_ap(X[0], L), ValueError, r"embeddings: expected shape \(rows, width\), got \(4,\)"),
    "three axes": (lambda: smooth_ap(X[None], L), ValueError, r"embeddings: expected shape.*got \(1, 6, 4\)"),
    "no columns": (lambda: smooth_ap(X[:, :0], L), ValueError, "embeddings: expected at least one column"),
    "integer embeddings": (lambda: smooth_ap(X.long(), L), TypeError, "embeddings: expected float32.*got torch.int64"),
    "an array": (lambda: smooth_ap(X.numpy(), L), TypeError, "embeddings: expected a tensor.*got ndarray"),
    "zero temperature": (lambda: smooth_ap(X, L, temperature=0), ValueError, "temperature: expected a positive.*got 0"),
    "negative anneal": (
        lambda: fastret.SmoothAP(-0.1),
        ValueError,
        "anneal: expected a positive finite number, got -0.1",
    ),
    "NaN anneal": (
        lambda: fastret.SmoothAP(math.nan),
        ValueError,
        "anneal: expected a positive finite number, got nan",
    ),
    "infinite anneal": (lambda: fastret.SmoothAP(math.inf), ValueError, "anneal: expected a positive finite number"),
    "anneal as text": (lambda: fastret.SmoothAP("0.1"), TypeError, "anneal: expected a number, got str"),
    "NaN tensor temperature": (
        lambda: smooth_ap(X, L, temperature=torch.tensor(math.nan)),
        ValueError,
        "temperature: expected a positive.*nan",
    ),
    "temperature per row": (
        lambda: smooth_ap(X, L, temperature=torch.ones(6)),
        ValueError,
        "temperature: expected a number or a 0-dim",
    ),
    "batch_size not divisible": (
        lambda: fastret.SmoothAP(0.01, 10, 3, 4),
        ValueError,
        "batch_size: expected a multiple of num_id = 3, got 10",
    ),
    "batch not divisible": (
        lambda: fastret.SmoothAP(0.01, 8, 2)(X),
        ValueError,
        "preds: expected a multiple of 4 rows.*got 6",
    ),
    "batch not divisible by num_id": (
        lambda: fastret.SmoothAP(num_id=4)(X),
        ValueError,
        "preds: expected a multiple of 4 rows.*got 6",
    ),
    "neither labels nor num_id": (
        lambda: fastret.SmoothAP(batch_size=6)(X),
        ValueError,
        "labels: expected labels, or num_id",
    ),
    "num_id of zero": (lambda: fastret.SmoothAP(num_id=0), ValueError, "num_id: expected at least 1, got 0"),
    "fractional num_id": (lambda: fastret.SmoothAP(num_id=2.0), TypeError, "num_id: expected an integer, got float"),
    "gallery of another width": (
        lambda: smooth_ap(X, L, ref_emb=torch.randn(3, 5), ref_labels=L[:3]),
        ValueError,
        "ref_emb: expected 4 columns.*got 5",
    ),
    "gallery on another device": (
        lambda: smooth_ap(X, L, ref_emb=torch.empty(3, 4, device="meta"), ref_labels=L[:3]),
        ValueError,
        "ref_emb: expected device cpu like the queries, got meta",
    ),
    "labels on another device": (
        lambda: smooth_ap(X, torch.empty(6, dtype=torch.int64, device="meta")),
        ValueError,
        "labels: expected device cpu",
    ),
    "gallery without labels": (lambda: smooth_ap(X, L, ref_emb=X), ValueError, "ref_emb, ref_labels: expected both"),
    "gallery but no labels": (
        lambda: fastret.SmoothAP(num_id=3)(X, ref_emb=X, ref_labels=L),
        ValueError,
        "labels: expected labels of the queries",
    ),
    "gallery labels of another length": (
        lambda: smooth_ap(X, L, ref_emb=X, ref_labels=L[:4]),
        ValueError,
        r"ref_labels: expected shape \(6,\)",
    ),
    "unknown reduction": (
        lambda: smooth_ap(X, L, reduction="max"),
        ValueError,
        "reduction: expected one of.*got 'max'",
    ),
    "unknown impl": (lambda: smooth_ap(X, L, impl="gpu"), ValueError, "impl: expected one of.*got 'gpu'"),
    "impl of another device": (
        lambda: smooth_ap(X.to("meta"), L.to("meta"), impl="cpu"),
        ValueError,
        "impl='cpu' cannot serve.*not on meta",
    ),
    "wrong samples_per_class": (
        lambda: smooth_ap(X, L, samples_per_class=3),
        ValueError,
        "samples_per_class: expected 3",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
