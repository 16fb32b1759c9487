"""The C++ extension: instruction sets, multipliers, threads, processes, plans, and what it refuses to touch."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu import rank_sums
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.backends.segments import label_segments
from fastret.functional import smooth_ap

assert cpu.missing() is None
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")
    _C.set_gemm("")


def loss_and_gradients(dtype: torch.dtype, gallery: bool, impl: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(333, 70, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    y = torch.randn(290, 70, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, 60, (333,), generator=generator)
    y_labels = torch.randint(0, 60, (290,), generator=generator)
    other = {"ref_emb": y, "ref_labels": y_labels} if gallery else {}
    loss = smooth_ap(x, labels, temperature=0.05, impl=impl, **other)
    return [loss.detach(), *torch.autograd.grad(loss, [x, y] if gallery else [x])]


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("gemm", ["own", "blas"])
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set_and_multiplier(isa: str, gemm: str, gallery: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    expected = loss_and_gradients(torch.float64, gallery, "reference")
    _C.set_isa(isa)
    _C.set_gemm(gemm)
    assert (_C.isa(), _C.gemm()) == (isa, gemm)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for actual, wanted in zip(loss_and_gradients(dtype, gallery, "cpu"), expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=bound * wanted.abs().max().item())


@pytest.mark.parametrize("threads", [3, 5])
def test_more_threads_than_cores(threads: int) -> None:
    torch.set_num_threads(threads)
    for actual, wanted in zip(
        loss_and_gradients(torch.float64, False, "cpu"),
        loss_and_gradients(torch.float64, False, "reference"),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())


def test_instruction_set_by_environment() -> None:
    code = "import fastret; from fastret import _C; fastret.available_backends(); print(_C.isa(), _C.gemm())"
    environment = {**os.environ, "FASTRET_ISA": "base", "FASTRET_GEMM": "own"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["base", "own"]
    environment["FASTRET_ISA"] = "mmx"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "FASTRET_ISA: this processor runs base" in done.stderr


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 8, 9, 64])
def test_tournament_meets_every_pair_once(blocks: int) -> None:
    met = []
    for pairs in _C.tournament(blocks):
        played = [p for p in pairs if p != (-1, -1)]
        players = [b for p in played for b in p]
        assert len(players) == len(set(players)), "a block twice in one round"
        met += played
    assert sorted(met) == sorted((b, a) for a, b in combinations(range(blocks), 2))


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("n", [0, 1, 31, 256, 512, 1024, 4096, 1_000_000])
def test_plan(n: int, threads: int) -> None:
    rows, cols = _C.plan(n, n, True, threads)
    assert rows == cols
    assert rows % 32 == 0
    assert 32 <= rows <= 256
    assert n < 64 * threads or -(-n // rows) >= 2 * threads or threads == 1, "a round leaves threads idle"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_in_and_gradients_out_are_converted_exactly(dtype: torch.dtype) -> None:
    """Every half number as a row: its gradient is that of the same number in float32, rounded as PyTorch rounds."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    options = {"temperature": 50.0, "exclude_self": False, "normalize": False, "need_x": True, "need_y": False}
    for rows in numbers[numbers.isfinite()][:, None].split(1024):
        segments = label_segments(torch.arange(len(rows)) // 4)
        pairs = int(segments.count.sum())
        weights = torch.randn(pairs) * torch.logspace(-9, 6, pairs)  # gradients of every size, subnormal ones too
        half, _ = rank_sums.backward(weights, -weights, rows, None, segments, **options)
        wide, _ = rank_sums.backward(weights, -weights, rows.float(), None, segments, **options)
        torch.testing.assert_close(half, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_wherever_memory_lies(dtype: torch.dtype) -> None:
    """Small outputs and buffers that malloc places side by side, in every order: each row must still be written."""
    generator, kept = torch.Generator().manual_seed(0), []
    for trial in range(400):
        n, d = 4 + trial % 37, 1 + trial % 101
        kept = [*kept[-5:], torch.empty(int(torch.randint(1, 4000, (), generator=generator)))]
        x = torch.randn(n, d, generator=generator).to(dtype)
        segments = label_segments(torch.arange(n) // 3)
        g = torch.randn(int(segments.count.sum()), generator=generator)
        options = {"temperature": 0.5, "exclude_self": False, "normalize": True, "need_x": True, "need_y": False}
        half, _ = rank_sums.backward(g, g, x, None, segments, **options)
        wide, _ = rank_sums.backward(g, g, x.float(), None, segments, **options)
        assert torch.equal(half, wide.to(dtype)), trial


def test_rows_that_share_memory() -> None:
    x = torch.randn(1, 5).expand(6, 5)
    labels = torch.arange(6) // 2
    torch.testing.assert_close(smooth_ap(x, labels, impl="cpu"), smooth_ap(x.clone(), labels, impl="reference"))


def test_a_blas_that_is_wrong_is_not_used() -> None:
    code = (
        "import ctypes, fastret\n"
        "from fastret.backends import cpu\n"
        "wrong = ctypes.CDLL(None).getpid\n"
        "cpu._address = lambda library, symbol: ctypes.cast(wrong, ctypes.c_void_p).value\n"
        "assert 'cpu' in fastret.available_backends()\n"
        "print(cpu.describe())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FASTRET_GEMM"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "own micro-kernel" in done.stdout, done.stderr


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e39, 1e300])
def test_any_temperature(temperature: float) -> None:
    x, labels = torch.randn(20, 6, requires_grad=True), torch.arange(20) // 4
    loss = smooth_ap(x, labels, temperature=temperature, impl="cpu")
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_memory_that_malloc_returns_dirty() -> None:
    """glibc fills every allocation with 0xfe (-1.7e38 as floats): the result must not notice."""
    code = (
        "import torch\nfrom fastret.functional import smooth_ap\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x = torch.randn(300, 33, generator=g, requires_grad=True)\n"
        "l = smooth_ap(x, torch.randint(0, 50, (300,), generator=g), temperature=0.05)\n"
        "l.backward()\nprint(l.item().hex(), x.grad.double().abs().sum().item().hex())"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"MALLOC_PERTURB_": "1"})
    }
    assert len(results) == 1


