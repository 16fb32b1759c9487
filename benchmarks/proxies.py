"""What the proxy losses share: inputs, the part of them that the definition checks, the cosines that users compute."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.conditions import up_to
from benchmarks.contrastive import cpu_missing
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Size, Variant

BATCH = 256  # rows
EXACT_ROWS = 8  # of the definition, where classes are so many that its float64 scores take gigabytes
MANY = 1 << 17  # classes


def classes_up_to(limit: int, reason: str) -> Callable[[Size], str | None]:
    return up_to(limit, reason, axis="c")


def setup(size: Size, seed: int) -> Inputs:
    """B rows, each near the proxy of its class, as in a training that has begun; C proxies."""
    generator = torch.Generator().manual_seed(seed)
    proxies = torch.randn(size["c"], size["d"], generator=generator)
    labels = torch.randint(size["c"], (size["b"],), generator=generator)
    x = torch.randn(size["b"], size["d"], generator=generator) + 0.3 * proxies[labels]
    return {"x": x, "proxies": proxies, "labels": labels}


def probe(inputs: Inputs) -> Inputs:
    """All rows, or the first few of them where there are many classes; all proxies stay and receive gradients."""
    if len(inputs["proxies"]) <= MANY:
        return inputs
    return {**inputs, "x": inputs["x"][:EXACT_ROWS], "labels": inputs["labels"][:EXACT_ROWS]}


def fastret_variants(loss: Callable[..., Tensor], unfit: Callable[[Size], str | None]) -> tuple[Variant, ...]:
    """``loss(inputs, impl=...)``; ``unfit`` of the tiles."""
    return (
        Variant("fastret-cpu", partial(loss, impl="cpu"), missing=cpu_missing),
        *gpu_variants("masked_lse", lambda inputs, impl: loss(inputs, impl=impl)),
        Variant("fastret-tiled", partial(loss, impl="tiled"), unfit=unfit),
    )


def cosines(inputs: Inputs) -> Tensor:
    """(B, C), as users compute them."""
    return normalize(inputs["x"]) @ normalize(inputs["proxies"]).T
