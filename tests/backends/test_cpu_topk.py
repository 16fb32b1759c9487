"""topk in C++: every instruction set, multiplier, type and number of threads; its plan; what it refuses to touch."""

from collections.abc import Iterator

import pytest
import torch

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.backends.pairs import PairMask
from fastret.ops import topk

assert cpu.missing() is None
F64 = torch.float64


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")
    _C.set_gemm("")


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("gemm", ["own", "blas"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_every_instruction_set_and_multiplier(isa: str, gemm: str, dtype: torch.dtype, metric: str) -> None:
    _C.set_isa(isa)
    _C.set_gemm(gemm)
    x, y = torch.randn(90, 37).to(dtype), torch.randn(1500, 37).to(dtype)
    mask = PairMask(different=(torch.arange(90) % 5, torch.arange(1500) % 7), offset=3)
    truth, _ = topk(x.to(F64), y.to(F64), k=1500, metric=metric, mask=mask, impl="reference")
    for k in (1, 60, 1500):
        scores, indices = topk(x, y, k=k, metric=metric, mask=mask, impl="cpu")
        tolerance = 1e-12 if dtype == F64 else 1e-5
        torch.testing.assert_close(scores.to(F64), truth[:, :k], rtol=tolerance, atol=tolerance * 37)
        found = indices >= 0
        assert torch.equal(found, truth[:, :k].isfinite())
        assert (indices.sort(1).values.diff(dim=1)[found[:, 1:].flip(1)] > 0).all()  # each once


@pytest.mark.parametrize("k", [1, 10, 700, 9000])
@pytest.mark.parametrize("n", [1, 5, 130])
def test_threads_change_nothing(n: int, k: int) -> None:
    """Few queries: threads own parts of the columns, whose results are merged."""
    _C.set_gemm("own")
    x, y = torch.randn(n, 16), torch.randn(9000, 16)
    y[5000:7000] = y[:2000]
    torch.set_num_threads(1)
    expected = topk(x, y, k=k, metric="l2")
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        torch.testing.assert_close(topk(x, y, k=k, metric="l2"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("order", ["ascending", "descending", "organ pipe", "equal", "random"])
@pytest.mark.parametrize("k", [1, 2, 24, 25, 26, 300, 4999, 5000])
def test_selection_of_any_order(order: str, k: int, dtype: torch.dtype) -> None:
    """Candidates that all replace others, none, and runs of equals."""
    steps = torch.arange(5000)
    values = {
        "ascending": steps,
        "descending": -steps,
        "organ pipe": (steps - 2500).abs(),
        "equal": steps * 0,
        "random": torch.randint(-50, 50, (5000,)),
    }[order].to(dtype)
    scores, indices = topk(torch.tensor([[1.0], [-1.0]], dtype=dtype), values[:, None], k=k, metric="dot")
    for row, sign in enumerate((1, -1)):
        expected = (sign * values).sort(descending=True, stable=True)
        assert torch.equal(scores[row], expected.values[:k])
        assert torch.equal(indices[row], expected.indices[:k])


@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000, 60_502, 10**7])
@pytest.mark.parametrize("m", [0, 1, 256, 5000, 10**9])
@pytest.mark.parametrize("k", [1, 200, 10**6])
@pytest.mark.parametrize("threads", [1, 2, 96])
def test_plan(n: int, m: int, k: int, threads: int) -> None:
    k = min(k, m)
    rows, parts, part_columns, capacity = _C.topk_plan(n, m, k, 8, threads)
    assert rows >= 1
    assert rows * capacity * 8 <= max(16 << 20, 16 * capacity * 8)
    assert capacity >= k + 256
    assert capacity <= 2 * k + 256 + (1 if m < 4 * k + 4 else 0)
    assert part_columns % 256 == 0
    assert parts * part_columns >= m
    assert 1 <= parts <= threads
    assert n * (parts - 1) <= 128 * threads  # merged lists stay few
    if n >= 64 * threads:
        assert parts == 1


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "position", "value", "message"),
    [
        ("x", 4, 4, "x: not a floating point type"),
        ("y", 4, 4, "y: not a floating point type"),
        ("y", 4, 1, "y: expected rows that are accumulated in the same type as x"),
        ("y", 2, 7, "y: expected shape"),
        ("y", 5, 8, "y: reaches beyond its storage"),
        ("above", 2, 39, "mask.above: expected shape"),
        ("scores", 2, 4, "scores: expected shape"),
        ("scores", 4, 1, "scores: unexpected dtype code 1"),
        ("indices", 4, 0, "indices: unexpected dtype code 0"),
        ("indices", 0, 0, "indices: null pointer"),
    ],
)
def test_nothing_is_touched_through_a_wrong_description(what: str, position: int, value: int, message: str) -> None:
    tensors = {
        "x": torch.ones(40, 8),
        "y": torch.ones(50, 8),
        "above": torch.ones(40),
        "scores": torch.ones(40, 3),
        "indices": torch.ones(40, 3).long(),
    }
    a = {name: array(t) for name, t in tensors.items()}

    def run(a: dict[str, ArrayTuple], k: int = 3, metric: int = 0, threads: int = 1) -> None:
        mask: _C.MaskTuple = (None, None, None, None, 0, a["above"], None)
        _C.topk(a["x"], a["y"], k, mask, metric, 0, threads, a["scores"], a["indices"])

    run(a)
    with pytest.raises(ValueError, match=message):
        run({**a, what: _changed(a[what], position, value)})
    with pytest.raises(ValueError, match="k: must be at least 1"):
        run(a, k=0)
    with pytest.raises(ValueError, match="metric: unknown kind"):
        run(a, metric=3)
    with pytest.raises(ValueError, match="threads: must be at least 1"):
        run(a, threads=0)
