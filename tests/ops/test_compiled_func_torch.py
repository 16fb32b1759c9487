"""torch.compile over torch.func.grad, for every op that has a gradient.

Nothing is computed from the differentiated tensors before an op meets them: those Dynamo takes for constants.
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.ops import (
    Head,
    Masked,
    PairMask,
    masked_lse,
    masked_lse_sum,
    pair_dot,
    pair_sums,
    patchmix,
    rank_sums,
    row_extrema,
    sampled_dot,
    segment_mean,
    soft_assign,
    sum_by_query,
)
from fastret.ops.center_distances import center_distances

F64 = torch.float64
N, M, D = 12, 8, 6
LABELS, OTHERS = torch.arange(N) // 4, torch.arange(M) % 2
WEIGHT = torch.linspace(0.1, 1, N, dtype=F64)
ROWS, COLUMNS = (N, D), (M, D)


def lse(x: Tensor, y: Tensor, impl: str) -> Tensor:
    target = Masked(PairMask(same=(LABELS, OTHERS)), WEIGHT)
    ((one, own),) = masked_lse(x, y, heads=[Head(3.0, target=target)], impl=impl)
    return one.sin().sum() + own.cos().sum()


def lse_parameters(scale: Tensor, row_bias: Tensor, column_bias: Tensor, impl: str) -> Tensor:
    rows = torch.linspace(-1, 1, N * D, dtype=F64).view(N, D).sin()
    head = Head(scale, PairMask(different=(LABELS, LABELS)), None, 0.0, row_bias, column_bias)
    return masked_lse(rows, heads=[head], impl=impl)[0][0].sin().sum()


def lse_sum(x: Tensor, y: Tensor, impl: str) -> Tensor:
    return 7 * masked_lse_sum(x, y, head=Head(3.0), row_weight=WEIGHT, impl=impl)


def sums(x: Tensor, y: Tensor, row_stat: Tensor, impl: str) -> Tensor:
    return pair_sums(x, y, phi="hinge", row_stat=row_stat, impl=impl).sin().sum()


def extrema(x: Tensor, y: Tensor, impl: str) -> Tensor:
    ((least, _),) = row_extrema(x, y, extrema=[("min", PairMask(different=(LABELS, OTHERS)))], impl=impl)
    return torch.where(least.isfinite(), least, 0).sin().sum()


def ranks(x: Tensor, impl: str) -> Tensor:
    r = rank_sums(x, LABELS, temperature=0.2, samples_per_class=4, impl=impl)
    return (r.rank_pos / r.rank_all).sum()


def ranks_in_gallery(x: Tensor, y: Tensor, impl: str) -> Tensor:
    r = rank_sums(x, LABELS % 2, y, OTHERS, temperature=0.2, samples_per_class=4, impl=impl)
    return (r.rank_pos / r.rank_all).sum()


def by_query(values: Tensor, impl: str) -> Tensor:
    return sum_by_query(values, torch.tensor([5, 0, 7])).sin().sum()


def dots(x: Tensor, y: Tensor, impl: str) -> Tensor:
    return pair_dot(x, y, LABELS, OTHERS[LABELS], impl=impl).sin().sum()


def samples(x: Tensor, y: Tensor, impl: str) -> Tensor:
    return sampled_dot(x, y, first=LABELS, count=5, seed=torch.tensor(3), impl=impl).sin().sum()


def means(x: Tensor, impl: str) -> Tensor:
    return segment_mean(x, LABELS, 3, impl=impl)[0].sin().sum()


def distances(w: Tensor, impl: str) -> Tensor:
    rows, spread = center_distances(w, 4, impl=impl)
    return spread.sin().sum() + masked_lse(rows, heads=[Head(3.0)], impl=impl)[0][0].sin().sum()


def assignment(x: Tensor, codebook: Tensor, impl: str) -> Tensor:
    made = soft_assign(x, codebook, 0.5, hard="straight-through", usage=True, purity=True, impl=impl)
    return made.soft.sin().sum() + made.hard.cos().sum() + made.usage.sin().sum() + made.purity.sin().sum()


def assignment_by_keys(x: Tensor, codebook: Tensor, keys: Tensor, bias: Tensor, impl: str) -> Tensor:
    return soft_assign(x, codebook, keys=keys, bias=bias, impl=impl).soft.sin().sum()


def assignment_of_logits(logits: Tensor, codebook: Tensor, impl: str) -> Tensor:
    return soft_assign(None, codebook, logits=logits, impl=impl).soft.sin().sum()


def mixing(x: Tensor, impl: str) -> Tensor:
    return patchmix(x, 1, 2, permutation=torch.tensor([2, 0, 1, 3]), impl=impl).sin().mul(WEIGHT[:D]).sum()


CASES: list[tuple[str, Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = [
    ("masked_lse", lse, (ROWS, COLUMNS)),
    ("masked_lse", lse_parameters, ((), (N,), (N,))),
    ("masked_lse", lse_sum, (ROWS, COLUMNS)),
    ("masked_lse", sums, (ROWS, COLUMNS, (N,))),
    ("masked_lse", distances, (ROWS,)),
    ("row_extrema", extrema, (ROWS, COLUMNS)),
    ("rank_sums", ranks, (ROWS,)),
    ("rank_sums", ranks_in_gallery, (ROWS, COLUMNS)),
    ("rank_sums", by_query, ((N,),)),
    ("pair_dot", dots, (ROWS, COLUMNS)),
    ("sampled_dot", samples, (ROWS, COLUMNS)),
    ("segment_mean", means, (ROWS,)),
    ("soft_assign", assignment, (ROWS, (2, 4, 3))),
    ("soft_assign", assignment_by_keys, (ROWS, (2, 4, 2), (2, 4, 3), (2, 4))),
    ("soft_assign", assignment_of_logits, ((N, 8), (2, 4, 3))),
    ("patchmix", mixing, ((3, 4, D),)),
]


def served(op: str, impl: str) -> bool:
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        return False
    return registry.IMPLEMENTATIONS[impl].unsupported(Call(op, "cpu", F64)) is None


FUSED = [
    pytest.param(loss, shapes, impl, id=f"{loss.__name__}-{impl}")
    for op, loss, shapes in CASES
    for impl in ("tiled", "cpu", "triton")
    if served(op, impl)
]


def given(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64) for shape in shapes]


@pytest.mark.parametrize(("loss", "shapes", "impl"), FUSED)
def test_gradient(loss: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], impl: str) -> None:
    tensors = given(shapes)
    everything = tuple(range(len(tensors)))
    expected = torch.func.grad(lambda *a: loss(*a, "reference"), argnums=everything)(*tensors)
    assert all(g.abs().max() > 1e-3 for g in expected)
    alone = everything if impl == "tiled" else ()  # the others are constants, to the operator, whoever serves it
    for argnums in (everything, *alone):
        torch._dynamo.reset()
        gradient = torch.func.grad(lambda *a: loss(*a, impl), argnums=argnums)
        made = torch.compile(gradient, backend="aot_eager", fullgraph=True)(*tensors)
        wanted = expected if argnums == everything else expected[argnums]
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("loss", "shapes"), [pytest.param(*case[1:], id=case[1].__name__) for case in CASES])
def test_twice_is_right_or_an_error(loss: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
    x, *others = given(shapes)

    def twice(impl: str) -> Callable[[Tensor], Tensor]:
        once = torch.func.grad(lambda a: loss(a, *others, impl))
        return torch.func.grad(lambda a: once(a).square().sum())

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"under torch\.compile one torch\.func\.grad"):
        torch.compile(twice("tiled"), backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    compiled = torch.compile(twice("tiled"), backend="aot_eager")
    if loss in (means, by_query, mixing):
        torch.testing.assert_close(compiled(x), twice("reference")(x))
    else:
        with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
            compiled(x)


@pytest.mark.parametrize(("loss", "shapes"), [pytest.param(*case[1:], id=case[1].__name__) for case in CASES])
def test_forward_mode_is_an_error(loss: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
    x, *others = given(shapes)
    torch._dynamo.reset()
    forward = torch.compile(
        lambda a: torch.func.jvp(lambda b: loss(b, *others, "tiled"), (a,), (a,)), backend="aot_eager"
    )
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        forward(x)
