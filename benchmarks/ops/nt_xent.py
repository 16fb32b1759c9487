"""NT-Xent (fastret.functional.nt_xent), SimCLR's loss: N rows of D = 128, two views (M = 2) of each image.

The floor is four (N, D) x (D, N) products: the scores in forward and again in backward, and a product for the gradient
of rows as anchors and as candidates. pytorch-metric-learning sets every positive pair against every negative pair.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.conditions import pml_missing, up_to
from benchmarks.contrastive import (
    DENSE_LIMIT,
    classes,
    dense_variants,
    dense_views,
    exact_sum,
    exact_views,
    fastret_variants,
    products,
    unit,
)
from benchmarks.registry import Inputs, Op, Variant
from fastret.functional import nt_xent

TEMPERATURE = 0.1
PML_LIMIT = 512


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return nt_xent(inputs["x"], inputs["labels"], temperature=TEMPERATURE, impl=impl)


def dense(inputs: Inputs) -> Tensor:
    """SimCLR's form; as in its code, where the other view of a row stands is known."""
    return dense_views(inputs["x"], inputs["partner"], TEMPERATURE).mean()


def with_partner(inputs: Inputs) -> Inputs:
    order = inputs["labels"].argsort()
    partner = torch.empty_like(order).scatter(0, order, order.view(-1, 2).flip(1).flatten())
    return {**inputs, "partner": partner}


def pml(inputs: Inputs) -> Tensor:
    from pytorch_metric_learning.losses import NTXentLoss

    loss: Tensor = NTXentLoss(temperature=TEMPERATURE)(inputs["x"], inputs["labels"])
    return loss


def oracle(inputs: Inputs) -> Tensor:
    x, partner = unit(inputs["x"], TEMPERATURE), with_partner(inputs)["partner"]
    return exact_sum(exact_views, len(x), x, partner) / len(x)


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(4, inputs["x"], inputs["x"])


OP = Op(
    name="nt_xent",
    module=__name__,
    axis="n",
    sizes=(512, 4096),
    fixed={"m": 2, "d": 128},
    setup=lambda size, seed: with_partner(classes(size, seed)),
    gradients=("x",),
    variants=(
        *fastret_variants(fastret, up_to(DENSE_LIMIT, "many seconds a call")),
        *dense_variants(dense, up_to(DENSE_LIMIT, "the matrix of scores")),
        Variant(
            "pytorch-metric-learning",
            pml,
            missing=pml_missing,
            unfit=up_to(PML_LIMIT, "matrices of all positive pairs by all negative pairs"),
        ),
    ),
    oracle=oracle,
    probe=dict,
    loss_tolerance=1e-5,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="four (N, D) x (D, N) torch.mm",
    warm_up=64,
)
