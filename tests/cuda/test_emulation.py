"""The emulation of CUDA itself: it finds planted mistakes, and says where; without them the same kernels are right."""

import ctypes
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ORDERS = (0, 1, 7)
BLOCKS, N = 3, 200

MISTAKES = {
    "missing_barrier": r"thread \(0, 0, 0\): reads element [12] of partial, which thread (32|64) of block \d wrote, "
    r"without a barrier|reads element [12] of shared partial, which nobody has written",
    "missing_barrier_before_reuse": r"thread .*: (reads|writes) element 0 of slot, which thread \d+ of block \d "
    r"(read|wrote), without a barrier between them",
    "missing_warp_barrier": r"reads element \d+ of mine, which thread \d+ of block \d wrote, without a barrier|"
    r"reads element \d+ of shared mine, which nobody has written",
    "out_of_bounds": r"block \(2, 0, 0\), thread \(5, 0, 0\): reads element 600 of x, which has 600",
    "out_of_bounds_write": r"block \(0, 0, 0\), thread \(0, 0, 0\): writes element -1 of out, which has 3",
    "out_of_shared": r"thread \(95, 0, 0\): writes element 96 of shared row, which has 96",
    "divergent_barrier": r"divergence: waits at __syncthreads in line \d+ for thread \(64, 0, 0\), which has ended",
    "two_barriers": r"divergence: waits at __syncthreads in line (\d+) for thread \(64, 0, 0\), which waits at "
    r"__syncthreads in line (?!\1)\d+",
    "divergent_shuffle": r"thread \(0, 0, 0\): divergence: waits at __shfl_xor_sync in line \d+ for thread "
    r"\(8, 0, 0\), which waits at __syncthreads in line \d+",
    "narrow_mask": r"__shfl_xor_sync: the mask leaves out the calling lane",
    "uninitialised": r"thread \(0, 0, 0\): reads element 7 of shared row, which nobody has written",
    "misaligned": r"reads element 1 of x, which is not at a multiple of 16 bytes",
    "one_place_for_all_blocks": r"writes element 0 of out, which thread 0 of block \d wrote, without a barrier",
    "failed_check": r"thread \(40, 0, 0\): device_check in line \d+",
    "too_much_shared": r"shared row: the block has 49156 bytes, of at most 49152",
    "too_many_threads": r"a block of 96 threads, of at most 95 by __launch_bounds__",
    "beyond_what_was_asked": r"thread \(95, 0, 0\): writes element 96 of shared row, which has 96",
    "part_of_what_was_asked": r"last: bytes 380 to 388 of row, which has 384",
}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run(planted: ctypes.CDLL, name: str, broken: bool, order: int) -> tuple[str | None, np.ndarray, np.ndarray]:
    """What the emulation complains of, x and out."""
    # PyTorch's memory starts at a multiple of 64 bytes, NumPy's of 16 only
    x = torch.randint(-9, 10, (BLOCKS, N)).float().numpy()
    out = torch.full((BLOCKS,), float("nan")).numpy()
    planted.run_planted.restype = ctypes.c_char_p
    sizes = ctypes.c_int64(BLOCKS), ctypes.c_int64(N)
    said = planted.run_planted(name.encode(), broken, ctypes.c_uint64(order), pointer(x), pointer(out), *sizes)
    return None if said is None else said.decode(), x, out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_in_any_order_of_threads(planted: ctypes.CDLL, name: str, order: int) -> None:
    said, *_ = run(planted, name, True, order)
    assert said is not None
    assert said.startswith(f"kernel {name}, block (")
    if order == 0 or name not in ("out_of_bounds", "out_of_bounds_write"):  # which block comes first is the order's
        assert re.search(MISTAKES[name], said), said


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MISTAKES)
def test_without_the_mistake_nothing_is_found(planted: ctypes.CDLL, name: str, order: int) -> None:
    said, x, out = run(planted, name, False, order)
    assert said is None
    if name.startswith("missing_barrier"):
        assert out.tolist() == x.sum(1).tolist()
    else:
        expected = {"missing_warp_barrier": x[:, 1], "out_of_bounds": x[:, -1], "misaligned": x[[0, 0, 0], 3] + N}
        doubled = name in ("divergent_shuffle", "narrow_mask")
        assert out.tolist() == expected.get(name, x[:, 0] * (2 if doubled else 1)).tolist()


