"""segment_mean against its definition, what it promises of sums, and what PyTorch expects of an operator."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastret import backend
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import segment_mean as tiled
from fastret.ops import segment_mean
from fastret.ops.segment_mean import REDUCTIONS

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("segment_mean", "cpu", torch.float32)) is None
]
EVERY = ["reference", *FUSED]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "BUDGET", 32)
    monkeypatch.setattr(tiled, "_LEAST_FEATURES", 3)


def case(n: int = 40, d: int = 5, segments: int = 9) -> tuple[Tensor, Tensor]:
    """Rows in any order, some of no segment, and a segment without rows."""
    index = torch.randint(-2, segments, (n,))
    return torch.randn(n, d, dtype=F64), torch.where(index == 4, 3, index)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.usefixtures("small_pieces")
def test_is_the_definition(impl: str, reduce: str) -> None:
    """One row at a time."""
    x, index = case()
    result, counts = segment_mean(x, index, 9, reduce=reduce, impl=impl)
    assert (result.dtype, counts.dtype, result.shape, counts.shape) == (F64, torch.int64, (9, 5), (9,))
    for s in range(9):
        members = [row for row, i in zip(x.tolist(), index.tolist(), strict=True) if i == s]
        assert counts[s] == len(members)
        for c in range(5):
            total = math.fsum(row[c] for row in members)
            expected = total / max(1, len(members)) if reduce == "mean" else total
            assert result[s, c].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.usefixtures("small_pieces")
def test_values_and_gradients_equal_reference(impl: str, reduce: str) -> None:
    for n, d, segments in ((1, 1, 1), (7, 3, 0), (63, 64, 5), (65, 65, 200), (1000, 7, 1), (0, 4, 3)):
        x = torch.randn(n, d, dtype=F64, requires_grad=True)
        index = torch.randint(-1, segments, (n,)) if segments else torch.full((n,), -1)
        expected, counts = segment_mean(x, index, segments, reduce=reduce, impl="reference")
        result, own = segment_mean(x, index, segments, reduce=reduce, impl=impl)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(own, counts)
        mine, truth = (torch.autograd.grad(7 * r.sin().sum(), x)[0] for r in (result, expected))
        torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_type(impl: str, dtype: torch.dtype) -> None:
    """Results are float64 ones rounded once, gradients have the type of the rows."""
    x, index = case(300, 20)
    x = x.to(dtype).requires_grad_()
    result, _ = segment_mean(x, index, 9, impl=impl)
    expected, _ = segment_mean(x.detach().double(), index, 9, impl="reference")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected.float(), rtol=2.4e-7, atol=1e-14)
    (gradient,) = torch.autograd.grad(result.square().sum(), x)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(segment_mean(wide, index, 9, impl="reference")[0].square().sum(), wide)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("impl", EVERY)
def test_many_rows_lose_no_digits(impl: str) -> None:
    """A running sum of floats would be 1 % off."""
    x = torch.full((1_000_000, 1), 0.1)
    result, _ = segment_mean(x, torch.zeros(len(x)).long(), 1, impl=impl)
    assert result.item() == x[0].item()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 60), d=st.integers(1, 70), segments=st.integers(1, 20), seed=st.integers(0, 99))
def test_order_of_rows_and_names_of_segments_do_not_matter(n: int, d: int, segments: int, seed: int) -> None:
    """Sums of small integers are exact."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 10, (n, d), generator=generator).float()
    index = torch.randint(-1, segments, (n,), generator=generator)
    order, names = torch.randperm(n, generator=generator), torch.randperm(segments, generator=generator)
    renamed = torch.where(index < 0, -5, names[index.clamp_min(0)])
    for impl in EVERY:
        result, counts = segment_mean(x, index, segments, impl=impl)
        again, others = segment_mean(x[order], renamed[order], segments, impl=impl)
        assert torch.equal(again[names], result)
        assert torch.equal(others[names], counts)
        totals, _ = segment_mean(x, index, segments, reduce="sum", impl=impl)
        assert torch.equal(totals.sum(0), x[index >= 0].sum(0))


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integers(impl: str, dtype: torch.dtype) -> None:
    x, index = case()
    index = index.abs() if dtype == torch.uint8 else index
    torch.testing.assert_close(segment_mean(x, index.to(dtype), 9, impl=impl), segment_mean(x, index, 9, impl=impl))


