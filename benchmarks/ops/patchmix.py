"""PatchMix (fastret.functional.patchmix) of 3 x 224 x 224 images, patches of 16, two images mixed, as on ImageNet.

The official code moves the batch five times: into patches, shuffled, between images, back, and into images.
"""

import torch
from torch import Tensor

from benchmarks.conditions import needs
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.functional import patchmix

PATCH, M = 16, 2
PROBED = 8  # images


def setup(size: Size, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    side = size["side"]
    return {
        "x": torch.randn(size["b"], 3, side, side, generator=generator),
        "permutation": torch.randperm((side // PATCH) ** 2, generator=generator),
    }


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return patchmix(inputs["x"], PATCH, M, permutation=inputs["permutation"], impl=impl)


def five_copies(inputs: Inputs) -> Tensor:
    """Into patches, shuffled, groups moved between images, unshuffled, into images."""
    x, permutation = inputs["x"], inputs["permutation"]
    b, c, h, w = x.shape
    down, across = h // PATCH, w // PATCH
    patches = x.reshape(b, c, down, PATCH, across, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, down * across, -1)
    shuffled = patches[:, permutation]
    size = down * across // M
    groups = shuffled[:, : size * M].reshape(b * M, size, -1)
    number = torch.arange(b * M, device=x.device)
    moved = groups[(number + number % M * M) % (b * M)].reshape(b, M * size, -1)
    mixed = torch.cat([moved, shuffled[:, size * M :]], 1)[:, permutation.argsort()]
    return mixed.reshape(b, down, across, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def oracle(inputs: Inputs) -> Tensor:
    """A patch of all images at a time."""
    x, permutation = inputs["x"], inputs["permutation"]
    across, size = x.shape[3] // PATCH, len(permutation) // M
    mixed = torch.empty_like(x)
    for place, patch in enumerate(permutation.tolist()):
        group = place // size if place < size * M else 0
        y, z = divmod(patch, across)
        part = (slice(None), slice(None), slice(y * PATCH, (y + 1) * PATCH), slice(z * PATCH, (z + 1) * PATCH))
        mixed[part] = x[part].roll(-group, 0)
    return mixed


def probe(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"][:PROBED]}


OP = Op(
    name="patchmix",
    module=__name__,
    axis="b",
    sizes=(256, 1024),
    fixed={"side": 224},
    setup=setup,
    gradients=(),
    variants=(
        Variant("fastret-cpu", lambda inputs: fastret(inputs, "cpu"), missing=needs("patchmix", "cpu")),
        *gpu_variants("patchmix", fastret),
        Variant("fastret-tiled", lambda inputs, impl="tiled": fastret(inputs, impl)),
        Variant("five copies", five_copies, note="the official code's steps"),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=0,
    gradient_tolerance=0,
    floor=lambda inputs: lambda: inputs["x"].clone() is None,
    floor_name="a copy of the images",
    warm_up=8,
)
