"""Multi-Similarity (fastret.functional.multi_similarity) without mining: N rows of D = 128 in classes of M = 8.

The floor is four (N, D) x (D, N) products: the scores in forward and again in backward, and a product for the gradient
of rows as anchors and as candidates. With its miner, which takes one more product, fastret is timed beside it.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from benchmarks.conditions import pml_missing, up_to
from benchmarks.contrastive import (
    DENSE_LIMIT,
    classes,
    cpu_missing,
    dense_variants,
    exact_sum,
    fastret_variants,
    products,
)
from benchmarks.registry import Inputs, Op, Variant
from fastret.functional import multi_similarity

ALPHA, BETA, BASE = 2.0, 50.0, 0.5
MARGIN = 0.1
PML_LIMIT = 4096


def fastret(inputs: Inputs, impl: str, mining_margin: float | None = None) -> Tensor:
    return multi_similarity(
        inputs["x"],
        inputs["labels"],
        alpha=ALPHA,
        beta=BETA,
        base=BASE,
        mining_margin=mining_margin,
        impl=impl,
    )


def _row_losses(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    near = (-ALPHA * (scores - BASE)).masked_fill(~positive, -math.inf).logsumexp(1)
    far = (BETA * (scores - BASE)).masked_fill(~negative, -math.inf).logsumexp(1)
    return softplus(near) / ALPHA + softplus(far) / BETA


def dense(inputs: Inputs) -> Tensor:
    x, labels = normalize(inputs["x"]), inputs["labels"]
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    same = labels[:, None] == labels
    return _row_losses(x @ x.T, same & ~itself, ~same).mean()


def pml(inputs: Inputs) -> Tensor:
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    loss: Tensor = MultiSimilarityLoss(ALPHA, BETA, BASE)(inputs["x"], inputs["labels"])
    return loss


def mined(inputs: Inputs) -> Inputs:
    """The definition's inputs, marked so that it mines."""
    return {**inputs, "mined": torch.ones(())}


def _exact(index: Tensor, x: Tensor, labels: Tensor, *, mining: bool) -> Tensor:
    scores = x[index] @ x.T
    negative = labels[index, None] != labels
    positive = (~negative).scatter(1, index[:, None], False)
    if mining:
        greatest = scores.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
        least = scores.masked_fill(~positive, math.inf).amin(1, keepdim=True)
        positive, negative = positive & (scores < greatest + MARGIN), negative & (scores > least - MARGIN)
    return _row_losses(scores, positive, negative)


def oracle(inputs: Inputs) -> Tensor:
    x = normalize(inputs["x"])
    return exact_sum(partial(_exact, mining="mined" in inputs), len(x), x, inputs["labels"]) / len(x)


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(4, inputs["x"], inputs["x"])


OP = Op(
    name="multi_similarity",
    module=__name__,
    axis="n",
    sizes=(1024, 4096),
    fixed={"m": 8, "d": 128},
    setup=classes,
    gradients=("x",),
    variants=(
        *fastret_variants(fastret, up_to(DENSE_LIMIT, "many seconds a call")),
        Variant(
            "fastret-cpu mined",
            partial(fastret, impl="cpu", mining_margin=MARGIN),
            missing=cpu_missing,
            expected=mined,
            note=f"with the miner, margin {MARGIN}",
        ),
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
    floor_name="four (N, D) x (D, N) torch.mm",
    warm_up=64,
)
