"""CQC (fastret.functional.cqc), the official stacked form, forward and backward, N images, rows of D = 128.

The floor is six (2N, D) x (D, 2N) products: for each of the two stacks the scores, and a product for the gradient of
rows as anchors and as candidates. The dense form multiplies matrices; the official code broadcasts 2N x 2N x D, 8 GiB a
temporary at N = 2,048.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.conditions import up_to
from benchmarks.contrastive import (
    dense_variants,
    dense_views,
    exact_sum,
    exact_views,
    fastret_variants,
    products,
    unit,
)
from benchmarks.registry import Inputs, Op, Size
from fastret.functional import cqc

TEMPERATURE = 0.5
LIMIT = 4096  # images: a float32 matrix of scores has 256 MiB
NAMES = ("xa", "xb", "za", "zb")


def setup(size: Size, seed: int) -> Inputs:
    """Two noisy views of each image, and each view again with noise for its quantisation."""
    generator = torch.Generator().manual_seed(seed)
    image, *noise = torch.randn(5, size["n"], size["d"], generator=generator)
    xa, xb = image + noise[0], image + noise[1]
    return dict(zip(NAMES, (xa, xb, xa + noise[2], xb + noise[3]), strict=True))


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return cqc(*(inputs[name] for name in NAMES), temperature=TEMPERATURE, impl=impl)


def _stacks(inputs: Inputs) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """[Xa; Zb] and [Xb; Za], and the row of the other half that belongs to each row."""
    xa, xb, za, zb = (inputs[name] for name in NAMES)
    partner = torch.arange(2 * len(xa), device=xa.device).roll(len(xa))
    return (torch.cat([xa, zb]), torch.cat([xb, za])), partner


def dense(inputs: Inputs) -> Tensor:
    stacks, partner = _stacks(inputs)
    first, second = (dense_views(stack, partner, TEMPERATURE).mean() for stack in stacks)
    return first + second


def oracle(inputs: Inputs) -> Tensor:
    stacks, partner = _stacks(inputs)
    rows = [unit(stack, TEMPERATURE) for stack in stacks]
    first, second = (exact_sum(exact_views, len(stack), stack, partner) / len(stack) for stack in rows)
    return first + second


def floor(inputs: Inputs) -> Callable[[], None]:
    stack = _stacks(inputs)[0][0]
    return products(6, stack, stack)


OP = Op(
    name="cqc",
    module=__name__,
    axis="n",
    sizes=(512, 2048),
    fixed={"d": 128},
    setup=setup,
    gradients=NAMES,
    variants=(
        *fastret_variants(fastret, up_to(LIMIT, "many seconds a call")),
        *dense_variants(dense, up_to(LIMIT, "the matrices of scores")),
    ),
    oracle=oracle,
    probe=dict,
    loss_tolerance=1e-5,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="six (2N, D) x (D, 2N) torch.mm",
    warm_up=64,
)
