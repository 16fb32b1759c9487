"""Random views of images, drawn for each image alone: shifts, affine maps, crops, light, stroke widths.

`Views` says which of them suit a kind of images.

Every function takes images (n, c, h, w) on the CPU and a CPU generator, the only source of randomness.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, max_pool2d

THINNEST = 0.6  # of the way: at the end of it a stroke of two pixels is gone
LONGEST = 4 / 3  # sides of a crop differ by this factor at most
WHITE = 255.0


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
    images: Tensor,
    *,
    shift: float,
    degrees: float,
    scale: float,
    shear: float,
    crop: float = 1.0,
    flip: float = 0.0,
    generator: torch.Generator,
) -> Tensor:
    """Each image shifted, rotated, scaled, sheared, cropped and mirrored, bilinearly in one go; zeros move in.

    Args:
        images: (n, c, h, w) of any dtype.
        shift: largest shift in both directions, as a share of the image's side.
        degrees: largest rotation to either side.
        scale: largest logarithm of the factor by which a side grows or shrinks, the two sides independently.
        shear: largest horizontal shift of a row, as a share of its distance from the middle.
        crop: least share of the area that a crop keeps; it is then enlarged to the image's size.
        flip: how often left and right are exchanged.
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
    matrix = torch.stack(rows, 1)
    if crop < 1:
        area = crop + (1 - crop) * torch.rand(len(images), generator=generator)
        longer = draw(math.log(LONGEST)).exp()
        sides = torch.stack([area * longer, area / longer], 1).sqrt().clamp(max=1)
        place = (2 * torch.rand(len(images), 2, generator=generator) - 1) * (1 - sides)
        matrix = matrix * sides[:, :, None]
        matrix[:, :, 2] += place
    if flip > 0:
        mirrored = torch.rand(len(images), generator=generator) < flip
        matrix[:, :, 0] = torch.where(mirrored[:, None], -matrix[:, :, 0], matrix[:, :, 0])
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
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


def random_light(images: Tensor, amount: float, *, generator: torch.Generator) -> Tensor:
    """Each image with another contrast and brightness; what is black, the ground, stays black.

    Args:
        images: (n, c, h, w) float32 from 0 to 255.
        amount: largest logarithm of the factor of the contrast, and largest change of the brightness in quarters of
            the range.
        generator: draws both uniformly.
    """

    def draw() -> Tensor:
        return (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1) * amount

    mean = images.mean((1, 2, 3), keepdim=True)
    factor = draw().exp()
    change = mean * (1 - factor) + draw() * (WHITE / 4)
    return torch.where(images > 0, (images * factor + change).clamp(0, WHITE), 0)


def random_gamma(images: Tensor, amount: float, *, generator: torch.Generator) -> Tensor:
    """Each image with its brightness, as a share of white, to a power: from almost a silhouette to highlights alone.

    Args:
        images: (n, c, h, w) float32 from 0 to 255.
        amount: largest logarithm of the power, drawn uniformly from -amount ... amount.
        generator: draws the powers.
    """
    power = ((2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1) * amount).exp()
    return (images / WHITE).clamp(0, 1).pow(power) * WHITE


@dataclass(frozen=True)
class Views:
    """Which random changes leave an image of some kind what it is; attributes as the functions of this file name them.

    Called with images (n, c, h, w) uint8 and a generator it gives a view of each, float32 from 0 to 255.
    """

    shift: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    crop: float = 1.0
    flip: float = 0.0
    gamma: float = 0.0
    light: float = 0.0
    stroke: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        views = random_affine(
            images,
            shift=self.shift,
            degrees=self.degrees,
            scale=self.scale,
            shear=self.shear,
            crop=self.crop,
            flip=self.flip,
            generator=generator,
        )
        if self.stroke:
            views = random_stroke(views, generator=generator)
        if self.gamma:
            views = random_gamma(views, self.gamma, generator=generator)
        if self.light:
            views = random_light(views, self.light, generator=generator)
        return views


# A mirrored character is another one, or none.
GLYPHS = Views(shift=3 / 32, degrees=15, scale=0.25, shear=0.25, stroke=True)
PHOTOS = Views(degrees=10, crop=0.8, flip=0.5, gamma=1.0, light=0.8)
