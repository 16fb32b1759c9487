"""Sub-centres of masked_lse: groups of columns that become one score, against loops written from the papers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import registry
from fastret.backends.centers import Centers
from fastret.backends.registry import Call
from fastret.backends.tiled import masked_lse as tiled
from fastret.ops import Dense, Head, Indexed, Listed, Masked, PairMask, Shifted, masked_lse, masked_lse_sum
from fastret.ops.problem import LEARNED, pack

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32, ("centers",))) is None
]
IMPLS = ["reference", *FUSED]
TEMPERATURES = [None, 0.1]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and a tail on both axes at test sizes; a block of columns that no group divides."""
    monkeypatch.setattr(tiled, "ROWS", 16)
    monkeypatch.setattr(tiled, "COLUMNS", 23)


def labels(count: int, classes: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def listed(n: int, m: int) -> Listed:
    return Listed(torch.arange(0, 2 * n + 1, 2), labels(2 * n, m, seed=8), uniform(2 * n, seed=9))


HEADS: dict[str, Callable[[int, int], Head]] = {
    "plain": lambda n, m: Head(3.0, target=Indexed(labels(n, m))),
    "other classes, biases, smoothing": lambda n, m: Head(
        torch.tensor(2.5, dtype=F64),
        PairMask(different=(labels(n, m), torch.arange(m))),
        Indexed(labels(n, m)),
        0.3,
        uniform(n),
        uniform(m, seed=3),
    ),
    "over classes": lambda n, m: Head(
        torch.tensor(2.0, dtype=F64), PairMask(offset=1), Shifted(1), column_bias=uniform(m), axis="column"
    ),
    "thresholds, same label": lambda n, m: Head(
        4.0,
        PairMask(above=uniform(n) - 0.6, below=uniform(n) + 0.3),
        Masked(PairMask(same=(labels(n), labels(m, seed=3)), above=uniform(n) - 1), uniform(n)),
    ),
    "dense": lambda n, m: Head(1.5, PairMask(same=(labels(n), labels(m, seed=3))), Dense(uniform(n, m))),
    "hinge": lambda n, m: Head(1.0, row_bias=uniform(n) - 0.5, reduce="hinge"),
    "listed": lambda n, m: Head(3.0, target=listed(n, m)),
}
SERVED = [(impl, head) for impl in FUSED for head in HEADS if (impl, head) != ("cpu", "listed")]


def class_scores(x: Tensor, y: Tensor, centers: int, temperature: float | None) -> list[list[float]]:
    """One class at a time, as Qian et al. (SoftTriple) and Deng et al. (sub-center ArcFace) have it."""
    units = [[t / t.norm() for t in side] for side in (x, y)]
    result = []
    for row in units[0]:
        line = []
        for first in range(0, len(y), centers):
            s = [float(row @ units[1][first + k]) for k in range(centers)]
            if temperature is None:
                line.append(max(s))
            else:
                weights = [math.exp(v / temperature) for v in s]
                line.append(sum(w * v for w, v in zip(weights, s, strict=True)) / sum(weights))
        result.append(line)
    return result


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("centers", [1, 2, 5])
def test_reference_is_the_definition(centers: int, temperature: float | None) -> None:
    n, m = 6, 7
    x, y = torch.randn(n, 4, dtype=F64), torch.randn(m * centers, 4, dtype=F64)
    index = labels(n, m)
    head = Head(3.0, PairMask(different=(index, torch.arange(m))), Indexed(index))
    options = {"centers": centers, "center_temperature": temperature}
    ((lse, t),) = masked_lse(x, y, heads=[head], impl="reference", **options)
    for i, line in enumerate(class_scores(x, y, centers, temperature)):
        own = int(index[i])
        total = sum(math.exp(3 * r) for c, r in enumerate(line) if c != own)
        assert lse[i].item() == pytest.approx(math.log(total), rel=1e-12)
        assert t[i].item() == pytest.approx(3 * line[own], rel=1e-12)


@pytest.mark.parametrize("temperature", [None, 0.1, 3.0])
def test_expansion_is_the_gradient_of_the_reduction(temperature: float | None) -> None:
    centers = Centers(4, temperature)
    scores, slopes = torch.randn(5, 12, dtype=F64, requires_grad=True), torch.randn(5, 3, dtype=F64)
    (expected,) = torch.autograd.grad(centers.reduce(scores), scores, slopes)
    torch.testing.assert_close(centers.expand(slopes, scores.detach()), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(centers.reduce, scores)


def values_and_gradients(x: Tensor, y: Tensor, head: Head, **options: object) -> list[Tensor]:
    """lse, t and the gradients of a random linear form of them."""

    def leaf(v: object) -> object:
        return v.detach().clone().to(wide).requires_grad_() if isinstance(v, Tensor) else v

    wide = F64 if x.dtype == F64 else torch.float32
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    learned = {name: leaf(getattr(head, name)) for name in ("scale", "row_bias", "column_bias")}
    head = Head(**{**vars(head), **learned})
    ((lse, t),) = masked_lse(x, y, heads=[head], **options)
    g, h = uniform(*lse.shape, seed=11).to(wide), uniform(*lse.shape, seed=12).to(wide)
    total = (g * torch.where(lse.isinf(), 0, lse)).sum() + 7 * (h * t).sum()
    inputs = [x, y, *(v for v in learned.values() if isinstance(v, Tensor))]
    gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [lse.detach(), t.detach(), *gradients]


@pytest.mark.parametrize(("impl", "head"), SERVED)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("normalize", [True, False])
def test_float64_equals_reference(impl: str, head: str, temperature: float | None, normalize: bool) -> None:
    for n, m, centers, d in ((33, 50, 3, 7), (3, 170, 2, 9), (65, 2, 10, 1), (70, 5, 200, 5)):
        x, y = torch.randn(n, d, dtype=F64), torch.randn(m * centers, d, dtype=F64)
        options = {"centers": centers, "center_temperature": temperature, "normalize": normalize}
        expected = values_and_gradients(x, y, HEADS[head](n, m), impl="reference", **options)
        actual = values_and_gradients(x, y, HEADS[head](n, m), impl=impl, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def restored():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")
    _C.set_gemm("")


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("gemm", ["own", "blas"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.usefixtures("restored")
def test_every_instruction_set_and_multiplier(
    isa: str, gemm: str, dtype: torch.dtype, threads: int, temperature: float | None
) -> None:
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    _C.set_gemm(gemm)
    n, m, centers = 133, 157, 3
    x, y = torch.randn(n, 37).to(dtype), torch.randn(m * centers, 37).to(dtype)
    options = {"centers": centers, "center_temperature": temperature}
    tolerance = 1e-10 if dtype == F64 else 3e-5
    for name in ("other classes, biases, smoothing", "over classes"):
        head = HEADS[name](n, m)
        actual = values_and_gradients(x, y, head, impl="cpu", **options)
        expected = values_and_gradients(x.to(F64), y.to(F64), head, impl="reference", **options)
        for a, e in zip(actual, expected, strict=True):
            rounding = torch.finfo(a.dtype).eps if a.dtype == torch.bfloat16 else 0.0
            torch.testing.assert_close(a.to(F64), e, rtol=0, atol=(tolerance + rounding) * (1 + e.abs().max().item()))


def weighted(x: Tensor, y: Tensor, head: Head, weight: Tensor, one_sweep: bool, **options: object) -> Tensor:
    if one_sweep:
        return masked_lse_sum(x, y, head=head, row_weight=weight, **options)
    ((lse, t),) = masked_lse(x, y, heads=[head], **options)
    return (weight * (lse - t)).sum()


# blocks of rows whose products are kept; of which there are several; that are multiplied twice
SHAPES = [(40, 50, 3), (700, 400, 10), (70, 6000, 10)]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
def test_one_sweep_is_the_weighted_sum(
    impl: str,
    shape: tuple[int, int, int],
    temperature: float | None,
    dtype: torch.dtype,
    normalize: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiled, "ROWS", 1024)
    monkeypatch.setattr(tiled, "COLUMNS", 1023)
    n, m, centers = shape
    x, y = (torch.randn(k, 6, dtype=dtype).requires_grad_() for k in (n, m * centers))
    scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    row_bias, column_bias = (torch.rand(k, dtype=dtype).requires_grad_() for k in (n, m))
    mask = PairMask(different=(labels(n, 5), labels(m, 5, seed=3)))
    smoothing = 0.2 if dtype == F64 else 0.0  # a sum of 6000 equal weights in float32 is 1e-5 off by itself
    head = Head(scale, mask, Indexed(labels(n, m)), smoothing, row_bias, column_bias)
    weight = torch.rand(n, dtype=dtype)
    inputs = (x, y, scale, row_bias, column_bias)
    options = {"centers": centers, "center_temperature": temperature, "normalize": normalize, "impl": impl}
    losses = [weighted(x, y, head, weight, one_sweep, **options) for one_sweep in (True, False)]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == F64 else {"rtol": 2e-3, "atol": 2e-4}
    torch.testing.assert_close(*losses, rtol=tolerance["rtol"] / 100, atol=tolerance["atol"])
    gradients = [torch.autograd.grad(7 * loss, inputs) for loss in losses]
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("one_sweep", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradcheck_through_the_kernels(impl: str, one_sweep: bool, temperature: float | None) -> None:
    n, m, centers = 7, 5, 3
    index, weight = labels(n, m), uniform(n)

    def run(x: Tensor, y: Tensor, scale: Tensor, row_bias: Tensor, column_bias: Tensor) -> Tensor:
        head = Head(scale, PairMask(offset=0), Indexed(index), 0.1, row_bias, column_bias)
        options = {"centers": centers, "center_temperature": temperature, "impl": impl}
        return weighted(x, y, head, weight, one_sweep, **options)

    shapes = ((n, 4), (m * centers, 4), (), (n,), (m,))
    assert torch.autograd.gradcheck(run, [torch.randn(s, dtype=F64).add_(1).requires_grad_() for s in shapes])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("one_sweep", [True, False])
def test_the_first_of_equal_centers_takes_the_gradient(impl: str, one_sweep: bool) -> None:
    one = torch.randn(5, 4, dtype=F64)
    y = one.repeat_interleave(3, 0).requires_grad_()
    x = torch.randn(6, 4, dtype=F64)
    loss = weighted(x, y, Head(5.0), torch.ones(6, dtype=F64), one_sweep, centers=3, impl=impl)
    (gradient,) = torch.autograd.grad(loss, y)
    single = one.requires_grad_()
    (expected,) = torch.autograd.grad(weighted(x, single, Head(5.0), torch.ones(6), one_sweep, impl=impl), single)
    torch.testing.assert_close(gradient.view(5, 3, 4)[:, 0], expected)
    assert (gradient.view(5, 3, 4)[:, 1:] == 0).all()


def mean_scores(x: Tensor, means: Tensor, head: Head, weight: Tensor) -> Tensor:
    logits = 4.0 * torch.nn.functional.normalize(x) @ means.T
    own = logits.gather(1, head.target.index[:, None])[:, 0]  # type: ignore[union-attr]
    return (weight * (logits.logsumexp(1) - own)).sum()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("one_sweep", [True, False])
def test_limits_of_the_temperature(impl: str, one_sweep: bool) -> None:
    """Cold: the greatest score. Hot: the mean. Equal centres: one centre. One centre: no centres."""
    x, y = torch.randn(9, 5, dtype=F64).requires_grad_(), torch.randn(12, 5, dtype=F64).requires_grad_()
    head, weight = Head(4.0, target=Indexed(labels(9, 4))), uniform(9)

    def same(a: Tensor, b: Tensor, tolerance: float) -> None:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        gradients = [torch.autograd.grad(loss, (x, y)) for loss in (a, b)]
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)

    def run(y: Tensor, centers: int, temperature: float | None) -> Tensor:
        options = {"centers": centers, "center_temperature": temperature, "impl": impl}
        return weighted(x, y, head, weight, one_sweep, **options)

    for cold in (1e-5, 1e-30, 2e-38):
        same(run(y, 3, cold), run(y, 3, None), 1e-9)
    unit = torch.nn.functional.normalize(y).view(4, 3, 5).mean(1)
    same(run(y, 3, 1e9), mean_scores(x, unit, head, weight), 1e-7)
    same(run(y[::3].repeat_interleave(3, 0), 3, 0.1), run(y[::3], 1, None), 1e-9)
    same(run(y[:4], 1, 0.1), run(y[:4], 1, None), 1e-12)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("temperature", [None, 0.1, 1e-6, 1e30])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_raw_rows_of_any_length_stay_finite(impl: str, temperature: float | None, scale: float) -> None:
    x, y = torch.randn(9, 5) * scale, torch.randn(40, 5) * scale
    options = {"centers": 4, "center_temperature": temperature, "normalize": False, "impl": impl}
    for one_sweep in (True, False):
        head = Head(1e-30, target=Indexed(labels(9, 10)))
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        loss = weighted(x, y, head, torch.ones(9), one_sweep, **options)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_are_never_hidden(impl: str, temperature: float | None, bad: float) -> None:
    for side, row in ((0, 3), (1, 5)):
        sides = [torch.randn(6, 4), torch.randn(12, 4)]
        sides[side][row, 1] = bad
        for one_sweep in (True, False):
            options = {"centers": 3, "center_temperature": temperature, "impl": impl}
            assert weighted(*sides, Head(5.0), torch.ones(6), one_sweep, **options).isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_pieces_of_the_classes_merge(impl: str, temperature: float | None) -> None:
    x, y = torch.randn(8, 5, dtype=F64), torch.randn(33, 5, dtype=F64)
    head = Head(4.0, PairMask(offset=2), Indexed(labels(8, 11)), 0.1)
    options = {"centers": 3, "center_temperature": temperature, "columns": 11, "impl": impl}
    ((lse, t),) = masked_lse(x, y, heads=[head], **options)
    first, second = (
        masked_lse(x, y[3 * a : 3 * b], heads=[head], first_column=a, **options)[0] for a, b in ((0, 4), (4, 11))
    )
    torch.testing.assert_close(torch.logaddexp(first[0], second[0]), lse)
    torch.testing.assert_close(first[1] + second[1], t)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_empty_sides(impl: str, temperature: float | None) -> None:
    options = {"centers": 3, "center_temperature": temperature, "impl": impl}
    for n, m in ((0, 4), (5, 0), (0, 0)):
        x, y = torch.randn(n, 2, requires_grad=True), torch.randn(3 * m, 2, requires_grad=True)
        rows, columns = masked_lse(x, y, heads=[Head(), Head(axis="column")], **options)
        assert [len(t) for t in (*rows, *columns)] == [n, n, m, m]
        total = sum(torch.where(t.isinf(), 0, t).sum() for t in (*rows, *columns))
        assert [g.shape for g in torch.autograd.grad(total, (x, y))] == [x.shape, y.shape]
        assert masked_lse_sum(x, y, head=Head(), row_weight=torch.zeros(n), **options) == 0


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_registered_operators(impl: str, temperature: float | None) -> None:
    x, y, scale = torch.randn(6, 4), torch.randn(15, 4), torch.tensor(3.0)
    heads = [Head(scale, target=Indexed(labels(6, 5)))]
    whole = {"normalize": True, "first_column": 0, "columns": 5, "centers": 3, "center_temperature": temperature}
    problem = pack(x, y, heads, **whole, impl=impl)
    torch.library.opcheck(torch.ops.fastret.masked_lse.default, problem)
    results = torch.ops.fastret.masked_lse.default(*problem)
    need = [t is not None for t in problem[:LEARNED]]
    backward = ([torch.ones_like(r) for r in results], results[::2], *problem, need)
    torch.library.opcheck(torch.ops.fastret.masked_lse_backward.default, backward)
    torch.library.opcheck(torch.ops.fastret.masked_lse_sum.default, (*problem, torch.ones(6), need))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("one_sweep", [True, False])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(impl: str, one_sweep: bool, dynamic: bool | None) -> None:
    torch._dynamo.reset()

    def run(x: Tensor, y: Tensor) -> Tensor:
        options = {"centers": 3, "center_temperature": 0.1, "impl": impl}
        return weighted(x, y, Head(5.0), x.new_ones(x.shape[0]), one_sweep, **options)

    inputs = torch.randn(6, 4, requires_grad=True), torch.randn(15, 4, requires_grad=True)
    value, expected = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*inputs), run(*inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_same_bits_every_run(temperature: float | None) -> None:
    x, y = torch.randn(300, 24), torch.randn(2500, 24)
    options = {"centers": 5, "center_temperature": temperature, "impl": "cpu"}
    runs = [values_and_gradients(x, y, HEADS["thresholds, same label"](300, 500), **options) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_triton_refuses_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    monkeypatch.setattr(registry.IMPLEMENTATIONS["triton"].__class__, "missing", lambda self: None)
    with pytest.raises(NotImplementedError, match=r"impl='triton' cannot serve this call: .*sub-centres.*'tiled' does"):
        masked_lse(x, y, heads=[Head()], centers=3, impl="triton")
    assert registry.resolve("masked_lse", "cuda", torch.float32, None) == "triton"
    assert registry.resolve("masked_lse", "cuda", torch.float32, None, ("centers",)) == "tiled"
    with pytest.raises(ValueError, match="impl='cpu' cannot serve this call: cpu runs on cpu, not on cuda"):
        registry.resolve("masked_lse", "cuda", torch.float32, "cpu", ("centers",))


X, Y = torch.randn(6, 4), torch.randn(12, 4)
BAD_CALLS: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"centers": 5}, ValueError, "y: expected 5 centers a class, got 12 rows"),
    ({"centers": 0}, ValueError, "centers: expected at least 1, got 0"),
    ({"centers": 2.0}, TypeError, "centers: expected an integer, got float"),
    ({"centers": None}, TypeError, "centers: expected an integer, got NoneType"),
    ({"centers": 3, "y": None}, ValueError, "y: expected the 3 centers of each class, got None"),
    ({"centers": 3, "head": Head(width=2)}, ValueError, r"heads\[0\].width: expected None with centers, got 2"),
    ({"centers": 3, "columns": 3}, ValueError, r"columns: expected at least first_column \+ M = 4, got 3"),
    (
        {"centers": 3, "head": Head(column_bias=torch.ones(12))},
        ValueError,
        r"column_bias: expected shape \(4,\), got \(12,\)",
    ),
    ({"centers": 3, "center_temperature": 0.0}, ValueError, "center_temperature: expected a positive number, got 0"),
    ({"centers": 3, "center_temperature": -1.0}, ValueError, "center_temperature: expected a positive number, got -1"),
    ({"centers": 3, "center_temperature": math.nan}, ValueError, "center_temperature: expected a finite number"),
    ({"centers": 3, "center_temperature": torch.tensor(1.0)}, TypeError, "center_temperature: .*got Tensor"),
]


@pytest.mark.parametrize("one_sweep", [True, False])
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message for *_, message in BAD_CALLS])
def test_bad_input_names_the_argument(
    one_sweep: bool, call: dict[str, object], error: type[Exception], message: str
) -> None:
    options = dict(call)
    y, head = options.pop("y", Y), options.pop("head", Head())
    with pytest.raises(error, match=message):
        weighted(X, y, head, torch.ones(6), one_sweep, **options)
