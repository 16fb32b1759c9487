"""The slopes that rank_sums by Triton sums in forward, and what its backward makes of them in every plan."""

import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from fastret.backends.segments import label_segments
from fastret.backends.triton import rank_sums as backend
from fastret.backends.triton import rank_sums_strips as strips_backend
from fastret.kernels.triton import rank_sums as kernels
from fastret.ops import rank_sums

# Saturated sigmoids overflow 2^z on purpose; numpy, which interprets, remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|multiply|subtract):RuntimeWarning")

F64 = torch.float64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = (1, 4, 5, 9, 3, 6, 7)  # class sizes around the interpreter's chunk of 4, in three blocks of its 16 rows


def problem(sizes: tuple[int, ...], width: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of classes of the given sizes, in random order, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return torch.randn(len(labels), width, generator=generator, dtype=F64).to(DEVICE), labels.to(DEVICE)


class Watched:
    """A kernel, and the named arguments of its launches."""

    def __init__(self, kernel: Any, name: str) -> None:
        self.kernel, self.place, self.given = kernel, kernel.arg_names.index(name), []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.given.append(arguments[self.place])
            self.kernel[grid](*arguments, **options)

        return launch


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_slopes_are_summed_where_a_gradient_may_be_wanted(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, plan: str, factored: bool
) -> None:
    """And change no bit of the ranks."""
    request.getfixturevalue(plan)
    kernel = Watched(kernels.rank_sums_kernel, "slopes")
    monkeypatch.setattr(kernels, "rank_sums_kernel", kernel)
    x, labels = problem(BATCH, 37)
    x = x.float()
    options = {"temperature": 0.05 if factored else 1e-3, "exclude_self": True, "impl": "triton"}
    plain = rank_sums(x, labels, **options)
    with torch.no_grad():
        unwanted = rank_sums(x.clone().requires_grad_(), labels, **options)
    assert {slopes is None for slopes in kernel.given} == {True}
    kernel.given.clear()
    wanted = rank_sums(x.clone().requires_grad_(), labels, **options)
    assert {slopes is None for slopes in kernel.given} == {False}
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, unwanted, wanted, strict=True))


def test_slopes_are_those_of_the_negatives() -> None:
    """One by one."""
    x, labels = problem((2, 3, 1, 4), 5)
    s = label_segments(labels)
    given = {"temperature": 0.3, "exclude_self": False, "normalize": True, "slopes": True}
    *_, slopes = backend.forward(x, None, s, int(s.count.sum()), **given)
    unit = torch.nn.functional.normalize(x)
    scores = unit @ unit.T / 0.3
    expected = []
    for q in range(len(x)):
        for i in s.order[s.start[q] : s.start[q] + s.count[q]].tolist():
            steps = [(scores[q, j] - scores[q, i]).sigmoid() for j in range(len(x)) if labels[j] != labels[q]]
            expected.append(sum(u * (1 - u) for u in steps))
    torch.testing.assert_close(slopes, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_queries_without_a_match_among_others(request: pytest.FixtureRequest, plan: str) -> None:
    """Their empty stretches begin where others do, of which none is cut off."""
    request.getfixturevalue(plan)
    labels = torch.tensor([2] * 8 + [1] * 8 + [0] * 3, device=DEVICE)
    y_labels = torch.tensor([0] * 20 + [2] * 20 + [3] * 12, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(len(of), 5, generator=generator, dtype=F64).to(DEVICE) for of in (labels, y_labels))
    results = []
    for impl in ("triton", "reference"):
        rows = x.clone().requires_grad_(), y.clone().requires_grad_()
        r = rank_sums(rows[0], labels, rows[1], y_labels, temperature=0.2, impl=impl)
        found = torch.autograd.grad((r.rank_pos / r.rank_all).sum(), rows)
        results.append([r.rank_all, r.rank_pos, *found])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_backward_refuses_pairs_without_their_slopes() -> None:
    x, labels = problem(BATCH, 37)
    *ranks, slopes, order, start, count = torch.ops.fastret.rank_sums(
        x, None, labels, None, None, 0.1, False, True, False, "triton"
    )
    assert len(slopes) == 0
    with pytest.raises(ValueError, match="slopes: expected those of 217 pairs"):
        torch.ops.fastret.rank_sums_backward(
            *ranks, x, None, slopes, order, start, count, 0.1, False, True, True, False, "triton"
        )


@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_gradcheck_through_the_kernels(request: pytest.FixtureRequest, plan: str) -> None:
    request.getfixturevalue(plan)
    x, labels = problem((3, 1, 5, 2), 3)
    y, y_labels = problem((1, 4, 0, 12), 3, seed=1)
    rows = x.requires_grad_(), y.requires_grad_()
    options = {"temperature": 0.4, "impl": "triton"}
    assert torch.autograd.gradcheck(
        lambda a: rank_sums(a, labels, exclude_self=True, **options)[:2], rows[:1], fast_mode=True
    )
    assert torch.autograd.gradcheck(lambda a, b: rank_sums(a, labels, b, y_labels, **options)[:2], rows, fast_mode=True)


@pytest.mark.parametrize("plan", ["weights", "strips"])
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 3e4, 1e30])
def test_half_precision_gradients_of_any_size(request: pytest.FixtureRequest, plan: str, factor: float) -> None:
    """float16 holds no weights of this size; a power of two times them, it does. Before gradients are rounded."""
    request.getfixturevalue(plan)
    x, labels = problem(BATCH, 20)
    s = label_segments(labels)
    pairs = int(s.count.sum())
    grad = torch.randn(2, pairs, generator=torch.Generator().manual_seed(3), dtype=F64).to(DEVICE)
    given = {"temperature": 0.05, "exclude_self": True, "normalize": True}
    half = x.to(torch.float16)
    *_, slopes = backend.forward(half, None, s, pairs, **given, slopes=True)
    upstream = strips_backend.Upstream(*(grad * factor).float(), slopes)
    prepared = backend._prepare(half, None, s, pairs, *given.values())
    blocks = prepared.blocks()
    if not blocks.stored:
        prepared.score_positives()
    du, _ = strips_backend.gradients(blocks, prepared.pairs(), upstream, of_x=True, of_y=True)
    wide = backend._prepare(half.to(F64), None, s, pairs, *given.values())
    wide.score_positives()
    upstream = strips_backend.Upstream(*grad, slopes.to(F64))
    expected, _ = wide.gradients(upstream, of_x=True, of_y=True)  # in parts
    assert du is not None
    assert expected is not None
    expected = expected.sum(0)
    assert (du.to(F64) / factor - expected).norm() <= 2**-9 * expected.norm()


