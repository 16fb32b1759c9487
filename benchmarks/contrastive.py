"""What the contrastive ops share: inputs, the dense forms that users write, torch.compile, the definition, the floor.

The definition is computed in float64 over blocks of rows that are recomputed in backward, so that it covers every row
at sizes whose matrix of scores would not fit twice.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from benchmarks.conditions import inductor_missing, needs
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Size, Variant

DENSE_LIMIT = 8192  # rows: a float32 matrix of scores has 256 MiB
BLOCK = 512  # rows of the definition at once
FLOOR_ELEMENTS = 1 << 26  # scores of the floor at once: 256 MiB
BACKEND: str | Callable[..., Any] = "inductor"  # of torch.compile

Loss = Callable[[Inputs], Tensor]
cpu_missing = needs("masked_lse", "cpu")


def pairs(size: Size, seed: int) -> Inputs:
    """N rows and N partners at a cosine of about 0.3, where positives neither stand out nor drown."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, size["n"], size["d"], generator=generator)
    return {"x": x, "y": 0.3 * x + noise}


def classes(size: Size, seed: int) -> Inputs:
    """N rows in classes of M, with a weak direction in common, and in random order: nothing may rely on blocks."""
    generator = torch.Generator().manual_seed(seed)
    n, m, d = size["n"], size["m"], size["d"]
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] // m
    centres = torch.randn(math.ceil(n / m), d, generator=generator)
    return {"x": torch.randn(n, d, generator=generator) + 0.5 * centres[labels], "labels": labels}


def fastret_variants(loss: Callable[..., Tensor], tiled_limit: Callable[[Size], str | None]) -> tuple[Variant, ...]:
    """``loss(inputs, impl=...)`` by the implementations of fastret that serve masked_lse."""
    return (
        Variant("fastret-cpu", partial(loss, impl="cpu"), missing=cpu_missing),
        *gpu_variants("masked_lse", lambda inputs, impl: loss(inputs, impl=impl)),
        Variant("fastret-tiled", partial(loss, impl="tiled"), unfit=tiled_limit),
    )


def dense_variants(loss: Loss, unfit: Callable[[Size], str | None]) -> tuple[Variant, ...]:
    """The dense form as it is, and under torch.compile."""
    return (
        Variant("dense", loss, unfit=unfit, note="matrices of scores in PyTorch"),
        Variant(
            "dense torch.compile",
            lambda inputs: _compiled(loss, BACKEND)(inputs),
            partial(_compile, loss),
            inductor_missing,
            unfit,
        ),
    )


@functools.cache
def _compiled(loss: Loss, backend: str | Callable[..., Any]) -> Loss:
    # A graph for each shape: a dynamic one would be compiled a second time, and at the second size.
    compiled: Loss = torch.compile(loss, dynamic=False, backend=backend)
    return compiled


def _compile(loss: Loss, inputs: Inputs) -> Inputs:
    """Compiles forward and backward for inputs of these shapes, outside of what is measured."""
    leaves = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in inputs.items()}
    _compiled(loss, BACKEND)(leaves).backward()
    return inputs


def dense_info_nce(logits: Tensor) -> Tensor:
    """Column i is the positive of row i."""
    return cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def dense_views(x: Tensor, partner: Tensor, temperature: float) -> Tensor:
    """Row losses (N,) of rows with one positive each, ``partner`` (N,), against all rows but themselves."""
    x = normalize(x)
    logits = x @ x.T / temperature
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return cross_entropy(logits.masked_fill(itself, -math.inf), partner, reduction="none")


def exact_sum(row_losses: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """The sum of ``row_losses(index, *tensors)``, the losses of the rows in ``index``, over blocks of all rows."""
    blocks = torch.arange(rows, device=tensors[0].device).split(BLOCK)
    parts: list[Any] = [checkpoint(row_losses, index, *tensors, use_reentrant=False).sum() for index in blocks]
    return torch.stack(parts).sum()


def exact_info_nce(index: Tensor, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """lse_j <x_i, y_j> - <x_i, y_target(i)> for i in ``index``, of rows that ``unit`` prepared."""
    scores = x[index] @ y.T
    return scores.logsumexp(1) - scores.gather(1, target[index, None])[:, 0]


def exact_views(index: Tensor, x: Tensor, partner: Tensor) -> Tensor:
    """The same against the rows of ``x`` itself, but each row's own."""
    scores = (x[index] @ x.T).scatter(1, index[:, None], -math.inf)
    return scores.logsumexp(1) - scores.gather(1, partner[index, None])[:, 0]


def unit(x: Tensor, temperature: float) -> Tensor:
    """Rows whose dot products are cosines over the temperature."""
    return normalize(x) / math.sqrt(temperature)


def products(count: int, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A floor: ``count`` times x y^T, in blocks of rows where all scores would take more than FLOOR_ELEMENTS."""
    rows = max(1, min(len(x), FLOOR_ELEMENTS // len(y)))
    out = x.new_empty(rows, len(y))

    def run() -> None:
        for _ in range(count):
            for block in x.split(rows):
                torch.mm(block, y.T, out=out[: len(block)])

    return run
