"""Every op and loss on the GPU: right in every dtype, captured by CUDA graphs, without a wait, traced, under autocast.

Without a GPU (``FASTRET_GPU_TESTS=cpu``) nothing is captured and nothing can wait: the same calls are made.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu_cases import (
    CASES,
    DEVICE,
    ON_GPU,
    PARAMETERS,
    Case,
    check,
    given,
    implementations,
    loss_of,
    rows,
    step,
)
from torch import Tensor

from fastret.backends import choices, registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract|divide):RuntimeWarning"),
]

F32 = torch.float32
STATIC = [name for name, case in CASES.items() if not case.waits]
INDUCTOR = ("SmoothAP", "InfoNCE", "SoftPQ")  # the others' operators are as opaque to it, and it takes many seconds


@pytest.mark.parametrize(("name", "precision"), PARAMETERS)
def test_values_and_gradients(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, precision, monkeypatch)


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device: nothing for auto to pick")
@pytest.mark.parametrize("name", CASES)
def test_auto_picks_kernels_of_the_gpu(name: str) -> None:
    """Or the tiles, of an op whose kernels wait for a measurement: the other tests ask for those by name."""
    case = CASES[name]
    waiting = {"tiled"} if choices.ON_CUDA[case.op].order == ("tiled",) else set()
    assert registry.resolve(case.op, "cuda", F32, None, case.options) in {*implementations(case, F32), *waiting}


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


@pytest.mark.parametrize("name", STATIC)
def test_graph_replays_with_other_inputs(name: str) -> None:
    """Forward and backward, bit for bit as a call on the new inputs."""
    case = CASES[name]
    for impl in implementations(case, F32):
        leaves = given(case, F32)
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


@pytest.mark.parametrize("name", STATIC)
def test_nothing_waits_for_the_device(name: str) -> None:
    case = CASES[name]
    for impl in implementations(case, F32):
        leaves = given(case, F32)
        step(case, leaves, impl)  # compiles, loads
        with waiting_is_an_error():
            total, _ = loss_of(case.call(*leaves, impl=impl))
            if case.learned:
                torch.autograd.grad(total, leaves[: case.learned])


@pytest.mark.parametrize("name", [name for name in STATIC if CASES[name].traced])
def test_compiles_in_one_graph(name: str) -> None:
    case = CASES[name]
    backend = "inductor" if ON_GPU and name in INDUCTOR else "aot_eager"
    for impl in implementations(case, F32):
        torch._dynamo.reset()
        leaves = given(case, F32)
        call = torch.compile(case.call, fullgraph=True, backend=backend)
        for a, e in zip(step(case, leaves, impl, call), step(case, leaves, impl), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_autocast_leaves_float32_rows_as_they_are(name: str) -> None:
    """Ops work in the dtype of their rows; what formulas add in PyTorch is no product that autocast would narrow."""
    case = CASES[name]
    for impl in implementations(case, F32):
        leaves = given(case, F32)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = step(case, leaves, impl)
        for a, e in zip(actual, step(case, leaves, impl), strict=True):
            assert torch.equal(a, e), (name, impl)


def on_a_late_stream(case: Case, impl: str) -> list[Tensor]:
    """Leaves that hold NaN until a stream, which sleeps first, fills them: kernels of another one would be early."""
    leaves = given(case, F32)
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
@pytest.mark.parametrize("name", CASES)
def test_kernels_run_in_the_current_stream(name: str) -> None:
    case = CASES[name]
    for impl in implementations(case, F32):
        expected = step(case, given(case, F32), impl)
        for a, e in zip(on_a_late_stream(case, impl), expected, strict=True):
            assert torch.equal(a, e), (name, impl)


@pytest.mark.parametrize("name", ["SmoothAP", "InfoNCE", "SupCon", "ProxyNCA"])
def test_rows_from_anywhere_in_memory(name: str) -> None:
    """Rows that are every other column of a wider matrix, and start at an odd address."""
    case = CASES[name]
    for impl in implementations(case, F32):
        plain = given(case, F32)
        strided = []
        for k, leaf in enumerate(plain):
            wide = rows(len(leaf), 2 * leaf.shape[1] + 3, seed=90 + k).to(F32)
            view = wide[:, 3::2]
            view.copy_(leaf.detach())
            strided.append(view.requires_grad_(leaf.requires_grad))
        for a, e in zip(step(case, strided, impl), step(case, plain, impl), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
