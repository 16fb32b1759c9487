"""NPID's weighted nearest-neighbour test (fastret.retrieval.knn_classify): 10,000 queries of 128 features, 1,000
classes, the 200 nearest of a bank of up to 1.28M rows, as on ImageNet.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.conditions import needs
from benchmarks.contrastive import products
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.retrieval import knn_classify

K, TEMPERATURE, CLASSES = 200, 0.07, 1000
PROBED = 32  # queries
BLOCK = 1 << 24  # scores of a block of the dense variant


def setup(size: Size, seed: int) -> Inputs:
    """Rows around the centre of their class, near enough that most queries are right, not all."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, size["d"], generator=generator)
    labels = torch.randint(0, CLASSES, (size["m"],), generator=generator)
    classes = torch.randint(0, CLASSES, (size["n"],), generator=generator)

    def around(which: Tensor) -> Tensor:
        return normalize(centres[which] + 3 * torch.randn(len(which), size["d"], generator=generator))

    return {"query": around(classes), "bank": around(labels), "labels": labels}


def fastret(inputs: Inputs, impl: str) -> Tensor:
    """(N,) classes."""
    k = min(K, len(inputs["bank"]))
    classes, _ = knn_classify(
        inputs["query"], inputs["bank"], inputs["labels"], k=k, temperature=TEMPERATURE, progress=False, impl=impl
    )
    return classes[:, 0]


def dense(inputs: Inputs) -> Tensor:
    """A block of queries at a time: a product, its largest, their votes."""
    query, bank = (normalize(inputs[name]) for name in ("query", "bank"))
    rows = max(1, BLOCK // len(bank))
    return torch.cat([votes(inputs, query[at : at + rows] @ bank.T) for at in range(0, len(query), rows)]).argmax(1)


def votes(inputs: Inputs, scores: Tensor) -> Tensor:
    """(rows, classes)"""
    best = scores.topk(min(K, scores.shape[1]))
    weight = (best.values / TEMPERATURE).exp()
    return scores.new_zeros(len(scores), CLASSES).scatter_add_(1, inputs["labels"][best.indices], weight)


def small(size: Size) -> str | None:
    return None if size["m"] <= 100_000 else "takes minutes"


def oracle(inputs: Inputs) -> Tensor:
    """(N,) classes, a query at a time."""
    query, bank = (normalize(inputs[name]) for name in ("query", "bank"))
    return torch.cat([votes(inputs, (row @ bank.T)[None]) for row in query]).argmax(1)


def shares(inputs: Inputs, classes: Tensor) -> Tensor:
    """What part of the votes (float64) the classes have: where two have as many, either is right."""
    bank = normalize(inputs["bank"])
    all_votes = torch.cat([votes(inputs, (row @ bank.T)[None]) for row in normalize(inputs["query"])])
    return all_votes.gather(1, classes[:, None])[:, 0] / all_votes.sum(1)


def probe(inputs: Inputs) -> Inputs:
    return {**inputs, "query": inputs["query"][:PROBED]}


OP = Op(
    name="knn_classify",
    module=__name__,
    axis="m",
    sizes=(100_000, 1_280_000),
    fixed={"n": 10_000, "d": 128},
    setup=setup,
    gradients=(),
    variants=(
        Variant("fastret-cpu", lambda inputs: fastret(inputs, "cpu"), missing=needs("topk", "cpu")),
        *gpu_variants("topk", fastret),
        Variant("fastret-tiled", lambda inputs, impl="tiled": fastret(inputs, impl), unfit=small),
        Variant("dense", dense, unfit=small, note="matmul, topk and votes, a block of queries at a time"),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=1e-4,
    gradient_tolerance=0,
    floor=lambda inputs: products(1, inputs["query"], inputs["bank"]),
    floor_name="(N, D) x (D, M) torch.mm in blocks",
    warm_up=2000,
    judged=shares,
)