def test_more_dynamic_shared_memory_than_there_is(planted: ctypes.CDLL) -> None:
    x, out = torch.ones(1).numpy(), torch.zeros(1).numpy()
    planted.run_asking.restype = ctypes.c_char_p
    assert planted.run_asking(ctypes.c_int64(227 << 10), pointer(x), pointer(out)) is None
    said = planted.run_asking(ctypes.c_int64((227 << 10) + 1), pointer(x), pointer(out))
    assert said == b"kernel too_many_threads: 232449 bytes of dynamic shared memory, of at most 232448"


BOUNDED = """
template <int N> __global__ void
    __launch_bounds__(size<N, 2>(3), 1) kernel(View<int, 4> x, int y = f(1)) {
  body();
}
__global__ void __launch_bounds__(64) declared(int x);
__global__ void __launch_bounds__(64) defined(int x) { body(); }
"""


def test_bounds_are_checked_within_their_kernels(built: tuple[ModuleType, Path]) -> None:
    found = built[0].with_bounds(BOUNDED).splitlines()
    check = "::fastret::emulation::machine().check_bounds({});"
    assert found[2].endswith("int y = f(1)) { " + check.format("size<N, 2>(3)"))
    assert found[5] == "__global__ void __launch_bounds__(64) declared(int x);"
    assert found[6].endswith("defined(int x) { " + check.format("64") + " body(); }")
    assert len(found) == len(BOUNDED.splitlines())


def tickets(planted: ctypes.CDLL, order: int) -> list[list[int]]:
    """For each block and turn, its threads in the order in which they ran."""
    counter, out = np.zeros(1, np.int32), np.full((4, 96), -1, np.int32)
    planted.run_tickets.restype = ctypes.c_char_p
    said = planted.run_tickets(ctypes.c_uint64(order), pointer(counter), pointer(out), ctypes.c_int64(2))
    assert said is None
    assert sorted(out.flatten().tolist()) == list(range(4 * 96))
    return [np.argsort(turn).tolist() for turn in out]


def test_orders_of_threads(planted: ctypes.CDLL) -> None:
    up = list(range(96))
    assert tickets(planted, 0) == [up] * 4
    assert tickets(planted, 1) == [up[::-1]] * 4
    shuffled = tickets(planted, 2)
    assert shuffled == tickets(planted, 2)
    assert shuffled != tickets(planted, 3)
    assert len({tuple(turn) for turn in shuffled}) == 4


@pytest.mark.parametrize("order", ORDERS)
def test_collectives_and_atomics(planted: ctypes.CDLL, order: int) -> None:
    given = torch.randperm(32).tolist()
    values, count, out = np.array(given, np.int32), np.array([-9, 99, 0], np.int32), np.zeros((32, 16), np.int32)
    planted.run_collectives.restype = ctypes.c_char_p
    assert planted.run_collectives(ctypes.c_uint64(order), pointer(values), pointer(count), pointer(out)) is None

    def bits(lanes: list[bool]) -> int:
        return int(np.uint32(sum(1 << lane for lane, vote in enumerate(lanes) if vote)).astype(np.int32))

    odd = [v % 2 == 1 for v in given]
    for lane, v in enumerate(given):
        half = [vote and (other < 16) == (lane < 16) for other, vote in enumerate(odd)]
        expected = [given[3], given[lane // 8 * 8 + 1], given[lane ^ 5], given[lane - 2] if lane >= 2 else v]
        expected += [given[lane + 2] if lane % 16 < 14 else v, bits([w % 3 == 0 for w in given]), 2, 2]
        expected += [bits([w % 4 == v % 4 for w in given]), 7, 2, bits(half), sum(given)]
        expected += [v.bit_count(), (v & -v).bit_length(), 32 - v.bit_length()]
        assert out[lane].tolist() == expected
    assert count.tolist() == [31, 0, 5]


def test_nan_loses_against_a_number(planted: ctypes.CDLL) -> None:
    """As CUDA's max and min have it, and not those of C++."""
    nan, out = float("nan"), np.zeros(4, np.float32)
    planted.run_extremes.restype = ctypes.c_char_p
    for given, expected in (([2, 3], [3, 3, 2, 2]), ([nan, 3], [3] * 4), ([nan, nan], [nan] * 4)):
        assert planted.run_extremes(pointer(np.array(given, np.float32)), pointer(out)) is None
        np.testing.assert_array_equal(out, expected)