@pytest.mark.parametrize("impl", FUSED)
def test_any_strides(impl: str) -> None:
    full, index = torch.randn(41, 41, dtype=F64), torch.randint(-1, 4, (82,))[::2]
    for x in (full.T, full[:, ::2], full[:, 5:9], full[:1].expand(41, 41)):
        expected = segment_mean(x.contiguous(), index.contiguous(), 4, impl=impl)
        torch.testing.assert_close(segment_mean(x, index, 4, impl=impl), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_segment(impl: str, bad: float) -> None:
    x, index = torch.randn(12, 3), torch.arange(12) % 4 - 1
    x[2, 1] = bad
    x[4, 1] = bad  # of no segment
    result, _ = segment_mean(x, index, 3, impl=impl)
    assert (~result.isfinite()).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("impl", FUSED)
def test_what_pytorch_expects(impl: str) -> None:
    x, index = case(12, 3, 5)
    operators = torch.ops.fastret
    torch.library.opcheck(operators.segment_mean.default, (x, index, 5, True, impl))
    counts = segment_mean(x, index, 5)[1]
    arguments = (torch.randn(5, 3, dtype=F64), index, counts, True, F64, impl)
    torch.library.opcheck(operators.segment_mean_backward.default, arguments)
    x.requires_grad_()
    for reduce in REDUCTIONS:

        def result(a: Tensor, reduce: str = reduce, impl: str = impl) -> Tensor:
            return segment_mean(a, index, 5, reduce=reduce, impl=impl)[0]

        assert torch.autograd.gradcheck(result, x)
        assert torch.autograd.gradgradcheck(result, x)
        one, two = (torch.func.grad(lambda a, i=i: result(a, impl=i).sin().sum())(x) for i in (impl, "reference"))
        torch.testing.assert_close(one, two)
        batch = torch.randn(3, 12, 3, dtype=F64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            many = torch.vmap(torch.func.grad(lambda a: result(a).sin().sum()))(batch)
        torch.testing.assert_close(
            many, torch.stack([torch.func.grad(lambda a: result(a).sin().sum())(a) for a in batch])
        )
        torch._dynamo.reset()
        compiled = torch.compile(lambda a: result(a).sin().sum(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], two)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(result, (x.detach(),), (x.detach(),))
    assert not segment_mean(x, index, 5, impl=impl)[1].requires_grad


@pytest.mark.parametrize("impl", FUSED)
def test_rows_are_not_kept_for_backward(impl: str) -> None:
    kept = []
    x = torch.randn(500, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        segment_mean(x, torch.arange(500) % 7, 7, impl=impl)
    assert sum(kept) <= 8 * (500 + 7)


def test_autocast_changes_nothing() -> None:
    x, index = case()
    for impl in EVERY:
        expected = segment_mean(x.float(), index, 9, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(segment_mean(x.float(), index, 9, impl=impl), expected, rtol=0, atol=0)


def test_who_serves() -> None:
    assert registry.resolve("segment_mean", "cuda", torch.float32, None) == "tiled"
    with pytest.raises(ValueError, match="triton has no segment_mean"):
        segment_mean(torch.randn(3, 2), torch.arange(3), 3, impl="triton")
    with pytest.raises(ValueError, match="PyTorch has no segment_reduce on mps"):
        registry.resolve("segment_mean", "mps", torch.float32, None)
    with backend("reference"):
        assert segment_mean(torch.ones(3, 2), torch.arange(3), 3)[0].tolist() == [[1, 1]] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_the_definition_in_every_run() -> None:
    x, index = case(5000, 33, 50)
    expected = segment_mean(x, index, 50, impl="reference")
    runs = [segment_mean(x.cuda(), index.cuda(), 50) for _ in range(3)]
    torch.testing.assert_close(tuple(t.cpu() for t in runs[0]), expected)
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


X, INDEX = torch.randn(4, 3), torch.tensor([0, 1, -1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"index": INDEX + 1}, ValueError, "index: expected numbers from 0 to 1, got 2"),
        ({"index": INDEX[:2]}, ValueError, r"index: expected shape \(4,\).*got \(2,\)"),
        ({"index": INDEX.float()}, TypeError, "index: expected an integer dtype"),
        ({"index": [0, 1, 1, 0]}, TypeError, "index: expected an integer tensor.*got list"),
        ({"index": INDEX.to("meta")}, ValueError, "index: expected device cpu"),
        ({"num_segments": -1}, ValueError, "num_segments: expected at least 0, got -1"),
        ({"num_segments": 0}, ValueError, "index: expected numbers from 0 to -1, got 0"),
        ({"num_segments": 2.0}, TypeError, "num_segments: expected an integer, got float"),
        ({"reduce": "max"}, ValueError, "reduce: expected one of mean, sum, got 'max'"),
        ({"x": X[0]}, ValueError, r"x: expected shape \(rows, width\)"),
        ({"x": X.long()}, TypeError, "x: expected float32"),
        ({"impl": "gpu"}, ValueError, "impl: expected one of"),
    ],
)
@pytest.mark.parametrize("impl", EVERY)
def test_bad_input_names_the_argument(impl: str, arguments: dict, error: type[Exception], message: str) -> None:
    given = {"x": X, "index": INDEX, "num_segments": 2, "impl": impl, **arguments}
    with pytest.raises(error, match=message):
        segment_mean(given.pop("x"), given.pop("index"), given.pop("num_segments"), **given)
