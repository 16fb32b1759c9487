"""Whose the gradients are that masked_lse_sum saves: handed out where the graph is freed, never seen twice."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.ops import Head, Indexed, masked_lse, masked_lse_sum

FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
pytestmark = [pytest.mark.parametrize("impl", FUSED), pytest.mark.parametrize("dtype", DTYPES)]
N, M = 12, 40


def sides(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(count, 6, generator=generator).to(dtype).requires_grad_() for count in (N, M)]


def loss_of(x: Tensor, y: Tensor | None, impl: str, scale: float = 5.0) -> Tensor:
    head = Head(scale, target=Indexed(torch.arange(N)))
    return masked_lse_sum(x, y, head=head, row_weight=torch.full((N,), 1 / N), impl=impl)


def wanted(dtype: torch.dtype, factor: float = 1.0, scale: float = 5.0) -> list[Tensor]:
    """Gradients of factor times the loss, from the definition."""
    x, y = sides(dtype)
    return list(torch.autograd.grad(factor * loss_of(x, y, "reference", scale), (x, y)))


def close(actual: list[Tensor | None], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        half = {"rtol": 2e-2, "atol": 1e-3} if e.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(a, e, **half)


@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_backward_twice_into_the_same_leaf(impl: str, dtype: torch.dtype, factor: float) -> None:
    x, y = sides(dtype)
    loss = factor * loss_of(x, y, impl)
    for times, keep in ((1, True), (2, True), (3, False)):
        loss.backward(retain_graph=keep)
        close([x.grad, y.grad], wanted(dtype, times * factor))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_asked_for_twice(impl: str, dtype: torch.dtype) -> None:
    """What the caller does with the first answer changes nothing in the second."""
    x, y = sides(dtype)
    loss = loss_of(x, y, impl)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    for g in first:
        g.fill_(torch.nan)
    second = torch.autograd.grad(loss, (x, y), torch.tensor(3.0, dtype=loss.dtype), retain_graph=True)
    close(list(second), wanted(dtype, 3))
    last = torch.autograd.grad(loss, (x, y))
    for g in last:
        g.mul_(2)
    close(list(second), wanted(dtype, 3))
    close(list(last), wanted(dtype, 2))


def test_losses_that_share_a_leaf(impl: str, dtype: torch.dtype) -> None:
    x, y = sides(dtype)
    one, other = loss_of(x, y, impl), loss_of(x, y, impl, 2.0)
    expected = [a + b for a, b in zip(wanted(dtype), wanted(dtype, 1, 2.0), strict=True)]
    one.backward(retain_graph=True)
    other.backward(retain_graph=True)
    close([x.grad, y.grad], expected)
    x.grad = y.grad = None
    (one + other).backward(retain_graph=True)
    close([x.grad, y.grad], expected)
    (one - 3 * other).backward()
    expected = [2 * a - 2 * b for a, b in zip(wanted(dtype), wanted(dtype, 1, 2.0), strict=True)]
    close([x.grad, y.grad], expected)


def test_a_loss_that_is_used_twice_and_a_leaf_on_both_sides(impl: str, dtype: torch.dtype) -> None:
    x, y = sides(dtype)
    loss = loss_of(x, y, impl)
    (loss + loss).backward()
    close([x.grad, y.grad], wanted(dtype, 2))
    x.grad = None
    loss_of(x, x, impl).backward()
    (expected,) = torch.autograd.grad(loss_of(x, x, "reference"), x)
    close([x.grad], [expected])


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_graph_that_is_freed_gives_its_memory(impl: str, dtype: torch.dtype, factor: float) -> None:
    """No copy, whatever the factor; one that is kept gives copies."""
    x, y = sides(dtype)
    for keep in (True, False):
        x.grad = y.grad = None
        loss = loss_of(x, y, impl)
        saved = [t.data_ptr() for t in loss.grad_fn.saved_tensors[:2]]
        (factor * loss).backward(retain_graph=keep)
        same = [x.grad.data_ptr(), y.grad.data_ptr()] == saved
        assert same == (not keep and dtype != torch.bfloat16)
        close([x.grad, y.grad], wanted(dtype, factor))


def test_several_upstream_gradients_at_once(impl: str, dtype: torch.dtype) -> None:
    x, y = sides(dtype)
    loss = loss_of(x, y, impl)
    many = torch.tensor([1.0, -2.0], dtype=loss.dtype)
    dx, dy = torch.autograd.grad(loss, (x, y), many, is_grads_batched=True)
    close([dx[0], dy[0]], wanted(dtype))
    close([dx[1], dy[1]], wanted(dtype, -2))


def test_without_keeping_the_graph_a_second_differentiation_is_an_error(impl: str, dtype: torch.dtype) -> None:
    x, y = sides(dtype)
    (dx,) = torch.autograd.grad(loss_of(x, y, impl), x, create_graph=True, retain_graph=False)
    with pytest.raises(NotImplementedError, match="second differentiation"):
        dx.sum().backward()


def test_checkpointing(impl: str, dtype: torch.dtype) -> None:
    x, y = sides(dtype)
    (0.5 * checkpoint(loss_of, x, y, impl, use_reentrant=False)).backward()
    close([x.grad, y.grad], wanted(dtype, 0.5))

    def both(a: Tensor, b: Tensor) -> Tensor:
        ((lse, t),) = masked_lse(a, b, heads=[Head(5.0, target=Indexed(torch.arange(N)))], impl=impl)
        return (lse - t).mean()

    x.grad = y.grad = None
    checkpoint(both, x, y, use_reentrant=False).backward()
    close([x.grad, y.grad], wanted(dtype))
