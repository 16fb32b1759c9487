"""Random shifts, drawn for each image alone: the one augmentation that unseen fonts and framings ask for."""

import torch
from torch import Tensor


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
