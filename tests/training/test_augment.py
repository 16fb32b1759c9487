"""Random views: what moves, what stays, and that the generator alone decides."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.training.augment import random_affine, random_stroke

STILL = {"shift": 0.0, "degrees": 0.0, "scale": 0.0, "shear": 0.0}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _square(count: int, half: int = 4) -> Tensor:
    images = torch.zeros(count, 1, 32, 32)
    images[:, :, 16 - half : 16 + half, 16 - half : 16 + half] = 255
    return images


def _mean_position(images: Tensor) -> Tensor:
    """(n, 2) mean row and column of the brightness, in pixels from the middle."""
    weight = images[:, 0] / images.sum((1, 2, 3))[:, None, None]
    place = torch.arange(32) - 15.5
    return torch.stack([(weight.sum(2) * place).sum(1), (weight.sum(1) * place).sum(1)], 1)


def test_no_motion_is_the_image() -> None:
    images = torch.randint(0, 256, (3, 2, 16, 24), dtype=torch.uint8)
    moved = random_affine(images, **STILL, generator=_generator())
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, images.float(), rtol=0, atol=1e-2)


def test_shift_is_a_share_of_the_side() -> None:
    moved = random_affine(_square(500), **{**STILL, "shift": 0.125}, generator=_generator())
    found = _mean_position(moved)
    assert found.abs().max() <= 4.01
    assert (found.min(0).values < -3.5).all()
    assert (found.max(0).values > 3.5).all()


@pytest.mark.parametrize("change", [{"degrees": 45.0}, {"scale": 0.3}, {"shear": 0.3}])
def test_the_middle_stays_where_nothing_shifts(change: dict[str, float]) -> None:
    images = _square(20)
    moved = random_affine(images, **{**STILL, **change}, generator=_generator())
    assert _mean_position(moved).abs().max() < 0.05
    assert (moved - images).abs().flatten(1).max(1).values.min() > 1


def test_rotation_and_shear_keep_the_area_and_scale_bounds_it() -> None:
    images = _square(50)
    area = images.sum((1, 2, 3))
    turned = random_affine(images, **{**STILL, "degrees": 30.0, "shear": 0.2}, generator=_generator())
    torch.testing.assert_close(turned.sum((1, 2, 3)), area, rtol=0.03, atol=0)
    scaled = random_affine(images, **{**STILL, "scale": 0.2}, generator=_generator()).sum((1, 2, 3)) / area
    assert 0.62 < scaled.min() < 0.9
    assert 1.1 < scaled.max() < 1.55


def test_strokes_become_bolder_or_thinner() -> None:
    images = _square(200)
    drawn = random_stroke(images, generator=_generator())
    assert drawn.min() >= 0
    assert drawn.max() <= 255
    area = drawn.sum((1, 2, 3)) / images.sum((1, 2, 3))
    # a square of 8 x 8 grows to 10 x 10 at most, and comes 0.6 of the way to 6 x 6
    assert area.max() <= 100 / 64
    assert area.min() >= 1 - 0.6 * (1 - 36 / 64) - 1e-6
    assert 0.3 < (area > 1).float().mean() < 0.7


@pytest.mark.parametrize("stroke", [False, True])
def test_only_the_generator_decides(stroke: bool) -> None:
    images = _square(8)

    def draw(seed: int) -> Tensor:
        settings: dict[str, Any] = {"generator": _generator(seed)}
        torch.rand(3)
        if stroke:
            return random_stroke(images, **settings)
        return random_affine(images, shift=0.1, degrees=10, scale=0.1, shear=0.1, **settings)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(0)[0], draw(0)[1])
