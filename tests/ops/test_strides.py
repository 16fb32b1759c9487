"""Vectors and matrices of any strides beside the rows: biases, labels, thresholds, targets, weights, upstream
gradients. Every implementation has to give what it gives for contiguous copies of them.

Rows of any strides are in the tests of each op, and in ``tests/gpu``.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastret import ops
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.ops import Dense, Head, Indexed, Listed, Masked, PairMask

F64 = torch.float64
N, M, WIDTH = 18, 21, 5

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning")


def implementations(op: str) -> list[str]:
    call = Call(op, "cpu", F64)
    return [i for i in ("reference", "tiled", "cpu", "triton") if registry.IMPLEMENTATIONS[i].unsupported(call) is None]


def as_given(t: Tensor) -> Tensor:
    return t


def strided(t: Tensor) -> Tensor:
    """The same values; the numbers between them are others."""
    return torch.stack([t, -t - 7], -1)[..., 0]


Form = Callable[[Tensor], Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def numbers(count: int, below: int, seed: int) -> Tensor:
    return torch.randint(0, below, (count,), generator=generator(seed))


def differentiated(call: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], form: Form) -> list[Tensor]:
    """Results, and gradients of the leaves from upstream gradients of the form."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = call(*leaves)
    upstream = [form(values(*r.shape, seed=40 + k)) for k, r in enumerate(results)]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, upstream)]


def compare(call: Callable[[Form], Callable[..., tuple[Tensor, ...]]], leaves: list[Tensor]) -> None:
    expected = differentiated(call(as_given), leaves, as_given)
    for a, e in zip(differentiated(call(strided), leaves, strided), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def heads_of_everything(of: Form) -> Callable[[Tensor, Tensor], list[Head]]:
    """Heads that together hold every kind of tensor; the biases are leaves of their own."""
    own, others, ids = numbers(N, 4, 1), numbers(M, 4, 2), numbers(M, M, 3)
    mask = PairMask(
        same=(of(own), of(others)), distinct=(of(torch.arange(N)), of(ids)), above=of(-values(N, seed=4).abs())
    )
    other = PairMask(different=(of(own), of(others)), below=of(values(N, seed=5).abs()))
    offsets, index = torch.arange(N + 1) * 2, numbers(2 * N, M, 6)
    listed = Listed(of(offsets), of(index), of(values(2 * N, seed=7).abs()))

    def heads(a: Tensor, b: Tensor) -> list[Head]:
        return [
            Head(2.0, mask, Masked(other, of(values(N, seed=8).abs())), row_bias=of(a), column_bias=of(b)),
            Head(1.5, other, Indexed(of(numbers(N, M, 9))), column_bias=of(b), axis="row"),
            Head(0.5, target=Dense(of(values(N, M, seed=10).abs())), axis="row"),
            Head(0.7, target=listed, row_bias=of(a)),
        ]

    return heads


@pytest.mark.parametrize("impl", implementations("masked_lse"))
def test_all_that_heads_hold(impl: str) -> None:
    x, y, a, b = values(N, WIDTH, seed=1), values(M, WIDTH, seed=2), values(N, seed=3), values(M, seed=4)

    def call(form: Form) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            found = ops.masked_lse(x, y, heads=heads_of_everything(form)(a, b), normalize=False, impl=impl)
            return tuple(t for pair in found for t in pair)

        return run

    compare(call, [x, y, a, b])


@pytest.mark.parametrize("name", ["row_bias", "column_bias"])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("impl", implementations("masked_lse"))
def test_the_bias_of_a_single_head(impl: str, expanded: bool, name: str) -> None:
    """Against the formula; an expanded bias gets the sum of the gradients of its places."""
    x, y = values(N, WIDTH, seed=1), values(M, WIDTH, seed=2)
    count = N if name == "row_bias" else M
    given = values(1, seed=3) if expanded else torch.stack([values(count, seed=3), values(count, seed=4)], 1)
    given.requires_grad_()
    bias = given.expand(count) if expanded else given[:, 0]
    assert not bias.is_contiguous()
    wide = bias[:, None] if name == "row_bias" else bias[None]
    exact = ((3.0 * x @ y.T + wide).logsumexp(1) * torch.arange(N)).sum()
    ((lse, _),) = ops.masked_lse(x, y, heads=[Head(3.0, **{name: bias})], normalize=False, impl=impl)
    actual = (lse * torch.arange(N)).sum()
    torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(t, given, retain_graph=True)[0] for t in (actual, exact))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", implementations("masked_lse"))
