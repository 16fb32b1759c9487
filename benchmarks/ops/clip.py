"""CLIP (fastret.functional.clip), both directions, forward and backward: N pairs of unit rows of D = 128.

The floor is four (N, D) x (D, N) products: the scores in forward, again in backward, and a product for the gradient of
either side. InfoNCE of the same rows in one direction stands beside it: what the second direction costs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.conditions import up_to
from benchmarks.contrastive import (
    DENSE_LIMIT,
    cpu_missing,
    dense_info_nce,
    dense_variants,
    exact_info_nce,
    exact_sum,
    fastret_variants,
    pairs,
    products,
)
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.functional import clip, info_nce

TEMPERATURE = 0.07


def setup(size: Size, seed: int) -> Inputs:
    """Unit rows: CLIP takes its rows as given."""
    return {name: normalize(rows) for name, rows in pairs(size, seed).items()}


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return clip(inputs["x"], inputs["y"], 1 / TEMPERATURE, impl=impl)


def one_direction(inputs: Inputs, impl: str) -> Tensor:
    return info_nce(inputs["x"], inputs["y"], temperature=TEMPERATURE, normalize=False, impl=impl)


def of_one_direction(inputs: Inputs) -> Inputs:
    """The definition's inputs, marked so that it leaves out the other direction."""
    return {**inputs, "one_direction": torch.ones(())}


def dense(inputs: Inputs) -> Tensor:
    logits = inputs["x"] @ inputs["y"].T / TEMPERATURE
    return (dense_info_nce(logits) + dense_info_nce(logits.T)) / 2


def oracle(inputs: Inputs) -> Tensor:
    x, y = inputs["x"] / TEMPERATURE, inputs["y"]
    target = torch.arange(len(x), device=x.device)
    over_keys = exact_sum(exact_info_nce, len(x), x, y, target) / len(x)
    if "one_direction" in inputs:
        return over_keys
    return (over_keys + exact_sum(exact_info_nce, len(x), y, x, target) / len(x)) / 2


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(4, inputs["x"], inputs["y"])


OP = Op(
    name="clip",
    module=__name__,
    axis="n",
    sizes=(1024, 8192),
    fixed={"d": 128},
    setup=setup,
    gradients=("x", "y"),
    variants=(
        *fastret_variants(fastret, up_to(DENSE_LIMIT, "many seconds a call")),
        Variant(
            "fastret-cpu one direction",
            partial(one_direction, impl="cpu"),
            missing=cpu_missing,
            expected=of_one_direction,
            note="InfoNCE of the same rows",
        ),
        *dense_variants(dense, up_to(DENSE_LIMIT, "the matrix of scores")),
    ),
    oracle=oracle,
    probe=dict,
    loss_tolerance=1e-5,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="four (N, D) x (D, N) torch.mm",
    warm_up=64,
)
