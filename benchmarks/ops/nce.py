"""NPID's loss (fastret.functional.nce), forward and backward: 256 rows of 128 features against K noise rows each, drawn
from a bank of 1.28M unit rows, as on ImageNet.

The official code gathers all B (K + 1) rows and multiplies them in a batch. The yardstick reads as many rows as forward
and backward do, without keeping them: PyTorch's matrix-vector product over the bank in its order, which memory gives
faster than rows from anywhere. It is no floor: the kernel, which asks for rows ahead, was measured faster.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from benchmarks.conditions import needs
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.backends.sampling import Draws
from fastret.functional import nce
from fastret.losses.nce import nce_of_logits
from fastret.ops import sampled_dot

TEMPERATURE, EPS = 0.07, 1e-7
BANK, SEED = 1_280_000, 7
PROBED = 16  # rows


def setup(size: Size, seed: int) -> Inputs:
    """Rows near their own in the bank; a smaller bank with little noise, for tests."""
    generator = torch.Generator().manual_seed(seed)
    b, k, d = size["b"], size["k"], size["d"]
    bank = normalize(torch.randn(min(BANK, 320 * k), d, generator=generator))
    index = torch.randint(0, len(bank), (b,), generator=generator)
    x = normalize(bank[index] + 0.1 * torch.randn(b, d, generator=generator))
    return {"x": x, "bank": bank, "index": index, "noise": Draws(k, torch.tensor(SEED)).columns(b, len(bank))}


def normalizer(inputs: Inputs) -> float:
    """Z: 2.2 is the mean of exp(cosine / 0.07) of random rows with 128 features."""
    return 2.2 * len(inputs["bank"])


def drawn(inputs: Inputs, impl: str) -> Tensor:
    """The noise is drawn where it is read."""
    k = inputs["noise"].shape[1]
    scores = sampled_dot(inputs["x"], inputs["bank"], first=inputs["index"], count=k, seed=SEED, impl=impl)
    return nce_of_logits(scores / TEMPERATURE, math.log(normalizer(inputs)), len(inputs["bank"]), EPS, "mean")


def listed(inputs: Inputs, impl: str) -> Tensor:
    return nce(
        inputs["x"],
        inputs["bank"],
        inputs["index"],
        inputs["noise"],
        temperature=TEMPERATURE,
        Z=normalizer(inputs),
        eps=EPS,
        impl=impl,
    )


def gathered(inputs: Inputs) -> Tensor:
    """As the official code has it, in logarithms."""
    columns = torch.cat([inputs["index"][:, None], inputs["noise"]], 1)
    rows = inputs["bank"][columns]
    return of_scores(inputs, torch.bmm(rows, inputs["x"][:, :, None])[:, :, 0])


def of_scores(inputs: Inputs, scores: Tensor) -> Tensor:
    c0 = inputs["noise"].shape[1] / len(inputs["bank"])
    logarithm = torch.tensor(normalizer(inputs) * (c0 + EPS), dtype=torch.float64).log().to(scores.dtype)
    a = scores / TEMPERATURE - logarithm
    constant = inputs["noise"].shape[1] * torch.tensor(EPS / c0, dtype=torch.float64).log1p().to(scores.dtype)
    return (softplus(-a[:, 0], threshold=40) + softplus(a[:, 1:], threshold=40).sum(1)).mean() + constant


def oracle(inputs: Inputs) -> Tensor:
    """A row at a time."""
    columns = torch.cat([inputs["index"][:, None], inputs["noise"]], 1)
    return of_scores(inputs, torch.stack([inputs["bank"][c] @ x for c, x in zip(columns, inputs["x"], strict=True)]))


def probe(inputs: Inputs) -> Inputs:
    """The first rows: rows that are left out change no noise of theirs."""
    return {**inputs, **{name: inputs[name][:PROBED] for name in ("x", "index", "noise")}}


def floor(inputs: Inputs) -> Callable[[], None]:
    bank, count = inputs["bank"], inputs["noise"].numel() + len(inputs["x"])
    x = inputs["x"][0]

    def passes() -> None:
        for _ in range(2):
            left = count
            while left > 0:
                torch.mv(bank[:left], x)
                left -= len(bank)

    return passes


OP = Op(
    name="nce",
    module=__name__,
    axis="k",
    sizes=(4096, 65_536),
    fixed={"b": 256, "d": 128},
    setup=setup,
    gradients=("x",),
    variants=(
        Variant("fastret-cpu", lambda inputs: drawn(inputs, "cpu"), missing=needs("sampled_dot", "cpu")),
        *gpu_variants("sampled_dot", drawn),
        Variant("fastret-tiled", lambda inputs, impl="tiled": drawn(inputs, impl)),
        Variant(
            "fastret-cpu listed",
            lambda inputs: listed(inputs, "cpu"),
            missing=needs("sampled_dot", "cpu"),
            note="the numbers of the noise given",
        ),
        Variant("gather + bmm", gathered, note="the numbers of the noise given"),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=1e-4,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="twice as many rows of the bank read in a row (torch.mv)",
    warm_up=64,
)
