"""masked_lse and its one-sweep form as PyTorch operators; the one-sweep form against lse - t."""

import warnings

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.ops import Head, Indexed, Masked, PairMask, Shifted, masked_lse, masked_lse_sum
from fastret.ops.problem import LEARNED, pack

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]
N, M = 12, 17
NAMES, OTHERS = torch.arange(N) % 4, torch.arange(M) % 4


def leaves(requires_grad: bool = True) -> list[Tensor]:
    """x, y, scale, row bias, column bias."""
    shapes = ((N, 5), (M, 5), (), (N,), (M,))
    return [torch.randn(shape, dtype=F64).add_(1).requires_grad_(requires_grad) for shape in shapes]


def lse_loss(x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor, column_bias: Tensor, impl: str) -> Tensor:
    target = Masked(PairMask(same=(NAMES, OTHERS)), torch.full((N,), 0.25, dtype=F64))
    heads = [
        Head(scale, PairMask(offset=0), target, 0.1, row_bias),
        Head(2.5, PairMask(different=(NAMES, OTHERS)), None, 0.0, None, column_bias, "column", 3),
    ]
    return sum((lse.sin() + t.cos()).sum() for lse, t in masked_lse(x, y, heads=heads, impl=impl))


def sum_loss(x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor, column_bias: Tensor, impl: str) -> Tensor:
    head = Head(scale, PairMask(offset=0), Indexed(torch.arange(N) + 2), 0.1, row_bias, column_bias)
    weight = torch.linspace(0, 1, N, dtype=F64)
    return 7 * masked_lse_sum(x, y, head=head, row_weight=weight, impl=impl)


LOSSES = [lse_loss, sum_loss]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_sweep_is_the_weighted_sum(impl: str, normalize: bool, gallery: bool, dtype: torch.dtype) -> None:
    x, y, scale, row_bias, column_bias = (t.detach().to(dtype).requires_grad_() for t in leaves())
    names = NAMES.clone()
    names[5] = 9  # without a same-label column: lse = -inf
    others = OTHERS if gallery else names
    mask = PairMask(same=(names, others)) if gallery else PairMask(same=(names, others), offset=0)
    bias = column_bias if gallery else column_bias[:N]
    head = Head(scale, mask, Shifted(3), 0.2, row_bias, bias)
    inputs = [x, *([y] if gallery else []), scale, row_bias, column_bias]
    weight = torch.rand(N, dtype=dtype)
    weight[5] = 0
    options = {"normalize": normalize, "impl": impl}
    loss = masked_lse_sum(x, y if gallery else None, head=head, row_weight=weight, **options)
    ((lse, t),) = masked_lse(x, y if gallery else None, heads=[head], **options)
    expected = (weight * torch.where(weight > 0, lse - t, 0)).sum()
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(loss, expected, **tolerance)
    mine = torch.autograd.grad(3 * loss, inputs)
    t = torch.where(weight > 0, t, t.detach())
    torch.testing.assert_close(mine, torch.autograd.grad(3 * expected, inputs), **tolerance)
    with torch.no_grad():
        alone = masked_lse_sum(x, y if gallery else None, head=head, row_weight=weight, **options)
    torch.testing.assert_close(alone, loss.detach(), **tolerance)


@pytest.mark.parametrize("impl", FUSED)
def test_one_sweep_keeps_gradients_in_the_accumulation_dtype(impl: str) -> None:
    x = torch.randn(32, 8, dtype=torch.bfloat16, requires_grad=True)
    head, saved = Head(10.0, target=Shifted(1, 32)), []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() != x.data_ptr():
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = masked_lse_sum(x, head=head, row_weight=torch.full((32,), 1 / 32), impl=impl)
    assert {t.dtype for t in saved} == {torch.float32}
    assert sum(t.numel() for t in saved) == x.numel()
    (loss * 1e-30 * 1e30).backward()
    assert x.grad.dtype == torch.bfloat16
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        saved.clear()
        masked_lse_sum(x.detach(), head=head, row_weight=torch.ones(32), impl=impl)
    assert not saved


