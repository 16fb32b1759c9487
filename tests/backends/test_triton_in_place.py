"""Columns that are many and lie packed, as proxies do, are read where they lie: values and gradients against the
definition in float64, in every plan, and that nothing of their size is made beside their gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_lse_cases import BOUNDS, COMPILED, DEVICE, F64, labels, rows, uniform
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastret import functional as F
from fastret.backends.pairs import Need
from fastret.backends.triton import masked_lse as backend
from fastret.kernels.triton import config
from fastret.ops import Head, Indexed, PairMask, Shifted, masked_lse, masked_lse_sum

N, M, WIDTH = (65, 290, 48) if COMPILED else (5, 37, 48)
PLANS = ["fused", "weights", "strips"]
Heads = Callable[[type], list[Head]]

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning")


def classes() -> Tensor:
    return torch.arange(M, device=DEVICE) % 7


def heads(kind: str, dtype: torch.dtype) -> list[Head]:
    own = PairMask(same=(labels(N, 7), classes()))
    others = PairMask(different=(labels(N, 7), classes()))
    bias = uniform(M).to(dtype).requires_grad_()
    scale = torch.tensor(7.0, dtype=dtype, device=DEVICE).requires_grad_()
    return {
        "softmax": lambda: [Head(scale, target=Indexed(labels(N, M)), smoothing=0.1, column_bias=bias)],
        "anchors": lambda: [Head(-8.0, own, axis="column"), Head(8.0, others, axis="column")],
        "clip": lambda: [Head(scale, target=Shifted(3)), Head(5.0, target=Shifted(3), axis="column")],
    }[kind]()


def losses(x: Tensor, y: Tensor, given: list[Head], impl: str, *, normalize: bool = True) -> list[Tensor]:
    """Results and gradients of rows, scales and biases, of upstream gradients that differ."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    found = [t for pair in masked_lse(x, y, heads=given, normalize=normalize, impl=impl) for t in pair]
    learned = [t for h in given for t in (h.scale, h.column_bias) if isinstance(t, Tensor)]
    upstream = [torch.linspace(-1, 2, len(f), dtype=f.dtype, device=DEVICE) + k for k, f in enumerate(found)]
    depend = [k for k, f in enumerate(found) if f.requires_grad]  # no score without a target does
    gradients = torch.autograd.grad([found[k] for k in depend], [x, y, *learned], [upstream[k] for k in depend])
    return [*found, *gradients]


def near(actual: list[Tensor], expected: list[Tensor], results: int, dtype: torch.dtype) -> None:
    exact, rounded = BOUNDS[dtype]
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        bound = rounded if results <= k < results + 2 else exact
        a, e = a.detach(), e.detach()
        assert torch.equal(a == -torch.inf, e == -torch.inf)  # of columns whose mask allows no row
        a, e = (t.double().masked_fill(t == -torch.inf, 0) for t in (a, e))
        error, norm = (a - e).norm(), e.norm().clamp_min(1)
        assert error <= bound * norm, (k, float(error / norm))


