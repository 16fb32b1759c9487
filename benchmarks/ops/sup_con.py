"""SupCon (fastret.functional.sup_con), forward and backward: N rows of D = 128 in classes of M = 8, in random order.

The floor is three (N, D) x (D, N) products: the scores, and a product for the gradient of rows as anchors and as
candidates.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.conditions import pml_missing, up_to
from benchmarks.contrastive import (
    DENSE_LIMIT,
    classes,
    dense_variants,
    exact_sum,
    fastret_variants,
    products,
    unit,
)
from benchmarks.registry import Inputs, Op, Variant
from fastret.functional import sup_con

TEMPERATURE = 0.1
PML_LIMIT = 4096


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return sup_con(inputs["x"], inputs["labels"], temperature=TEMPERATURE, impl=impl)


def dense(inputs: Inputs) -> Tensor:
    """The masked matrix that the authors' code works with; all rows have positives here."""
    x, labels = normalize(inputs["x"]), inputs["labels"]
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    positive = (labels[:, None] == labels) & ~itself
    logits = (x @ x.T / TEMPERATURE).masked_fill(itself, -math.inf)
    log_share = logits - logits.logsumexp(1, keepdim=True)
    return -(log_share.where(positive, 0).sum(1) / positive.sum(1)).mean()


def pml(inputs: Inputs) -> Tensor:
    from pytorch_metric_learning.losses import SupConLoss

    loss: Tensor = SupConLoss(temperature=TEMPERATURE)(inputs["x"], inputs["labels"])
    return loss


def _exact(index: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    scores = x[index] @ x.T
    positive = (labels[index, None] == labels).scatter(1, index[:, None], False)
    lse = scores.scatter(1, index[:, None], -math.inf).logsumexp(1)
    return lse - (scores * positive).sum(1) / positive.sum(1)


def oracle(inputs: Inputs) -> Tensor:
    x = unit(inputs["x"], TEMPERATURE)
    return exact_sum(_exact, len(x), x, inputs["labels"]) / len(x)


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(3, inputs["x"], inputs["x"])


OP = Op(
    name="sup_con",
    module=__name__,
    axis="n",
    sizes=(1024, 4096, 8192),
    fixed={"m": 8, "d": 128},
    setup=classes,
    gradients=("x",),
    variants=(
        *fastret_variants(fastret, up_to(DENSE_LIMIT, "many seconds a call")),
        *dense_variants(dense, up_to(DENSE_LIMIT, "the matrix of scores")),
        Variant(
            "pytorch-metric-learning",
            pml,
            missing=pml_missing,
            unfit=up_to(PML_LIMIT, "several matrices of scores"),
        ),
    ),
    oracle=oracle,
    probe=dict,
    loss_tolerance=1e-5,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="three (N, D) x (D, N) torch.mm",
    warm_up=64,
)
