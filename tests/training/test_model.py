"""The network and the augmentation."""

import pytest
import torch

from fastret.training.augment import random_shift
from fastret.training.model import EmbeddingNet


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (45, 70)])
def test_embeds_images_of_any_size(channels: int, size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (6, channels, *size), dtype=torch.uint8)
    embeddings = EmbeddingNet(channels, dim=24)(images)
    assert embeddings.shape == (6, 24)
    # The last BatchNorm: every coordinate centred, and spread out wherever the images differ in it.
    torch.testing.assert_close(embeddings.mean(0), torch.zeros(24), atol=1e-4, rtol=0)


def test_filters_widen_every_block() -> None:
    convolutions = [layer for layer in EmbeddingNet(1, filters=24).features if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [24, 48, 96]


def test_evaluation_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = EmbeddingNet(1).eval()
    images = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model(images)[:2], model(images[:2]), atol=1e-5, rtol=1e-5)


def test_images_too_small_are_named() -> None:
    with pytest.raises(ValueError, match=r"images: expected at least 8 pixels a side, got \(32, 7\)"):
        EmbeddingNet(1)(torch.zeros(2, 1, 32, 7, dtype=torch.uint8))


def test_shift_moves_each_image_alone_and_repeats_its_border() -> None:
    images = torch.randint(0, 256, (200, 2, 5, 6), dtype=torch.uint8)
    shifted = random_shift(images, 2, generator=torch.Generator().manual_seed(3))
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.uint8
    assert shifted.is_contiguous(memory_format=torch.channels_last)
    used = set()
    for image, result in zip(images, shifted, strict=True):
        padded = torch.nn.functional.pad(image.float()[None], (2, 2, 2, 2), mode="replicate")[0].byte()
        moves = [(dy, dx) for dy in range(5) for dx in range(5) if padded[:, dy : dy + 5, dx : dx + 6].equal(result)]
        assert len(moves) == 1
        used.update(moves)
    assert len(used) == 25


def test_shift_depends_on_the_generator_alone() -> None:
    images = torch.randint(0, 256, (20, 1, 9, 9), dtype=torch.uint8)
    first, second, other = (random_shift(images, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)
    assert random_shift(images, 0, generator=torch.Generator()).equal(images)
