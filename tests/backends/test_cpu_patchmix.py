"""patchmix in C++: any number of threads, and what it refuses to touch."""

import pytest
import torch

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu.array import array
from fastret.ops import patchmix

assert cpu.missing() is None


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_threads_and_types_change_nothing(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    x = (9 * torch.rand(7, 3, 12, 20) - 3).to(dtype)
    permutation = torch.randperm(15)
    torch.set_num_threads(threads)
    try:
        mixed = patchmix(x, 4, 4, permutation=permutation, impl="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mixed, patchmix(x, 4, 4, permutation=permutation, impl="reference"))


X, G = torch.zeros(2, 24, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, G, (1, 2, 2, 3, 3), 1, X), r"x: expected shape \(2, 36\)"),
        ((X, G, (1, 2, 2, 3, 2), 1, X[:1]), r"out: expected shape \(2, 24\)"),
        ((X, G[:5], (1, 2, 2, 3, 2), 1, X), r"groups: expected shape \(1, 6\)"),
        ((X, G.to(torch.uint8), (1, 2, 2, 3, 2), 1, X), "groups: unexpected dtype"),
        ((X, G, (-1, -2, 2, 3, 2), 1, X), "x: negative size"),
        ((X, G, (1, 2, 2, 3, 2), 0, X), "threads: must be at least 1"),
    ],
)
def test_sizes_are_checked_before_memory_is_touched(arguments: tuple[object, ...], message: str) -> None:
    x, groups, sizes, threads, out = arguments
    with pytest.raises(ValueError, match=message):
        _C.patchmix(array(x), array(groups), sizes, threads, array(out))
