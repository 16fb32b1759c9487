"""Invariant and spreading instance loss against the official program written out densely, and its gradient formula."""

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
FUSED = [impl for impl in IMPLS if impl != "reference"]


def rows(count: int, width: int = 5) -> Tensor:
    return torch.randn(count, width, dtype=F64, requires_grad=True)


def dense(x: Tensor, temperature: float | Tensor, m: float, detach_columns: bool = True) -> Tensor:
    """(2b,) the official program: exponentials of all pairs, the diagonal out; with m = 1 the pair is one of them."""
    n = len(x)
    e = torch.exp(x @ (x.detach() if detach_columns else x).T / temperature) * (1 - torch.eye(n, dtype=F64))
    pair = e[torch.arange(n), (torch.arange(n) + n // 2) % n]
    total = e.sum(1) if m == 1 else (e.sum(1) - pair) * m + pair
    others = torch.log(1 - e / total[:, None]).sum(1) - torch.log(1 - pair / total)
    return -(torch.log(pair / total) + m * others)


def gradient_formula(x: Tensor, temperature: float, m: float) -> Tensor:
    """W x, of the rows' side: W_ij = (V_ij - [j = pair] + m ([j negative] P_ij / (1 - P_ij) - V_ij Q_i)) / (n T)."""
    n = len(x)
    i = torch.arange(n)
    pair = i[:, None] == (i + n // 2) % n
    negative = ~pair & (i[:, None] != i)
    weight = m * negative + 1.0 * pair
    e = torch.exp(x @ x.T / temperature)
    p = e / (e * weight).sum(1, keepdim=True)
    v, odds = p * weight, torch.where(negative, p / (1 - p), 0)
    w = (v - 1.0 * pair + m * (odds - v * odds.sum(1, keepdim=True))) / (n * temperature)
    torch.testing.assert_close(w.sum(1), torch.zeros(n, dtype=F64), atol=1e-12, rtol=0)
    return w @ x


def equal(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients from an upstream one of 7."""
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-11)
    gradients = [torch.autograd.grad(7 * value.sum(), inputs, retain_graph=True) for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.fixture(params=[False, True], ids=["one tile", "several tiles"])
def tile_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(tiled, "ROWS", 5)
        monkeypatch.setattr(tiled, "COLUMNS", 7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("m", [1, 2, 4.5])
@pytest.mark.parametrize("detach_columns", [True, False])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.usefixtures("tile_sizes")
def test_official_program(impl: str, m: float, detach_columns: bool, unit: bool) -> None:
    x, t = rows(16), torch.tensor(0.4, dtype=F64, requires_grad=True)
    expected = dense(normalize(x) if unit else x, t, m, detach_columns)
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum()), ("none", expected)):
        options: dict[str, Any] = {"detach_columns": detach_columns, "normalize": unit, "impl": impl}
        module = fastret.InvariantSpreading(m, t, 128, **options, reduction=reduction)
        equal(module(x, torch.arange(16)), value, [x, t])
        call = F.invariant_spreading(x, temperature=0.4, negative_weight=m, **options, reduction=reduction)
        equal(call, value, [x])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("m", [1, 2])
def test_gradient_formula(impl: str, m: float) -> None:
    x = normalize(rows(12, 6).detach()).requires_grad_()
    loss = fastret.InvariantSpreading(m, 0.1, 12, normalize=False, impl=impl)(x)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gradient_formula(x.detach(), 0.1, m))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("detach_columns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_certain_mistake_is_finite(impl: str, detach_columns: bool, dtype: torch.dtype) -> None:
    """Rows 0 and 1 are one image to the loss, their second views are far away: P_01 = 1, log(1 - P_01) = -inf."""
    x = torch.tensor([[1, 0], [1, 0], [-1, 0], [0, 1]], dtype=dtype, requires_grad=True)
    assert dense(x.detach().double(), 0.01, 1).isinf().any()
    losses = F.invariant_spreading(x, temperature=0.01, detach_columns=detach_columns, reduction="none", impl=impl)
    assert losses.isfinite().all()
    assert losses[0] > -math.log(2 * torch.finfo(dtype).eps)
    losses.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("detach_columns", [True, False])
def test_small_batches(impl: str, m: float, detach_columns: bool) -> None:
    options: dict[str, Any] = {"negative_weight": m, "detach_columns": detach_columns, "impl": impl}
    for count in (0, 2):  # one image has nothing to be told from
        x = rows(count)
        loss = F.invariant_spreading(x, **options)
        assert loss == 0
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))
    x = rows(4)
    equal(F.invariant_spreading(x, **options), dense(normalize(x), 0.1, m, detach_columns).mean(), [x])
    x = torch.ones(6, 3, requires_grad=True)
    loss = F.invariant_spreading(x, **options)
    share = 1 / (1 + 4 * m)
    torch.testing.assert_close(loss.item(), -math.log(share) - 4 * m * math.log(1 - share), rtol=1e-5, atol=0)
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("detach_columns", [True, False])
def test_order_of_images_and_views_does_not_matter(impl: str, detach_columns: bool) -> None:
    x, order = rows(14), torch.randperm(7)
    module = fastret.InvariantSpreading(2, 0.3, detach_columns=detach_columns, impl=impl)
    equal(module(torch.cat([x[7:][order], x[:7][order]])), module(x), [x])
    equal(module(5 * x), module(x), [x])
    torch.testing.assert_close(
        (torch.autograd.grad(module(x), x)[0] * x).sum(1), torch.zeros(14, dtype=F64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    x, t = rows(6, 3), torch.tensor(0.5, dtype=F64, requires_grad=True)
    for m in (1.0, 2.0):
        torch.autograd.gradcheck(
            lambda u, s, m=m: F.invariant_spreading(
                u, temperature=s, negative_weight=m, detach_columns=False, reduction="none", impl=impl
            ),
            (x, t),
        )


def test_double_backward_of_the_definition() -> None:
    x = rows(6, 3)
    torch.autograd.gradgradcheck(
        lambda u: F.invariant_spreading(u, temperature=0.5, detach_columns=False, impl="reference"), x
    )


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("detach_columns", [True, False])
def test_torch_transforms(impl: str, detach_columns: bool) -> None:
    torch._dynamo.reset()
    x, t = rows(8).detach().float().requires_grad_(), torch.tensor(0.3, requires_grad=True)

    def loss(u: Tensor, s: Tensor) -> Tensor:
        return F.invariant_spreading(u, temperature=s, negative_weight=2, detach_columns=detach_columns, impl=impl)

    expected = torch.autograd.grad(loss(x, t), (x, t))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), loss(x, t))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, t), (x, t)), expected)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, t), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("detach_columns", [True, False])
def test_low_precision(impl: str, detach_columns: bool) -> None:
    x = torch.randn(12, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = x.to(dtype, copy=True).requires_grad_()
        loss = F.invariant_spreading(low, detach_columns=detach_columns, impl=impl)
        exact = F.invariant_spreading(low.double(), detach_columns=detach_columns, impl="reference")
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=1e-6)
        loss.backward()
        assert low.grad.dtype == dtype
        assert low.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.invariant_spreading(torch.nn.Linear(8, 8)(x), impl=impl).dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_values_are_never_hidden(impl: str, bad: float, reduction: str) -> None:
    x = torch.randn(8, 4)
    x[5, 1] = bad
    for detach_columns in (True, False):
        loss = F.invariant_spreading(x, detach_columns=detach_columns, reduction=reduction, impl=impl)
        assert loss.mean().isnan()


@pytest.mark.parametrize("impl", FUSED)
def test_what_is_kept_for_backward_grows_with_n(impl: str) -> None:
    n, width, kept = 600, 4, {}

    def count(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(n, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        F.invariant_spreading(x, impl=impl).backward()
    assert sum(kept.values()) < 4 * n * (width + 40)


def test_copies_and_cites() -> None:
    module = fastret.InvariantSpreading(2, 0.2, 256)
    assert repr(copy.deepcopy(module)) == repr(pickle.loads(pickle.dumps(module))) == repr(module)
    assert "T=0.2" in repr(module)
    assert "title=" in module.citation


X = torch.randn(8, 4)
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "odd": (lambda: F.invariant_spreading(X[:5]), ValueError, "embeddings: expected an even number of rows.*got 5"),
    "vector": (lambda: F.invariant_spreading(X[0]), ValueError, r"embeddings: expected shape \(rows, width\)"),
    "temperature": (lambda: fastret.InvariantSpreading(1, 0.0), ValueError, "temperature: expected a positive"),
    "negM": (lambda: fastret.InvariantSpreading(0), ValueError, "negative_weight: expected at least 1, got 0"),
    "negM below 1": (
        lambda: F.invariant_spreading(X, negative_weight=0.5),
        ValueError,
        "negative_weight: expected at least 1, got 0.5",
    ),
    "NaN negM": (lambda: fastret.InvariantSpreading(math.nan), ValueError, "negative_weight: expected .*got nan"),
    "tensor negM": (
        lambda: F.invariant_spreading(X, negative_weight=torch.tensor(1.0)),
        TypeError,
        "negative_weight: expected a number, got Tensor",
    ),
    "batchSize": (lambda: fastret.InvariantSpreading(1, 0.1, 0), ValueError, "batchSize: expected at least 1"),
    "reduction": (lambda: fastret.InvariantSpreading(reduction="max"), ValueError, "reduction: expected one of"),
    "impl": (lambda: F.invariant_spreading(X, impl="gpu"), ValueError, "impl: expected one of.*got 'gpu'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
