"""The k nearest rows of a gallery by squared L2 distance, exactly: 1,000 queries, 50 features, k = 10.

Indices are judged by the distances (float64) of the pairs they name: near neighbours may change places, no others.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.conditions import faiss_missing, needs
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.ops import topk

K = 10
PROBE = 32  # queries of the check
BLOCK = 1 << 23  # scores of a block of the floor and of the dense variant


def setup(size: Size, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(size["n"], size["d"], generator=generator)
    return {"query": query, "gallery": torch.randn(size["m"], size["d"], generator=generator)}


def fastret(inputs: Inputs, impl: str) -> Tensor:
    """(N, k) indices."""
    return topk(inputs["query"], inputs["gallery"], k=K, metric="l2", impl=impl)[1]


def dense(inputs: Inputs) -> Tensor:
    """A block of queries at a time against all of the gallery."""
    query, gallery = inputs["query"], inputs["gallery"]
    squares = gallery.square().sum(1)
    parts = query.split(max(1, BLOCK // len(gallery)))
    return torch.cat([torch.addmm(squares, q, gallery.T, alpha=-2).topk(K, largest=False).indices for q in parts])


def faiss_knn(inputs: Inputs) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return torch.from_numpy(faiss.knn(inputs["query"].numpy(), inputs["gallery"].numpy(), K)[1])


def oracle(inputs: Inputs) -> Tensor:
    """Sums of squared differences, sorted, a query after another."""
    return torch.stack([(inputs["gallery"] - q).square().sum(1).sort(stable=True).indices[:K] for q in inputs["query"]])


def distances(inputs: Inputs, indices: Tensor) -> Tensor:
    return (inputs["query"][:, None] - inputs["gallery"][indices]).square().sum(2)


def probe(inputs: Inputs) -> Inputs:
    return {**inputs, "query": inputs["query"][:PROBE]}


def floor(inputs: Inputs) -> Callable[[], None]:
    """All products, in blocks of the gallery."""
    query, gallery = inputs["query"], inputs["gallery"]
    columns = max(1, BLOCK // len(query))
    out = query.new_empty(len(query), columns)

    def multiply() -> None:
        for part in gallery.split(columns):
            torch.mm(query, part.T, out=out[:, : len(part)])

    return multiply


def halved(inputs: Inputs) -> Inputs:
    return {**inputs, "gallery": inputs["gallery"].bfloat16()}


def widened(inputs: Inputs) -> Inputs:
    return {**inputs, "gallery": inputs["gallery"].float()}


OP = Op(
    name="topk",
    module=__name__,
    axis="m",
    sizes=(100_000, 400_000, 1_000_000),
    fixed={"n": 1000, "d": 50},
    setup=setup,
    gradients=(),
    variants=(
        Variant("fastret-cpu", lambda inputs: fastret(inputs, "cpu"), missing=needs("topk", "cpu")),
        Variant(
            "fastret-cpu bfloat16",
            lambda inputs: fastret(inputs, "cpu"),
            prepare=halved,
            expected=widened,
            missing=needs("topk", "cpu"),
            note="the gallery in bfloat16",
        ),
        *gpu_variants("topk", fastret),
        Variant("fastret-tiled", lambda inputs, impl="tiled": fastret(inputs, impl)),
        Variant("dense", dense, note="addmm and topk, a block of queries at a time"),
        Variant("faiss", faiss_knn, missing=faiss_missing, note="faiss.knn, which IndexFlatL2 is"),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=1e-3,
    gradient_tolerance=0,
    floor=floor,
    floor_name="(N, D) x (D, M) torch.mm in blocks",
    warm_up=2000,
    judged=distances,
)