@pytest.mark.parametrize("impl", FUSED)
def test_detached_keys_cost_nothing(impl: str) -> None:
    x, y, *_ = leaves()
    masked = masked_lse_sum(x, y.detach(), head=Head(3.0), row_weight=torch.ones(N, dtype=F64), impl=impl)
    assert [saved.numel() for saved in masked.grad_fn.saved_tensors[:5]] == [x.numel(), 0, 0, 0, 0]
    torch.testing.assert_close(
        torch.autograd.grad(masked, x),
        torch.autograd.grad(
            masked_lse_sum(x, y, head=Head(3.0), row_weight=torch.ones(N, dtype=F64), impl="reference"), x
        ),
    )


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(impl: str, loss: object) -> None:
    assert torch.autograd.gradcheck(lambda *a: loss(*a, impl), leaves())


@pytest.mark.parametrize("impl", FUSED)
def test_registered_operators(impl: str) -> None:
    x, y, scale, row_bias, column_bias = leaves(requires_grad=False)
    operators = torch.ops.fastret
    pairs = PairMask(same=(NAMES, OTHERS), offset=1, period=20, above=row_bias - 1)
    itself = PairMask(distinct=(NAMES, NAMES))
    for gallery, heads in (
        (y, [Head(scale, pairs, Indexed(NAMES), 0.1, row_bias), Head(3.0, axis="column", column_bias=column_bias)]),
        (None, [Head(2.0, itself, Masked(itself, row_bias), width=2)]),
    ):
        columns = N if gallery is None else M
        problem = pack(x, gallery, heads, normalize=True, first_column=0, columns=columns, impl=impl)
        torch.library.opcheck(operators.masked_lse.default, problem)
        results = operators.masked_lse.default(*problem)
        need = [t is not None for t in problem[:LEARNED]]
        backward = ([torch.ones_like(r) for r in results], results[::2], *problem, need)
        torch.library.opcheck(operators.masked_lse_backward.default, backward)
        if len(heads) == 1:
            weighted = (*problem, row_bias, need)
            torch.library.opcheck(operators.masked_lse_sum.default, weighted)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["static", "dynamic", "no gradient"])
def test_compiles_without_a_graph_break(impl: str, loss: object, kind: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: loss(*a, impl), fullgraph=True, backend="aot_eager", dynamic=kind == "dynamic" or None
    )
    inputs = leaves(requires_grad=kind != "no gradient")
    value, expected = compiled(*inputs), loss(*inputs, impl)
    torch.testing.assert_close(value, expected)
    if kind != "no gradient":
        torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


def test_another_temperature_or_batch_is_no_other_program() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounter()

    def run(x: Tensor, temperature: float) -> Tensor:
        n = x.shape[0]
        head = Head(1 / temperature, PairMask(offset=0), Shifted(n // 2, n))
        return masked_lse_sum(x, head=head, row_weight=x.new_ones(n), impl="tiled")

    compiled = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    for n, temperature in ((8, 0.5), (10, 0.5), (12, 0.5)):
        x = torch.randn(n, 3)
        torch.testing.assert_close(compiled(x, temperature), run(x, temperature))
    assert count.frame_count == 1


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("loss", LOSSES)
def test_torch_func(impl: str, loss: object) -> None:
    x, *others = leaves(requires_grad=False)
    batch = torch.randn(3, N, 5, dtype=F64)
    (expected,) = torch.autograd.grad(loss(x.requires_grad_(), *others, "reference"), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one = torch.func.grad(lambda a: loss(a, *others, impl))
        torch.testing.assert_close(one(x.detach()), expected)
        singles = torch.stack([one(a) for a in batch])
        torch.testing.assert_close(torch.vmap(one)(batch), singles)
        together = torch.func.grad(lambda b: torch.vmap(lambda a: loss(a, *others, impl))(b).sum())
        torch.testing.assert_close(together(batch), singles)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_the_kernels_cannot_differentiate_is_an_error(impl: str, loss: object) -> None:
    inputs = leaves()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda a: loss(a, *inputs[1:], impl), (inputs[0].detach(),), (inputs[0].detach(),))
    (gradient,) = torch.autograd.grad(loss(*inputs, impl), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()