def test_zeros_and_infinities_among_half_precision_gradients(weights: None) -> None:
    """Without a bound nothing is lifted; what is zero stays zero, and what is not finite is not hidden."""
    x, labels = problem(BATCH, 20)
    x = x.to(torch.float16).requires_grad_()
    ranks = rank_sums(x, labels, temperature=0.05, impl="triton")
    (zero,) = torch.autograd.grad(ranks.rank_all, x, torch.zeros_like(ranks.rank_all), retain_graph=True)
    assert zero.count_nonzero() == 0
    for bad in (math.nan, math.inf):
        upstream = torch.zeros_like(ranks.rank_all)
        upstream[0] = bad
        (gradient,) = torch.autograd.grad(ranks.rank_all, x, upstream, retain_graph=True)
        assert not gradient.isfinite().all()


def test_what_pytorch_expects_of_an_operator() -> None:
    x, labels = problem((2, 3, 1, 4), 5)
    op, backward = torch.ops.fastret.rank_sums.default, torch.ops.fastret.rank_sums_backward.default
    for slopes in (True, False):
        torch.library.opcheck(op, (x, None, labels, None, None, 0.1, True, True, slopes, "triton"))
    *ranks, slopes, order, start, count = op(x, None, labels, None, None, 0.1, False, True, True, "triton")
    saved = x, None, slopes, order, start, count
    torch.library.opcheck(backward, (*ranks, *saved, 0.1, False, True, True, False, "triton"))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms() -> None:
    """Slopes are there where backward runs: in a compiled graph, under torch.func, and under vmap."""
    x, labels = problem((4,) * 5, 6)

    def loss(a: Tensor, impl: str = "triton") -> Tensor:
        r = rank_sums(a, labels, temperature=0.2, samples_per_class=4, impl=impl)
        return (r.rank_pos / r.rank_all).sum()

    expected = torch.func.grad(lambda a: loss(a, "reference"))(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(torch.stack([x, x]))[1], expected)
    rows = x.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(rows).backward()
    torch.testing.assert_close(rows.grad, expected)
    rows.grad = None
    torch.utils.checkpoint.checkpoint(loss, rows, use_reentrant=True).backward()
    torch.testing.assert_close(rows.grad, expected)
