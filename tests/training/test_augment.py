"""Random views: what moves, what stays, and that the generator alone decides."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.training.augment import (
    GLYPHS,
    PHOTOS,
    Views,
    random_affine,
    random_gamma,
    random_light,
    random_stroke,
)

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


def test_a_crop_enlarges_a_part() -> None:
    """Of a ramp of columns: a view's contrast is the share of the width that it keeps, its mean the place."""
    ramp = torch.arange(32.0).expand(400, 1, 32, 32)
    cropped = random_affine(ramp, **STILL, crop=0.25, generator=_generator())
    width = (cropped[:, 0, 16, 24] - cropped[:, 0, 16, 8]) / 16
    assert 0.43 < width.min() < 0.5  # sqrt(1/4 * 3/4)
    assert width.max() <= 1 + 1e-5
    middle = cropped[:, 0, 16, 15:17].mean(1)
    assert ((middle - 15.5).abs() <= 16 * (1 - width) + 1e-3).all()  # never over the border
    assert middle.std() > 2
    left = random_affine(ramp, **STILL, crop=1.0, generator=_generator())
    torch.testing.assert_close(left, ramp, rtol=0, atol=1e-4)


def test_flips_as_often_as_asked() -> None:
    images = torch.rand(1000, 1, 8, 8)
    flipped = random_affine(images, **STILL, flip=0.3, generator=_generator())
    same = (flipped - images).abs().flatten(1).amax(1) < 1e-4
    mirrored = (flipped - images.flip(3)).abs().flatten(1).amax(1) < 1e-4
    assert (same ^ mirrored).all()
    assert 250 < mirrored.sum() < 350


def test_a_flip_that_never_happens_changes_nothing() -> None:
    images = _square(4)
    settings = {"shift": 0.1, "degrees": 10.0, "scale": 0.1, "shear": 0.1}
    plain = random_affine(images, **settings, generator=_generator())
    torch.testing.assert_close(random_affine(images, **settings, flip=1e-9, generator=_generator()), plain)


def test_light_keeps_the_ground_black_and_the_range() -> None:
    images = torch.randint(1, 256, (300, 1, 16, 16), generator=_generator()).float()
    images[:, :, :4] = 0
    lit = random_light(images, 0.4, generator=_generator(1))
    assert (lit[:, :, :4] == 0).all()
    assert lit.min() >= 0
    assert lit.max() <= 255
    # Of gray in the middle, where nothing is cut off: its contrast is changed by e^0.4 at most, its mean by 0.4 * 64.
    gray = images * 0.1 + 115
    lit = random_light(gray, 0.4, generator=_generator(1))
    contrast = lit.flatten(1).std(1) / gray.flatten(1).std(1)
    assert 0.66 < contrast.min() < 0.72
    assert 1.4 < contrast.max() < 1.50
    change = lit.mean((1, 2, 3)) - gray.mean((1, 2, 3))
    assert 22 < change.abs().max() <= 0.4 * 64 + 0.1


def test_gamma_is_a_power_of_the_brightness() -> None:
    images = torch.linspace(0, 255, 64).reshape(1, 1, 8, 8).expand(500, 1, 8, 8)
    changed = random_gamma(images, 1.0, generator=_generator())
    assert torch.equal(changed[:, 0, 0, 0], torch.zeros(500))
    torch.testing.assert_close(changed[:, 0, 7, 7], torch.full((500,), 255.0))
    share, found = images[:, 0, 4, 0] / 255, changed[:, 0, 4, 0] / 255
    power = found.log() / share.log()
    torch.testing.assert_close(changed / 255, (images / 255).pow(power[:, None, None, None]), atol=1e-4, rtol=0)
    assert 0.36 < power.min() < 0.4
    assert 2.6 < power.max() < 2.72
    assert power.log().mean().abs() < 0.1


def test_views_are_float_of_the_same_range_and_differ() -> None:
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8, generator=_generator())
    assert torch.equal(images.float(), Views()(images, _generator()).round())
    for views in (GLYPHS, PHOTOS, Views(light=0.5)):
        first, again, other = views(images, _generator()), views(images, _generator()), views(images, _generator(1))
        assert first.dtype == torch.float32
        assert first.shape == images.shape
        assert first.min() >= 0
        assert first.max() <= 255
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert GLYPHS.flip == 0  # a mirrored character is another one
