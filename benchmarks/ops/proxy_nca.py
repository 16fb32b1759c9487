"""ProxyNCA (fastret.functional.proxy_nca), forward and backward: B = 256 rows of D = 64 against C proxies.

The floor is four (B, D) x (D, C) products: the scores, again in backward, and a product for either gradient. The
listing is the reference code of 2019: distances between all of the B + C rows and proxies. At a million classes the
definition checks the first rows of the batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

from benchmarks import proxies
from benchmarks.conditions import linear_cross_entropy_missing, pml_missing
from benchmarks.contrastive import dense_variants, products
from benchmarks.proxies import classes_up_to
from benchmarks.registry import Inputs, Op, Variant
from fastret.functional import proxy_nca

SCALING = 3.0
LOGIT_SCALE = 2 * SCALING**2
LISTING_LIMIT = 20_000
PML_LIMIT = 100_000


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return proxy_nca(inputs["x"], inputs["proxies"], inputs["labels"], scaling_x=SCALING, scaling_p=SCALING, impl=impl)


def rewrite(inputs: Inputs) -> Tensor:
    """What ProxyNCA is without distances: a cosine softmax."""
    return cross_entropy(LOGIT_SCALE * proxies.cosines(inputs), inputs["labels"])


def listing(inputs: Inputs) -> Tensor:
    both = SCALING * torch.cat([normalize(inputs["x"]), normalize(inputs["proxies"])])
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares - 2 * both @ both.T).clamp(min=0)
    distances = distances * (1 - torch.eye(len(both), device=both.device))
    rows = len(inputs["x"])
    log_share = log_softmax(-distances[:rows, rows:], dim=1)
    return -log_share.gather(1, inputs["labels"][:, None]).mean()


def linear(inputs: Inputs, *, chunked: bool) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    x, weight = LOGIT_SCALE * normalize(inputs["x"]), normalize(inputs["proxies"])
    return torch.nn.functional.linear_cross_entropy(x, weight, inputs["labels"], options=options)


def pml(inputs: Inputs) -> Tensor:
    """The module with the proxies given, as an input that receives a gradient."""
    from pytorch_metric_learning.losses import ProxyNCALoss

    count, width = inputs["proxies"].shape
    module = ProxyNCALoss(1, width, softmax_scale=SCALING**2)
    module.num_classes = count
    module.proxy_labels = torch.arange(count, device=inputs["proxies"].device)
    del module.proxies
    module.proxies = inputs["proxies"]
    loss: Tensor = module(inputs["x"], inputs["labels"])
    return loss


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(4, inputs["x"], inputs["proxies"])


def _linear_variant(name: str, *, chunked: bool) -> Variant:
    return Variant(name, partial(linear, chunked=chunked), missing=linear_cross_entropy_missing)


def op(name: str, module: str, *, sizes: tuple[int, ...], d: int) -> Op:
    """ProxyNCA of rows and proxies of this width."""
    return Op(
        name=name,
        module=module,
        axis="c",
        sizes=sizes,
        fixed={"b": proxies.BATCH, "d": d},
        setup=proxies.setup,
        gradients=("x", "proxies"),
        variants=(
            *proxies.fastret_variants(fastret, classes_up_to(PML_LIMIT, "many seconds a call")),
            *dense_variants(rewrite, lambda size: None),
            _linear_variant("linear_cross_entropy", chunked=False),
            _linear_variant("linear_cross_entropy chunked", chunked=True),
            Variant(
                "pytorch-metric-learning",
                pml,
                missing=pml_missing,
                unfit=classes_up_to(PML_LIMIT, "many matrices of logits"),
            ),
            Variant(
                "listing",
                listing,
                unfit=classes_up_to(LISTING_LIMIT, "(B + C) x (B + C) matrices"),
                note="distances of the concatenation, as the reference code of 2019",
            ),
        ),
        oracle=rewrite,
        probe=proxies.probe,
        loss_tolerance=1e-5,
        gradient_tolerance=1e-5,
        floor=floor,
        floor_name="four (B, D) x (D, C) torch.mm",
        warm_up=64,
    )


OP = op("proxy_nca", __name__, sizes=(20_000, 100_000, 1_000_000), d=64)
