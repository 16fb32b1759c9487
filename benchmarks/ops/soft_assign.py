"""Soft assignment to a product codebook by squared distances, forward and backward: 8 books of 256 words of width 16.

The loss is the dot product of what comes out with fixed weights, which adds no tensor but the gradient that arrives.
The floor is seven products of N x 256 x 16 a book, two in forward and five in backward, without any exponential.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.conditions import needs, up_to
from benchmarks.contrastive import exact_sum
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.ops import soft_assign

TAU = 0.5
PROBE = 4096  # rows of the check
OFFICIAL_LIMIT = 4096  # rows: each book has tensors of 64 MiB


def setup(size: Size, seed: int) -> Inputs:
    """Rows about as far from the words of their books as these are from each other."""
    generator = torch.Generator().manual_seed(seed)
    n, width = size["n"], size["m"] * size["l"]
    x, weights = torch.randn(2, n, width, generator=generator)
    codebook = torch.randn(size["m"], size["k"], size["l"], generator=generator)
    return {"x": x, "codebook": codebook, "weights": weights / n}


def weighed(soft: Tensor, inputs: Inputs) -> Tensor:
    return torch.dot(soft.flatten(), inputs["weights"].flatten())


def fastret(inputs: Inputs, impl: str) -> Tensor:
    result = soft_assign(inputs["x"], inputs["codebook"], TAU, impl=impl)
    assert result.soft is not None
    return weighed(result.soft, inputs)


def official(inputs: Inputs) -> Tensor:
    """As SPQ's Soft_Quantization has it: all differences of a book at once, and results that grow by torch.cat."""
    soft = inputs["x"][:, :0]
    for part, words in zip(inputs["x"].split(inputs["codebook"].shape[2], 1), inputs["codebook"], strict=True):
        differences = part.unsqueeze(1) - words.unsqueeze(0)
        share = (torch.sum(differences * differences, -1) * -TAU).softmax(-1)
        soft = torch.cat((soft, share @ words), 1)
    return weighed(soft, inputs)


def matmul(inputs: Inputs) -> Tensor:
    """The same from products, without what all words of a row share."""
    soft = []
    for part, words in zip(inputs["x"].split(inputs["codebook"].shape[2], 1), inputs["codebook"], strict=True):
        scores = torch.addmm(-TAU * words.square().sum(1), part, words.T, alpha=2 * TAU)
        soft.append(scores.softmax(1) @ words)
    return weighed(torch.cat(soft, 1), inputs)


def exact_rows(index: Tensor, x: Tensor, codebook: Tensor, weights: Tensor) -> Tensor:
    """The losses of the rows in ``index``, from all differences."""
    parts = x[index].unflatten(1, (codebook.shape[0], 1, codebook.shape[2]))
    share = (-TAU * (parts - codebook).square().sum(3)).softmax(2)
    return (torch.einsum("nmk,mkl->nml", share, codebook).flatten(1) * weights[index]).sum(1)


def oracle(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    return exact_sum(exact_rows, len(x), x, inputs["codebook"], inputs["weights"])


def probe(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"][:PROBE], "weights": inputs["weights"][:PROBE]}


def floor(inputs: Inputs) -> Callable[[], None]:
    codebook = inputs["codebook"].mT.contiguous()
    parts = [part.contiguous() for part in inputs["x"].split(codebook.shape[1], 1)]
    out = inputs["x"].new_empty(len(inputs["x"]), codebook.shape[2])

    def multiply() -> None:
        for _ in range(7):
            for part, words in zip(parts, codebook, strict=True):
                torch.mm(part, words, out=out)

    return multiply


OP = Op(
    name="soft_assign",
    module=__name__,
    axis="n",
    sizes=(4096, 32768),
    fixed={"m": 8, "k": 256, "l": 16},
    setup=setup,
    gradients=("x", "codebook"),
    variants=(
        Variant("fastret-cpu", partial(fastret, impl="cpu"), missing=needs("soft_assign", "cpu")),
        *gpu_variants("soft_assign", fastret),
        Variant("fastret-tiled", partial(fastret, impl="tiled")),
        Variant(
            "official",
            official,
            unfit=up_to(OFFICIAL_LIMIT, "the differences"),
            note="N x K x L differences a book, as in SPQ's code",
        ),
        Variant("matmul", matmul, note="addmm, softmax and a product a book"),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=1e-5,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="seven (N, L) x (L, K) torch.mm a book",
    warm_up=64,
)