def test_sums_of_one_sweep(impl: str) -> None:
    x, y, a, b = values(N, WIDTH, seed=1), values(M, WIDTH, seed=2), values(N, seed=3), values(M, seed=4)
    weight, index = values(N, seed=5).abs(), numbers(N, M, 6)

    def call(form: Form) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            head = Head(2.0, target=Indexed(form(index)), row_bias=form(a), column_bias=form(b))
            return (ops.masked_lse_sum(x, y, head=head, row_weight=form(weight), impl=impl)[None],)

        return run

    compare(call, [x, y, a, b])


@pytest.mark.parametrize("impl", implementations("masked_lse"))
def test_vmap_over_the_last_axis_of_a_bias(impl: str) -> None:
    x, biases = values(N, WIDTH, seed=1), values(N, 3, seed=2)

    def of(bias: Tensor) -> Tensor:
        ((lse, _),) = ops.masked_lse(x, heads=[Head(2.0, column_bias=bias)], impl=impl)
        return lse

    expected = torch.stack([of(biases[:, k].contiguous()) for k in range(3)])
    torch.testing.assert_close(torch.func.vmap(of, in_dims=1)(biases), expected, rtol=1e-12, atol=1e-12)


def test_the_lists_that_name_pairs_rows_and_words() -> None:
    """And the bounds of row_extrema; upstream gradients too."""
    row, column, words = numbers(9, N, 1), numbers(9, M, 2), numbers(N * 2, M, 3).view(N, 2)
    own, others, above = numbers(N, 4, 4), numbers(M, 4, 5), values(N, seed=6) / 3

    def extrema(of: Form) -> list[tuple[str, PairMask]]:
        return [
            ("max", PairMask(same=(of(own), of(others)))),
            ("min", PairMask(different=(of(own), of(others)), above=of(above))),
        ]

    def row_extrema(impl: str, of: Form) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            found = ops.row_extrema(x, y, extrema=extrema(of), impl=impl)
            return tuple(torch.where(value.isinf(), 0, value) for value, _ in found)

        return run

    calls: dict[str, Callable[[str, Form], Callable[..., tuple[Tensor, ...]]]] = {
        "pair_dot": lambda impl, of: lambda x, y: (ops.pair_dot(x, y, of(row), of(column), impl=impl),),
        "sampled_dot": lambda impl, of: (
            lambda x, y: (ops.sampled_dot(x, y, first=of(words[:, 0]), index=of(words), impl=impl),)
        ),
        "rank_sums": lambda impl, of: (
            lambda x, y: tuple(ops.rank_sums(x, of(own), y, of(others), temperature=0.1, impl=impl)[:2])
        ),
        "row_extrema": row_extrema,
        "segment_mean": lambda impl, of: (
            lambda x, y: (
                ops.segment_mean(x, of(own), 4, impl=impl)[0],
                ops.segment_mean(y, of(others), 4, impl=impl)[0],
            )
        ),
        "soft_assign": lambda impl, of: lambda x, y: _assigned(x, y, impl),
    }
    for op, call in calls.items():
        for impl in implementations(op):
            width = 4 if op == "soft_assign" else WIDTH
            leaves = [values(N, width, seed=7), values(M, width, seed=8)]
            compare(lambda of, call=call, impl=impl: call(impl, of), leaves)


def _assigned(x: Tensor, y: Tensor, impl: str) -> tuple[Tensor, ...]:
    result = ops.soft_assign(x, y[:16].reshape(2, 8, 4)[:, :, :2], 0.5, usage=True, purity=True, impl=impl)
    return tuple(t for t in (result.soft, result.usage, result.purity) if t is not None)


@pytest.mark.parametrize("impl", implementations("update_rows"))
def test_rows_of_a_bank_by_a_strided_index(impl: str) -> None:
    bank, x, index = values(M, WIDTH, seed=1), values(N, WIDTH, seed=2), numbers(N, M, 3)
    expected = ops.update_rows_(bank.clone(), index, x, impl=impl)
    torch.testing.assert_close(ops.update_rows_(strided(bank), strided(index), strided(x), impl=impl), expected)
