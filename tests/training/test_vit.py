"""The vision transformer: its attention, its positions, what it refuses."""

import math

import pytest
import torch

from fastret.training.vit import Attention, Block, ViT, sines


def test_attention_is_a_softmax_of_every_token_over_all() -> None:
    torch.manual_seed(0)
    layer, x = Attention(8, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    query, key, value = layer.qkv(x).chunk(3, -1)
    mixed = torch.empty_like(x)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(3):
            scores = query[i, :, head] @ key[i, :, head].T / 4**0.5
            mixed[i, :, head] = scores.softmax(1) @ value[i, :, head]
    torch.testing.assert_close(layer(x), layer.out(mixed))


def test_a_block_adds_to_its_input() -> None:
    torch.manual_seed(0)
    block, x = Block(8, 2), torch.randn(3, 5, 8)
    y = x + block.attention(x)
    torch.testing.assert_close(block(x), y + block.mlp(y))


def test_positions_tell_all_patches_apart() -> None:
    positions = sines(6, 7, 16)
    assert positions.shape == (42, 16)
    assert torch.cdist(positions, positions).add(torch.eye(42) * 9).min() > 0.1
    # patch 9 of rows of 7: column 2, row 1
    expected = [math.sin(2), math.cos(2), math.sin(1), math.cos(1)]
    assert positions[9, [0, 4, 8, 12]].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_images(channels: int) -> None:
    torch.manual_seed(0)
    model = ViT(channels, 8, 12, 4, dim=16, depth=2, heads=2)
    images = torch.randint(0, 256, (5, channels, 8, 12), dtype=torch.uint8)
    features = model(images)
    assert features.shape == (5, 16)
    assert model.patches == 6
    torch.testing.assert_close(model(images[:2].float()), features[:2], atol=1e-5, rtol=1e-5)
    turned = images.view(5, channels, 8, 3, 4).flip(3).reshape(images.shape)  # the same patches elsewhere
    assert (model(turned) - features).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 28, 28, 5), {}, "patch_size: expected a divisor of both sides of the images, 28 x 28, got 5"),
        ((1, 28, 30, 4), {}, "patch_size: expected a divisor of both sides of the images, 28 x 30, got 4"),
        ((1, 8, 8, 4), {"dim": 16, "heads": 3}, "heads: expected a divisor of dim, 16, got 3"),
        ((1, 8, 8, 4), {"dim": 18, "heads": 2}, "dim: expected a multiple of 4, got 18"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    shape: tuple[int, int, int, int], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(*shape, **options)
