"""Recall@k of embeddings among themselves, for k up to 1,000: 128 features, 60,502 rows of small classes as in SOP.

What is asked for at that size: the time relative to the variant "dense" of the same run, and at most 1.5 GiB at the
peak of the process in all (``total`` of its memory in the JSON of a run).
"""

import torch
from torch import Tensor

from benchmarks.conditions import faiss_missing, needs
from benchmarks.contrastive import products
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret import backend
from fastret.retrieval import recall_at_k

KS = (1, 10, 100, 1000)
PROBE = 4096  # rows of the check
BLOCK = 1 << 24  # scores of a block of the dense variant


def setup(size: Size, seed: int) -> Inputs:
    """Rows around their class, near enough that recall is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    n, d = size["n"], size["d"]
    labels = torch.randperm(n, generator=generator) // 5
    centres = torch.randn(n // 5 + 1, d, generator=generator)
    return {"x": centres[labels] + 1.5 * torch.randn(n, d, generator=generator), "labels": labels}


def wanted(inputs: Inputs) -> list[int]:
    return [k for k in KS if k < len(inputs["x"])]


def fastret(inputs: Inputs, impl: str) -> Tensor:
    with backend(impl):
        recalls = recall_at_k(inputs["x"], inputs["labels"], ks=wanted(inputs), progress=False)
    return torch.tensor(list(recalls.values()), dtype=torch.float64)


def of_neighbours(inputs: Inputs, first: int, nearest: Tensor) -> Tensor:
    """(rows, len(ks)) whether rows from the first on find a match among so many nearest, which they may be in."""
    labels, row = inputs["labels"], torch.arange(first, first + len(nearest), device=nearest.device)[:, None]
    others = (nearest != row).cumsum(1)  # the rank of each, without the row itself
    match = (labels[nearest] == labels[row]) & (nearest != row)
    return torch.stack([(match & (others <= k)).any(1) for k in wanted(inputs)], 1)


def dense(inputs: Inputs) -> Tensor:
    """A block of rows at a time: a product, and its largest."""
    x = torch.nn.functional.normalize(inputs["x"])
    rows, depth = max(1, BLOCK // len(x)), wanted(inputs)[-1] + 1
    nearest = ((at, (x[at : at + rows] @ x.T).topk(depth).indices) for at in range(0, len(x), rows))
    return _mean(inputs, [of_neighbours(inputs, at, found) for at, found in nearest])


def faiss_knn(inputs: Inputs) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x = torch.nn.functional.normalize(inputs["x"]).numpy()
    nearest = faiss.knn(x, x, wanted(inputs)[-1] + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return _mean(inputs, [of_neighbours(inputs, 0, torch.from_numpy(nearest))])


def oracle(inputs: Inputs) -> Tensor:
    """The rank of a row's first match: one more than the number of rows nearer than its nearest match."""
    x, labels = torch.nn.functional.normalize(inputs["x"]), inputs["labels"]
    found = []
    for i, row in enumerate(x):
        scores = x @ row
        match = labels == labels[i]
        match[i] = False
        if not match.any():
            continue
        nearer = scores > scores[match].max()
        nearer[i] = False
        found.append([int(nearer.sum()) < k for k in wanted(inputs)])
    return torch.tensor(found, dtype=torch.float64).mean(0)


def _mean(inputs: Inputs, found: list[Tensor]) -> Tensor:
    labels = inputs["labels"]
    return torch.cat(found)[labels.bincount()[labels] > 1].double().mean(0)


def probe(inputs: Inputs) -> Inputs:
    return {name: t[:PROBE] for name, t in inputs.items()}


OP = Op(
    name="recall",
    module=__name__,
    axis="n",
    sizes=(10_000, 60_502),
    fixed={"d": 128},
    setup=setup,
    gradients=(),
    variants=(
        Variant("fastret-cpu", lambda inputs: fastret(inputs, "cpu"), missing=needs("topk", "cpu")),
        *gpu_variants("topk", fastret),
        Variant("fastret-tiled", lambda inputs, impl="tiled": fastret(inputs, impl)),
        Variant("dense", dense, note="matmul and topk, a block of rows at a time"),
        Variant("faiss", faiss_knn, missing=faiss_missing, note="faiss.knn of unit rows"),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=1e-3,
    gradient_tolerance=0,
    floor=lambda inputs: products(1, inputs["x"], inputs["x"]),
    floor_name="(N, D) x (D, N) torch.mm in blocks",
    warm_up=2000,
)
