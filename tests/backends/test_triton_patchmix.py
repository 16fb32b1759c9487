"""patchmix by Triton, bit for bit: compiled where there is a GPU, else interpreted, in blocks of 64 words, up to 16
of a piece."""

import pytest
import torch
from torch import Tensor

from fastret.ops import patchmix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]


def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits, NaN of all kinds among them."""
    if dtype == torch.bool:
        return torch.rand(shape, device=DEVICE) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, device=DEVICE).view(dtype)


def check(x: Tensor, patch: int, m: int, permutation: Tensor) -> None:
    """PyTorch's gather keeps the bits of integers, not those of every NaN."""
    integers = x.view(INTEGERS[x.element_size()]) if x.element_size() <= 8 else x
    actual = patchmix(x, patch, m, permutation=permutation, impl="triton")
    expected = patchmix(integers, patch, m, permutation=permutation, impl="reference")
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "patch", "m"),
    [
        ((5, 3, 12, 20), 4, 4),  # 15 patches, 3 are left over
        ((2, 2, 21, 14), 7, 3),  # patches of an odd size; images come round
        ((4, 11, 37), 1, 3),  # pieces of several tiles
        ((3, 70, 1), 1, 2),  # of one element
        ((1, 6, 5), 1, 6),
    ],
)
def test_equals_reference(shape: tuple[int, ...], patch: int, m: int, dtype: torch.dtype) -> None:
    x = bits(shape, dtype)
    patches = shape[1] if len(shape) == 3 else shape[2] * shape[3] // patch**2
    check(x, patch, m, torch.randperm(patches, device=DEVICE))


def test_images_that_do_not_start_at_a_word_and_channels_last() -> None:
    permutation = torch.randperm(4, device=DEVICE)
    for x in (
        bits((4 * 3 * 8 * 8 + 1,), torch.uint8)[1:].view(4, 3, 8, 8),
        bits((4, 3, 8, 8), torch.float32).to(memory_format=torch.channels_last),
        bits((4, 3, 8, 9), torch.float32)[..., 1:],
    ):
        check(x, 4, 3, permutation)


def test_gradient_is_the_inverse() -> None:
    x = torch.randn(5, 2, 8, 12, device=DEVICE).requires_grad_()
    permutation = torch.randperm(6, device=DEVICE)
    mixed = patchmix(x, 4, 3, permutation=permutation, impl="triton")
    (back,) = torch.autograd.grad(mixed, x, mixed.detach())
    assert torch.equal(back, x)
