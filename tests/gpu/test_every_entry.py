"""Every op and loss on the GPU: right in every dtype, captured by CUDA graphs, without a wait, traced, under autocast.

Rows in half precision or TF32 go through the pair matrix by another plan than those in float32, "weights", and those in
float16 with numbers that only the device knows: graphs, waits and streams are tried with each of them.

Without a GPU (``FASTRET_GPU_TESTS=cpu``) nothing is captured and nothing can wait: the same calls are made.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_cases import (
    CASES,
    DEVICE,
    ON_GPU,
    PARAMETERS,
    PRECISIONS,
    Case,
    check,
    given,
    implementations,
    loss_of,
    matmul_precision,
    rows,
    step,
)
from torch import Tensor

from fastret.backends import choices, registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract|divide):RuntimeWarning"),
]

STATIC = [name for name, case in CASES.items() if not case.waits]
INDUCTOR = ("SmoothAP", "InfoNCE", "SoftPQ")  # the others' operators are as opaque to it, and it takes many seconds
# Called in all of PRECISIONS: entries of every op whose Triton kernels multiply, with most reductions and targets. What
# others add does not depend on float16 or TF32, whose kernels would have to be compiled first.
IN_ALL = (
    "masked_lse",
    "masked_lse, columns",
    "row_extrema",
    "pair_dot",
    "soft_assign",
    "sampled_dot",
    "SmoothAP",
    "InfoNCE",
    "CLIP",
    "SupCon",
    "MultiSimilarity, mined",
    "InvariantSpreading",
    "CentroidTriplet",
    "ProxyAnchor",
    "SoftTargetInfoNCE",
)


def parameters(names: Iterable[str], others: tuple[str, ...] = ("fp32", "bf16")) -> list[Any]:
    """Names and precisions; ``others``: those of names that are not IN_ALL, by default what scripts/gpu_check.sh has
    the kernels of, after the values."""
    return [
        pytest.param(name, precision, id=f"{name}-{precision}")
        for name in names
        for precision in (PRECISIONS if name in IN_ALL else others)
    ]


@pytest.fixture
def dtype(precision: str) -> Iterator[torch.dtype]:
    """Of the rows; PyTorch multiplies float32 as the precision says."""
    with matmul_precision(PRECISIONS[precision].matmul):
        yield PRECISIONS[precision].dtype


def rounding(precision: str) -> float:
    """Relative: sums in another order, as Inductor or other strides make them, move a number by an ulp of float32, and
    where that is rounded to the factor of a product, or to a result, by one of these. 0: nothing is rounded."""
    return {"fp32": 0.0, "tf32": 2**-10, "bf16": 2**-7, "fp16": 2**-10}[precision]


def largest(t: Tensor) -> float:
    return torch.where(t.isfinite(), t, 0).abs().max().item()


@pytest.mark.parametrize(("name", "precision"), PARAMETERS)
def test_values_and_gradients(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, precision, monkeypatch)


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device: nothing for auto to pick")
@pytest.mark.parametrize(("name", "precision"), parameters(CASES))
def test_auto_picks_kernels_of_the_gpu(name: str, dtype: torch.dtype) -> None:
    """Or the tiles, of an op whose kernels wait for a measurement: the other tests ask for those by name."""
    case = CASES[name]
    waiting = {"tiled"} if choices.ON_CUDA[case.op].order == ("tiled",) else set()
    assert registry.resolve(case.op, "cuda", dtype, None, case.options) in {*implementations(case, dtype), *waiting}


def captured(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Replays a CUDA graph of a call, whose results stay where they are; without a GPU, the call itself."""
    if not ON_GPU:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and gradients' memory is found outside of the graph
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@pytest.mark.parametrize(("name", "precision"), parameters(STATIC))
def test_graph_replays_with_other_inputs(name: str, dtype: torch.dtype) -> None:
    """Forward and backward, bit for bit as a call on the new inputs."""
    case = CASES[name]
    for impl in implementations(case, dtype):
        leaves = given(case, dtype)
        replay = captured(lambda leaves=leaves, impl=impl: step(case, leaves, impl))
        replay()
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(leaf.roll(1, 0) * 1.25 if leaf.ndim else leaf * 1.25)
        got = [t.clone() for t in replay()]
        for a, e in zip(got, step(case, leaves, impl), strict=True):
            assert torch.equal(a, e), (name, impl)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    if not ON_GPU:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(("name", "precision"), parameters(STATIC))
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    for impl in implementations(case, dtype):
        leaves = given(case, dtype)
        step(case, leaves, impl)  # compiles, loads
        with waiting_is_an_error():
            total, _ = loss_of(case.call(*leaves, impl=impl))
            if case.learned:
                torch.autograd.grad(total, leaves[: case.learned])


@pytest.mark.parametrize(
    ("name", "precision"), parameters((name for name in STATIC if CASES[name].traced), others=("fp32",))
)
def test_compiles_in_one_graph(name: str, precision: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    backend = "inductor" if ON_GPU and name in INDUCTOR else "aot_eager"
    for impl in implementations(case, dtype):
        torch._dynamo.reset()
        leaves = given(case, dtype)
        call = torch.compile(case.call, fullgraph=True, backend=backend)
        for a, e in zip(step(case, leaves, impl, call), step(case, leaves, impl), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=max(1e-6, rounding(precision) * largest(e)))


@pytest.mark.parametrize(("name", "precision"), parameters(CASES))
def test_autocast_leaves_rows_as_they_are(name: str, dtype: torch.dtype) -> None:
    """Ops work in the dtype of their rows; what formulas add in PyTorch is no product that autocast would narrow."""
    case = CASES[name]
    for impl in implementations(case, dtype):
        leaves = given(case, dtype)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = step(case, leaves, impl)
        for a, e in zip(actual, step(case, leaves, impl), strict=True):
            assert torch.equal(a, e), (name, impl)


def on_a_late_stream(case: Case, dtype: torch.dtype, impl: str) -> list[Tensor]:
    """Leaves that hold NaN until a stream, which sleeps first, fills them: kernels of another one would be early."""
    leaves = given(case, dtype)
    with torch.no_grad():
        late = [leaf.clone() for leaf in leaves]
        for leaf in leaves:
            leaf.fill_(float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for leaf, values in zip(leaves, late, strict=True):
                leaf.copy_(values)
        results = step(case, leaves, impl)
    side.synchronize()
    return results


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device: no streams")
@pytest.mark.parametrize(("name", "precision"), parameters(CASES))
def test_kernels_run_in_the_current_stream(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    for impl in implementations(case, dtype):
        expected = step(case, given(case, dtype), impl)
        for a, e in zip(on_a_late_stream(case, dtype, impl), expected, strict=True):
            assert torch.equal(a, e), (name, impl)


@pytest.mark.parametrize(("name", "precision"), parameters(["SmoothAP", "InfoNCE", "SupCon", "ProxyNCA"]))
def test_rows_from_anywhere_in_memory(name: str, precision: str, dtype: torch.dtype) -> None:
    """Rows that are every other column of a wider matrix, and start at an odd address."""
    case = CASES[name]
    for impl in implementations(case, dtype):
        plain = given(case, dtype)
        strided = []
        for k, leaf in enumerate(plain):
            wide = rows(len(leaf), 2 * leaf.shape[1] + 3, seed=90 + k).to(dtype)
            view = wide[:, 3::2]
            view.copy_(leaf.detach())
            strided.append(view.requires_grad_(leaf.requires_grad))
        for a, e in zip(step(case, strided, impl), step(case, plain, impl), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=max(1e-6, rounding(precision) * largest(e)))
