"""The centroid bound on the triplet loss against its formula and against the sum over all triplets."""

import copy
import math

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
    for impl in ("tiled", "cpu")  # what has row_extrema has heads that sum a phi
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("row_extrema", "cpu", torch.float32)) is None
]
IMPLS = ["reference", *FUSED]
C, D = 7, 5
LABELS = torch.tensor([3, 0, 6, 3, 4, 4, 1, 3, 2])


def problem(rows: int = 9, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(n, D, dtype=dtype).requires_grad_() for n in (rows, C))


def dense(x: Tensor, c: Tensor, labels: Tensor, unit: bool) -> Tensor:
    """(B,) row by row, centroid by centroid."""
    x, c = (normalize(x), normalize(c)) if unit else (x, c)
    losses = []
    for row, y in zip(x, labels.tolist(), strict=True):
        others = [(row - c[j]).norm() for j in range(len(c)) if j != y]
        losses.append((row - c[y]).norm() - torch.stack(others).sum() / (3 * (len(c) - 1)))
    return torch.stack(losses)


def gradients(value: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(7 * value.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unit", [True, False])
def test_formula(impl: str, unit: bool) -> None:
    x, c = problem()
    expected = dense(x, c, LABELS, unit)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = F.centroid_triplet(x, c, LABELS, normalize=unit, reduction=reduction, impl=impl)
        fixed = F.centroid_triplet(x, c.detach(), LABELS, normalize=unit, reduction=reduction, impl=impl)
        torch.testing.assert_close(fixed, value, rtol=1e-11, atol=1e-11)
        of_rows = [torch.autograd.grad(7 * v.sum(), x, retain_graph=True) for v in (fixed, value)]
        torch.testing.assert_close(*of_rows, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(loss, value, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients(loss, (x, c)), gradients(value, (x, c)), rtol=1e-9, atol=1e-10)
    module = fastret.CentroidTriplet(c, normalize=unit, impl=impl)
    torch.testing.assert_close(module(x, LABELS), expected.mean())


@pytest.mark.parametrize("impl", IMPLS)
def test_it_bounds_all_triplets(impl: str) -> None:
    """G times the loss is no less than the sum over all triplets of d(anchor, positive) - d(anchor, negative)."""
    classes, per_class, width = 4, 3, 6
    labels = torch.arange(classes).repeat_interleave(per_class)
    factor = 3 * (classes - 1) * (per_class - 1) * per_class
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = normalize(torch.randn(classes * per_class, width, dtype=F64, generator=generator))
        bound = factor * F.centroid_triplet(x, torch.eye(classes, width), labels, reduction="sum", impl=impl)
        d, same = torch.cdist(x, x), labels[:, None] == labels
        triplets = sum(
            (d[i][same[i]].sum() * (~same[i]).sum() - d[i][~same[i]].sum() * (same[i].sum() - 1)) for i in range(len(x))
        )
        assert triplets <= bound


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("unit", [True, False])
def test_gradcheck_through_the_kernels(impl: str, unit: bool) -> None:
    def run(x: Tensor, c: Tensor) -> Tensor:
        return F.centroid_triplet(x, c, LABELS, normalize=unit, reduction="none", impl=impl)

    assert torch.autograd.gradcheck(run, problem())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unit", [True, False])
def test_rows_on_a_centroid_and_small_batches(impl: str, unit: bool) -> None:
    x, c = problem(dtype=torch.float32)
    with torch.no_grad():
        x[:7] = c
    for rows in (0, 1, 9):
        loss = F.centroid_triplet(x[:rows], c, torch.arange(rows) % C, normalize=unit, impl=impl)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, c)))
    loss = F.centroid_triplet(x[:7], c, torch.arange(C), normalize=unit, reduction="none", impl=impl)
    torch.testing.assert_close(loss, dense(x[:7], c, torch.arange(C), unit), rtol=0, atol=2e-3)  # sqrt(eps) near 0
    x = x.detach()
    x[4, 1] = math.nan
    assert F.centroid_triplet(x, c, LABELS, normalize=unit, impl=impl).isnan()


@pytest.mark.parametrize("impl", FUSED)
def test_low_precision_and_what_is_kept(impl: str) -> None:
    x, c = (t.detach().bfloat16().requires_grad_() for t in problem())
    loss = F.centroid_triplet(x, c, LABELS, impl=impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), dense(x.double(), c.double(), LABELS, True).mean(), rtol=1e-5, atol=1e-5)
    assert [g.dtype for g in gradients(loss, (x, c))] == [torch.bfloat16, torch.bfloat16]
    rows, classes = 64, 300
    x, c, kept = torch.randn(rows, D).requires_grad_(), torch.randn(classes, D), {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in (x.data_ptr(), c.data_ptr()):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.centroid_triplet(x, c, torch.arange(rows), normalize=False, impl=impl)
    assert sum(kept.values()) <= 48 * (rows + classes) < 4 * rows * classes


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("unit", [True, False])
def test_compiles_without_a_graph_break(impl: str, unit: bool) -> None:
    torch._dynamo.reset()
    x, c = problem()
    module = fastret.CentroidTriplet(c, normalize=unit, impl=impl)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, LABELS), module(x, LABELS))
    torch.testing.assert_close(gradients(compiled(x, LABELS), (x,)), gradients(module(x, LABELS), (x,)))


def test_module_keeps_its_centroids() -> None:
    _, c = problem()
    module = fastret.CentroidTriplet(c)
    assert not list(module.parameters())
    assert list(module.state_dict()) == ["centroids"]
    other = fastret.CentroidTriplet(torch.zeros_like(c))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.centroids, c)
    assert repr(copy.deepcopy(module)) == repr(module)
    assert "title=" in module.citation
    for call, error, message in (
        (lambda: fastret.CentroidTriplet(c[:1]), ValueError, "centroids: expected at least 2 rows"),
        (lambda: module(torch.randn(9, D + 1), LABELS), ValueError, "centroids: expected 6 columns"),
        (lambda: module(torch.randn(9, D), LABELS + 1), ValueError, "labels: expected numbers from 0 to 6, got 7"),
        (lambda: module(torch.randn(9, D), LABELS.float()), TypeError, "labels: expected an integer dtype"),
        (lambda: fastret.CentroidTriplet(c, reduction="max"), ValueError, "reduction: expected one of"),
    ):
        with pytest.raises(error, match=message):
            call()
