"""InfoNCE (fastret.functional.info_nce), forward and backward: N queries against N keys of D = 128, key i the positive.

The floor is three (N, D) x (D, N) products: the scores, and a product for the gradient of either side; scores that are
used in forward and again in backward need not be computed twice. 131,072 rows, whose matrix of scores has 64 GiB, take
minutes a call: leave them out with ``--sizes``.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.conditions import linear_cross_entropy_missing, up_to
from benchmarks.contrastive import (
    DENSE_LIMIT,
    dense_info_nce,
    dense_variants,
    exact_info_nce,
    exact_sum,
    fastret_variants,
    pairs,
    products,
    unit,
)
from benchmarks.registry import Inputs, Op, Variant
from fastret.functional import info_nce

TEMPERATURE = 0.07
PROBE_LIMIT = 16384  # rows up to which every query is checked
PROBE_QUERIES = 256  # queries that are checked above

TOO_BIG = up_to(DENSE_LIMIT, "the matrix of scores, or minutes a call")


def fastret(inputs: Inputs, impl: str) -> Tensor:
    return info_nce(inputs["x"], inputs["y"], inputs.get("target"), temperature=TEMPERATURE, impl=impl)


def dense(inputs: Inputs) -> Tensor:
    return dense_info_nce(normalize(inputs["x"]) @ normalize(inputs["y"]).T / TEMPERATURE)


def linear(inputs: Inputs, *, chunked: bool) -> Tensor:
    """PyTorch's cross entropy of a linear layer whose weight is the keys: as it is, or by chunks of rows that PyTorch
    chooses."""
    query, key = normalize(inputs["x"]) / TEMPERATURE, normalize(inputs["y"])
    target = torch.arange(len(query), device=query.device)
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return torch.nn.functional.linear_cross_entropy(query, key, target, options=options)


def probe(inputs: Inputs) -> Inputs:
    """A random part of the queries, with their positives; all keys stay, and receive the gradient of those queries."""
    n = len(inputs["x"])
    if n <= PROBE_LIMIT:
        return inputs
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(3))[:PROBE_QUERIES].to(inputs["x"].device)
    return {"x": inputs["x"][chosen], "y": inputs["y"], "target": chosen}


def oracle(inputs: Inputs) -> Tensor:
    x, y = (unit(inputs[name], TEMPERATURE) for name in ("x", "y"))
    target = inputs.get("target", torch.arange(len(x), device=x.device))
    return exact_sum(exact_info_nce, len(x), x, y, target) / len(x)


def floor(inputs: Inputs) -> Callable[[], None]:
    return products(3, inputs["x"], inputs["y"])


def _linear_variant(name: str, *, chunked: bool) -> Variant:
    return Variant(name, partial(linear, chunked=chunked), missing=linear_cross_entropy_missing, unfit=TOO_BIG)


def op(name: str, module: str, *, sizes: tuple[int, ...], d: int) -> Op:
    """InfoNCE of rows of this width."""
    return Op(
        name=name,
        module=module,
        axis="n",
        sizes=sizes,
        fixed={"d": d},
        setup=pairs,
        gradients=("x", "y"),
        variants=(
            *fastret_variants(fastret, TOO_BIG),
            *dense_variants(dense, TOO_BIG),
            _linear_variant("linear_cross_entropy", chunked=False),
            _linear_variant("linear_cross_entropy chunked", chunked=True),
        ),
        oracle=oracle,
        probe=probe,
        loss_tolerance=1e-5,
        gradient_tolerance=1e-5,
        floor=floor,
        floor_name="three (N, D) x (D, N) torch.mm",
        warm_up=64,
    )


OP = op("info_nce", __name__, sizes=(1024, 8192, 131072), d=128)
