"""Proxy-Anchor (fastret.functional.proxy_anchor), forward and backward: B = 256 rows of D = 64 against C proxies.

The floor is four (B, D) x (D, C) products: the scores, again in backward, and a product for either gradient.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks import proxies
from benchmarks.conditions import pml_missing
from benchmarks.contrastive import dense_variants, products
from benchmarks.proxies import classes_up_to
from benchmarks.registry import Inputs, Op, Variant
from fastret.functional import proxy_anchor

MARGIN, ALPHA = 0.1, 32.0
LIMIT = 100_000


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return proxy_anchor(inputs["x"], inputs["proxies"], inputs["labels"], margin=MARGIN, alpha=ALPHA, impl=impl)


def dense(inputs: Inputs) -> Tensor:
    cosine = proxies.cosines(inputs)
    count = cosine.shape[1]
    own = inputs["labels"][:, None] == torch.arange(count, device=cosine.device)
    near = (-ALPHA * (cosine - MARGIN)).masked_fill(~own, -math.inf).logsumexp(0)
    far = (ALPHA * (cosine + MARGIN)).masked_fill(own, -math.inf).logsumexp(0)
    return softplus(near).sum() / own.any(0).sum() + softplus(far).sum() / count


def pml(inputs: Inputs) -> Tensor:
    """The module with the proxies given, as an input that receives a gradient."""
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    count, width = inputs["proxies"].shape
    module = ProxyAnchorLoss(1, width, margin=MARGIN, alpha=ALPHA)
    module.num_classes = count
    del module.proxies
    module.proxies = inputs["proxies"]
    loss: Tensor = module(inputs["x"], inputs["labels"])
    return loss


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(4, inputs["x"], inputs["proxies"])


OP = Op(
    name="proxy_anchor",
    module=__name__,
    axis="c",
    sizes=(20_000, 100_000),
    fixed={"b": proxies.BATCH, "d": 64},
    setup=proxies.setup,
    gradients=("x", "proxies"),
    variants=(
        *proxies.fastret_variants(fastret, classes_up_to(LIMIT, "many seconds a call")),
        *dense_variants(dense, classes_up_to(LIMIT, "many matrices of logits")),
        Variant(
            "pytorch-metric-learning",
            pml,
            missing=pml_missing,
            unfit=classes_up_to(LIMIT, "many matrices of logits"),
        ),
    ),
    oracle=dense,
    probe=dict,
    loss_tolerance=1e-5,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="four (B, D) x (D, C) torch.mm",
    warm_up=64,
)