@pytest.fixture
def read_in_place(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Rows that were."""
    found: list[Tensor] = []
    original = backend.in_place

    def watched(y: Tensor, *arguments: Any) -> Any:
        found.append(y)
        return original(y, *arguments)

    monkeypatch.setattr(backend, "in_place", watched)
    return found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["softmax", "anchors", "clip"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_values_and_gradients(
    request: pytest.FixtureRequest, read_in_place: list[Tensor], plan: str, kind: str, dtype: torch.dtype
) -> None:
    """Of columns of every length, and rows whose unit rows half precision holds: the columns are not rounded."""
    request.getfixturevalue(plan)
    wide = F64 if dtype == F64 else torch.float32
    x = (3 * torch.sign(rows(N, WIDTH)) * (torch.arange(WIDTH, device=DEVICE) % 3 == 0)).to(dtype)  # of norm 12
    y = rows(M, WIDTH, seed=6) * torch.logspace(-3, 3, M, dtype=F64, device=DEVICE)[:, None]
    y = y.to(dtype)
    actual = losses(x, y, heads(kind, wide), "triton")
    assert len(read_in_place) == 2, "forward and backward"
    expected = losses(x.double(), y.double(), heads(kind, F64), "reference")
    results = 2 * len(heads(kind, wide))
    lengths = y.double().norm(dim=1, keepdim=True)
    for found in (actual, expected):
        found[results] = found[results].double() * 12
        found[results + 1] = found[results + 1].double() * lengths
    near(actual, expected, results, dtype)


@pytest.mark.parametrize("plan", PLANS)
def test_as_a_copy(request: pytest.FixtureRequest, read_in_place: list[Tensor], plan: str) -> None:
    """Columns that are zero, shorter than 1e-12, huge, or unit rows; a copy is what columns apart take."""
    request.getfixturevalue(plan)
    x, y = rows(N, WIDTH).float(), rows(M, WIDTH, seed=6).float()
    y[3], y[4], y[5], y[6] = 0, y[4] * 1e-15, y[5] * 1e30, y[6] * 1e-30
    apart = torch.nn.functional.pad(y, (0, 16))[:, :WIDTH]
    given = heads("softmax", torch.float32)
    actual = losses(x, y, given, "triton")
    assert len(read_in_place) == 2
    expected = losses(x, apart, given, "triton")
    assert len(read_in_place) == 2
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_one_sweep_and_sums(request: pytest.FixtureRequest, read_in_place: list[Tensor], plan: str) -> None:
    request.getfixturevalue(plan)
    x, y = rows(N, WIDTH).requires_grad_(), rows(M, WIDTH, seed=6).requires_grad_()
    head, weight = Head(6.0, target=Indexed(labels(N, M)), smoothing=0.2), uniform(N)
    far = Head(1.0, PairMask(different=(labels(N, 7), classes())), row_bias=uniform(N), reduce="hinge")

    def run(impl: str) -> list[Tensor]:
        total = masked_lse_sum(x, y, head=head, row_weight=weight, impl=impl)
        ((sums, _),) = masked_lse(x, y, heads=[far], impl=impl)
        return [total, sums, *torch.autograd.grad(3 * total + sums.square().sum(), [x, y])]

    actual = run("triton")
    assert len(read_in_place) == 3
    for a, e in zip(actual, run("reference"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_raw_scores(request: pytest.FixtureRequest, read_in_place: list[Tensor], plan: str) -> None:
    request.getfixturevalue(plan)
    x, y = rows(N, WIDTH), rows(M, WIDTH, seed=6)
    given = heads("softmax", F64)
    actual = losses(x, y, given, "triton", normalize=False)
    assert len(read_in_place) == 2
    for a, e in zip(actual, losses(x, y, given, "reference", normalize=False), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_every_result(bad: float, normalize: bool) -> None:
    x, y = rows(N, WIDTH).float(), rows(M, WIDTH, seed=6).float()
    y[M - 1, WIDTH - 1] = bad
    masked = [Head(2.0, PairMask(same=(labels(N, 7), classes())), Indexed(labels(N, M)))]
    for t in losses(x, y, masked, "triton", normalize=normalize):
        assert t.isnan().all()


def test_what_is_copied_still(read_in_place: list[Tensor]) -> None:
    """Few columns, columns apart, a width that is padded, thresholds, prefixes, float16 to be normalised."""
    x, y = rows(N, WIDTH).float(), rows(M, WIDTH, seed=6).float()
    plain = [Head(2.0)]

    def run(x: Tensor, y: Tensor, heads: list[Head] = plain, normalize: bool = True) -> None:
        masked_lse(x, y, heads=heads, normalize=normalize, impl="triton")

    run(x, y[: 2 * N])
    run(x, y.T.contiguous().T)
    run(x[:, :21].contiguous(), y[:, :21].contiguous())
    run(x, y, [Head(2.0, PairMask(above=torch.zeros(N, device=DEVICE)))])
    run(x, y, [Head(2.0, width=16)])
    run(x.half(), y.half())
    assert not read_in_place
    run(x, y)
    run(x.half(), y.half(), normalize=False)
    assert len(read_in_place) == 2


class Memory(TorchDispatchMode):
    """Bytes that PyTorch holds at most, of what was made within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.held = {k: (ref, size) for k, (ref, size) in self.held.items() if not ref.expired()}
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given | self.held.keys():
                storage = t.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return result


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Of which launches take none: the interpreter copies with PyTorch."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def alone(self: Any, *arguments: Any, **options: Any) -> None:
        with _disable_current_modes():
            launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", alone)
    return Memory()


@pytest.mark.skipif(COMPILED, reason="tests/gpu/test_scale.py asks the allocator")
@pytest.mark.parametrize("reduce", ["lse", "hinge"])
def test_sums_across_are_merged_as_they_come(monkeypatch: pytest.MonkeyPatch, memory: Memory, reduce: str) -> None:
    """Of heads over rows and columns: a table of all blocks of rows and columns would be 256 KiB, twice."""
    monkeypatch.setattr("fastret.backends.workspace._workspace", "32KiB")
    monkeypatch.setitem(config._INTERPRETED["lse two"], "BLOCK_N", 256)  # as many blocks, sooner
    x, y = rows(1024, 16).float(), rows(1024, 16, seed=6).float()
    heads = [Head(6.0, target=Indexed(labels(1024, 1024)), axis=axis, reduce=reduce) for axis in ("row", "column")]
    with memory:
        found = backend.forward(x, y, heads, normalize=True, first_column=0, columns=1024)
    assert memory.most <= 2 * 4 * 1024 * 16 + 32 * 1024 + 40 * 8 * 1024
    expected = masked_lse(x, y, heads=heads, impl="tiled")
    for of_head, should_be in zip(found, expected, strict=True):
        torch.testing.assert_close(of_head, tuple(should_be), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_nan_in_rows_reaches_gradients_of_biases(request: pytest.FixtureRequest, plan: str) -> None:
    """Also those of a phi that is flat there."""
    request.getfixturevalue(plan)
    x, y = rows(9, 5), rows(11, 5, seed=6)
    y[4, 1] = torch.nan
    biases = [torch.zeros(n, device=DEVICE, dtype=x.dtype, requires_grad=True) for n in (9, 11)]
    head = Head(2.0, row_bias=biases[0], column_bias=biases[1], reduce="hinge")
    ((total, _),) = masked_lse(x, y, heads=[head], normalize=False, impl="triton")
    for gradient in torch.autograd.grad(total.sum(), biases):
        assert gradient.isnan().all()


@pytest.mark.skipif(COMPILED, reason="tests/gpu/test_scale.py asks the allocator")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_one_gradient(
    request: pytest.FixtureRequest, memory: Memory, plan: str, dtype: torch.dtype
) -> None:
    """In the dtype of accumulation; beside it a few rows, numbers a column, and blocks of 16 x 16 scores or weights."""
    request.getfixturevalue(plan)
    x, y = rows(4, 64).to(dtype), rows(400, 64, seed=6).to(dtype)
    head, weight = Head(6.0, target=Indexed(labels(4, 400)), smoothing=0.2), uniform(4).float()
    need = Need(True, True, False, False, False)
    with memory:
        value, gradients = backend.sweep(x, y, head, weight, normalize=True, first_column=0, columns=400, need=need)
    assert gradients.y is not None
    assert gradients.y.dtype == torch.float32
    assert value.isfinite()
    assert memory.most >= 4 * 400 * 64
    assert memory.most <= 4 * (400 * 64 + 8 * 400 + 40 * 4 * 64) + 4096


def test_a_loss_of_many_proxies(read_in_place: list[Tensor]) -> None:
    x, p = rows(N, WIDTH).requires_grad_(), rows(M, WIDTH, seed=6).requires_grad_()
    found = [
        [loss, *torch.autograd.grad(loss, [x, p])]
        for loss in (F.proxy_nca(x, p, labels(N, M), smoothing=0.1, impl=impl) for impl in ("triton", "reference"))
    ]
    assert len(read_in_place) == 1
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
