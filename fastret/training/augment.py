"""Random views of images, drawn for each image alone: shifts, affine maps, bolder and thinner strokes.

Every function takes images (n, c, h, w) on the CPU and a CPU generator, the only source of randomness.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, max_pool2d

THINNEST = 0.6  # of the way: at the end of it a stroke of two pixels is gone


def random_shift(images: Tensor, pixels: int, *, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``pixels`` in both directions; its border is repeated where nothing moves in.

    Args:
        images: (n, c, h, w) of any dtype, on the CPU.
        pixels: largest shift, drawn uniformly from -pixels ... pixels.
        generator: a CPU generator, the only source of randomness.

    Returns:
        (n, c, h, w) of the same dtype, channels last in memory.
    """
    n, _, height, width = images.shape
    shift = torch.randint(-pixels, pixels + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + shift[1]).clamp(0, width - 1)
    image = torch.arange(n)[:, None, None]
    # The slice between index tensors puts the channels last; seen as (n, c, h, w) that is the layout the network wants.
    return images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_affine(
    images: Tensor, *, shift: float, degrees: float, scale: float, shear: float, generator: torch.Generator
) -> Tensor:
    """Each image shifted, rotated, scaled and sheared, bilinearly, with zeros where nothing moves in.

    Args:
        images: (n, c, h, w) of any dtype.
        shift: largest shift in both directions, as a share of the image's side.
        degrees: largest rotation to either side.
        scale: largest logarithm of the factor by which a side grows or shrinks, the two sides independently.
        shear: largest horizontal shift of a row, as a share of its distance from the middle.
        generator: draws all of them uniformly.

    Returns:
        (n, c, h, w) float32, in the units of ``images``.
    """

    def draw(largest: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * largest

    angle = draw(math.radians(degrees))
    wide, high = draw(scale).exp(), draw(scale).exp()
    lean, right, down = draw(shear), draw(2 * shift), draw(2 * shift)  # a side is 2 long in the grid's units
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([wide * cos, wide * (lean * cos - sin), right], 1),
        torch.stack([high * sin, high * (lean * sin + cos), down], 1),
    )
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, align_corners=False)


def random_stroke(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Each image on its way, by a random share, to strokes that are a pixel bolder on every side, or as much thinner.

    Args:
        images: (n, c, h, w) float32, strokes brighter than the ground.
        generator: draws for each image which of the two, and the share.
    """
    share = 2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1
    bolder, thinner = max_pool2d(images, 3, 1, 1), -max_pool2d(-images, 3, 1, 1)
    return torch.where(share > 0, images.lerp(bolder, share), images.lerp(thinner, -THINNEST * share))