def _forward_arguments() -> tuple[list[object], list[torch.Tensor]]:
    x, labels = torch.randn(6, 4), torch.arange(6) // 2
    s = label_segments(labels)
    outputs = [torch.empty(12), torch.empty(12)]
    tensors = [x, s.order, s.start, s.count, *outputs]
    segments = [array(t) for t in (s.order, s.start, s.count)]
    return [array(x), None, *segments, False, True, 0.1, 1, *(array(t) for t in outputs)], tensors


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("argument", "position", "value", "message"),
    [
        (0, 0, 0, "x: null pointer"),
        (0, 1, 7, "x: reaches beyond its storage"),
        (0, 2, 5, "x: rows overlap"),
        (0, 3, 3, "x: rows overlap"),
        (0, 3, 400, "x: reaches beyond its storage"),
        (0, 4, 9, "dtype: unknown code 9"),
        (0, 4, 4, "x: not a floating point type"),
        (0, 4, 1, "x: reaches beyond its storage"),
        (2, 4, 0, "order: unexpected dtype code 0"),
        (2, 2, 5, "order: expected shape"),
        (3, 5, 8, "start: reaches beyond its storage"),
        (4, 2, 7, "count: expected shape"),
        (9, 2, 11, "rank_all: expected shape"),
        (10, 4, 1, "rank_pos: unexpected dtype code 1"),
        (10, 5, 4, "rank_pos: reaches beyond its storage"),
    ],
)
def test_nothing_is_read_through_a_wrong_description(argument: int, position: int, value: int, message: str) -> None:
    arguments, _kept = _forward_arguments()
    _C.rank_sums_forward(*arguments)
    arguments[argument] = _changed(arguments[argument], position, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        _C.rank_sums_forward(*arguments)


@pytest.mark.parametrize(
    ("order", "start", "count", "message"),
    [
        ([0, 1, 2, 3, 4, 6], [0, 0, 2, 2, 4, 4], [2] * 6, "order: not a permutation"),
        ([0, 1, 2, 3, 4, 4], [0, 0, 2, 2, 4, 4], [2] * 6, "order: not a permutation"),
        ([0, 1, 2, 3, 4, 5], [0, 0, 2, 2, 4, 5], [2] * 6, "start, count: reach beyond the gallery"),
        ([0, 1, 2, 3, 4, 5], [0, 0, 2, 2, 4, -1], [2] * 6, "start, count: reach beyond the gallery"),
        ([0, 1, 2, 3, 4, 5], [2, 0, 2, 2, 4, 4], [2] * 6, "start, count: a row lies outside its own class"),
        ([0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 4, 4], [2] * 6, "start, count: classes overlap"),
    ],
)
def test_inconsistent_classes_are_refused(order: list[int], start: list[int], count: list[int], message: str) -> None:
    arguments, _kept = _forward_arguments()
    tensors = [torch.tensor(v) for v in (order, start, count)]
    arguments[2:5] = [array(t) for t in tensors]
    with pytest.raises(ValueError, match=message):
        _C.rank_sums_forward(*arguments)


@pytest.mark.parametrize("source", ["rank_sums", "masked_lse", "masked_lse_sweep"])
def test_instruction_sets_share_no_symbol(source: str, tmp_path: Path) -> None:
    """A weak symbol of the AVX-512 objects that the linker prefers would end the process on an older processor."""
    compiler = shutil.which("g++")
    nm = shutil.which("nm")
    assert compiler, "the tests need the compiler the package is built with"
    assert nm
    output = tmp_path / "kernel.o"
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wno-psabi", "-DFASTRET_ISA=base"]
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(
        [compiler, *flags, include, "-c", str(CSRC / "cpu" / f"{source}.cpp"), "-o", str(output)], check=True
    )
    symbols = subprocess.run([nm, "-C", str(output)], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [s for s in symbols if s.split()[-2:-1] and s[17:18] in "WVu" and "DW.ref.__gxx_personality" not in s]
    assert weak == []


_WORKER = """
import sys, torch, multiprocessing
import fastret
def loss(seed):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    value = fastret.SmoothAP()(x, torch.arange(64) // 4)
    value.backward()
    return value.item(), x.grad.abs().sum().item()
class Losses(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return torch.tensor(loss(i))
if __name__ == "__main__":
    kind = sys.argv[1]
    torch.set_num_threads(1 if kind == "fork" else 2)  # a forked child cannot use its parent's threads
    expected = [loss(i) for i in range(4)]
    if kind == "loader":
        batches = torch.utils.data.DataLoader(Losses(), batch_size=1, num_workers=2, multiprocessing_context="spawn")
        actual = [tuple(b[0].tolist()) for b in batches]
    else:
        with multiprocessing.get_context(kind).Pool(2) as pool:
            actual = pool.map(loss, range(4))
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected))
    print("equal")
"""


@pytest.mark.parametrize("kind", ["fork", "spawn", "loader"])
def test_other_processes(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    done = subprocess.run([sys.executable, str(script), kind], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "equal", done.stderr


def test_python_threads() -> None:
    """The GIL is released: calls run side by side, and each is right."""
    from concurrent.futures import ThreadPoolExecutor

    x, labels = torch.randn(200, 16), torch.arange(200) // 4
    expected = smooth_ap(x, labels)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(v, expected) for v in pool.map(lambda _: smooth_ap(x, labels), range(16)))
