"""SoftTriple (fastret.functional.soft_triple), forward and backward: B = 256 rows of D = 64 against C classes of K = 10
centres, without the regulariser: that of pytorch-metric-learning holds the cosines of all (C K)^2 pairs of centres.

The floor is four (B, D) x (D, C K) products: the scores in forward and again in backward, and a product for the
gradient of each side.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from benchmarks.conditions import pml_missing
from benchmarks.contrastive import dense_variants, exact_sum, fastret_variants, products
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.functional import soft_triple

LA, GAMMA, MARGIN = 20.0, 0.1, 0.01
PROBED = 16  # rows


def setup(size: Size, seed: int) -> Inputs:
    """Rows at a cosine of about 0.3 with a centre of their class."""
    generator = torch.Generator().manual_seed(seed)
    rows, classes, centers, d = (size[name] for name in ("b", "c", "k", "d"))
    proxies = torch.randn(classes, centers, d, generator=generator)
    labels, which = (torch.randint(0, n, (rows,), generator=generator) for n in (classes, centers))
    x = torch.randn(rows, d, generator=generator) + 0.3 * proxies[labels, which]
    return {"x": x, "proxies": proxies, "labels": labels}


def probe(inputs: Inputs) -> Inputs:
    """Few rows: the definition keeps a float64 matrix of all their scores."""
    return {**inputs, "x": inputs["x"][:PROBED], "labels": inputs["labels"][:PROBED]}


def fastret(inputs: Inputs, impl: str) -> Tensor:
    options = {"la": LA, "gamma": GAMMA, "margin": MARGIN, "tau": 0.0}
    return soft_triple(inputs["x"], inputs["proxies"], inputs["labels"], impl=impl, **options)


def row_losses(index: Tensor, x: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    scores = torch.einsum("bd,ckd->bck", normalize(x[index]), normalize(proxies, dim=2))
    of_classes = ((scores / GAMMA).softmax(2) * scores).sum(2)
    margin = MARGIN * one_hot(labels[index], len(proxies)).to(scores.dtype)
    return cross_entropy(LA * (of_classes - margin), labels[index], reduction="none")


def dense(inputs: Inputs) -> Tensor:
    """As the official code has it."""
    rows = torch.arange(len(inputs["x"]), device=inputs["x"].device)
    return row_losses(rows, inputs["x"], inputs["proxies"], inputs["labels"]).mean()


@functools.cache
def _pml_module(classes: int, centers: int, d: int) -> nn.Module:
    from pytorch_metric_learning.losses import SoftTripleLoss

    with torch.device("meta"):  # its parameter is given to each call
        module: nn.Module = SoftTripleLoss(classes, d, centers, la=LA, gamma=GAMMA, margin=MARGIN)
    return module


def pml(inputs: Inputs) -> Tensor:
    proxies = inputs["proxies"]
    parameter = {"fc": proxies.flatten(0, 1).T}
    arguments = (inputs["x"], inputs["labels"])
    loss: Tensor = torch.func.functional_call(_pml_module(*proxies.shape), parameter, arguments)
    return loss


def oracle(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    return exact_sum(row_losses, len(x), x, inputs["proxies"], inputs["labels"]) / len(x)


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(4, inputs["x"], inputs["proxies"].flatten(0, 1))


def no_limit(size: Size) -> str | None:
    return None


OP = Op(
    name="soft_triple",
    module=__name__,
    axis="c",
    sizes=(1000, 20_000),
    fixed={"b": 256, "k": 10, "d": 64},
    setup=setup,
    gradients=("x", "proxies"),
    variants=(
        *fastret_variants(fastret, no_limit),
        *dense_variants(dense, no_limit),
        Variant("pytorch-metric-learning", pml, missing=pml_missing),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=1e-5,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="four (B, D) x (D, C K) torch.mm",
    warm_up=64,
)
