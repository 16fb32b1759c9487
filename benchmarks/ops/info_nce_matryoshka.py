"""InfoNCE over prefixes of 64, 128, 256, 512 and all 768 features (fastret.functional.info_nce with matryoshka=),
forward and backward, N queries against N keys.

The floor is four (N, D) x (D, N) products: the scores in forward, the scores again, dS Y and dS^T X in backward, of all
widths at once. The exponentials, five N N of them in each direction, are not part of it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.backends.registry import IMPLEMENTATIONS, Call
from fastret.functional import info_nce

WIDTHS = (64, 128, 256, 512, 768)
TEMPERATURE = 0.07
DENSE_LIMIT = 4096
TILED_LIMIT = 4096
PROBE_QUERIES = 256  # queries that are checked


def setup(size: Size, seed: int) -> Inputs:
    """Keys, and queries that are near theirs."""
    generator = torch.Generator().manual_seed(seed)
    query, noise = (torch.randn(size["n"], size["d"], generator=generator) for _ in range(2))
    return {"query": query, "key": 0.3 * query + noise}


def _reduced(losses: Tensor, inputs: Inputs) -> Tensor:
    """Mean over queries, or the weighted sum where there are weights."""
    return losses @ inputs["weight"] if "weight" in inputs else losses.mean()


def fastret(inputs: Inputs, impl: str) -> Tensor:
    """All widths in one call."""
    options = {"temperature": TEMPERATURE, "matryoshka": WIDTHS, "impl": impl}
    if "weight" not in inputs:
        return info_nce(inputs["query"], inputs["key"], **options)
    return _reduced(info_nce(inputs["query"], inputs["key"], reduction="none", **options), inputs)


def one_call_a_width(inputs: Inputs, impl: str) -> Tensor:
    """A call on each slice; without weights each is one sweep of three products."""
    total = inputs["query"].new_zeros(())
    reduction = "none" if "weight" in inputs else "mean"
    for width in WIDTHS:
        query, key = inputs["query"][:, :width], inputs["key"][:, :width]
        losses = info_nce(query, key, temperature=TEMPERATURE, reduction=reduction, impl=impl)
        total = total + _reduced(losses, inputs)
    return total


def dense(inputs: Inputs) -> Tensor:
    """An N x N matrix of logits a width."""
    target = torch.arange(len(inputs["query"]), device=inputs["query"].device)
    total = inputs["query"].new_zeros(())
    for width in WIDTHS:
        query, key = normalize(inputs["query"][:, :width]), normalize(inputs["key"][:, :width])
        losses = cross_entropy(query @ key.T / TEMPERATURE, target, reduction="none")
        total = total + _reduced(losses, inputs)
    return total


def probe(inputs: Inputs) -> Inputs:
    """Inputs with weights that leave a random part of the queries. All rows and all tiles still take part."""
    n = len(inputs["query"])
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(3))[:PROBE_QUERIES]
    weight = torch.zeros(n).index_fill(0, chosen, 1 / len(chosen))
    return {**inputs, "weight": weight.to(inputs["query"].device)}


def oracle(inputs: Inputs) -> Tensor:
    """The dense definition, of the queries that have a weight."""
    query, key = inputs["query"], inputs["key"]
    weight = inputs.get("weight", torch.full_like(query[:, 0], 1 / len(query)))
    chosen = weight.detach().nonzero()[:, 0]
    losses = info_nce(
        query[chosen],
        key,
        chosen,
        temperature=TEMPERATURE,
        matryoshka=WIDTHS,
        reduction="none",
        impl="reference",
    )
    return losses @ weight[chosen]


def floor(inputs: Inputs) -> Callable[[], None]:
    query, key = inputs["query"], inputs["key"]
    out = query.new_empty(len(query), len(key))

    def four_products() -> None:
        for _ in range(4):
            torch.mm(query, key.T, out=out)

    return four_products


def _needs(impl: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        return IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", device, torch.float32))

    return missing


def _up_to(limit: int, reason: str) -> Callable[[Size], str | None]:
    return lambda size: f"not above N = {limit}: {reason}" if size["n"] > limit else None


OP = Op(
    name="info_nce_matryoshka",
    module=__name__,
    axis="n",
    sizes=(1024, 4096, 8192),
    fixed={"d": WIDTHS[-1]},
    setup=setup,
    gradients=("query", "key"),
    variants=(
        Variant("fastret-cpu", partial(fastret, impl="cpu"), missing=_needs("cpu")),
        Variant("fastret-cpu, a call a width", partial(one_call_a_width, impl="cpu"), missing=_needs("cpu")),
        *gpu_variants("masked_lse", fastret),
        Variant("fastret-tiled", partial(fastret, impl="tiled"), unfit=_up_to(TILED_LIMIT, "many seconds a call")),
        Variant("dense", dense, unfit=_up_to(DENSE_LIMIT, "two N x N matrices a width"), note="cross-entropy a width"),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=5e-6,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="four (N, D) x (D, N) torch.mm",
    warm_up=64,
)
