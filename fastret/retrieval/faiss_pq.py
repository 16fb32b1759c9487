"""Product-quantized codes to and from ``faiss.IndexPQ``: the codebook, its codes as FAISS packs them, and the metric.

FAISS keeps float32 words, K = 2^nbits of them a book, and the M words of a code as a string of M nbits bits. Its
METRIC_L2 is the "l2" of ``fastret.ops.pq_topk``, METRIC_INNER_PRODUCT its "dot"; it has no "l21". It is imported when
it is used.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastret.ops.checks import MOST_WORDS, check_codebook, check_codes
from fastret.ops.pq_topk import check_code_values


def to_index_pq(codebook: Tensor, codes: Tensor | None = None, metric: str = "l2") -> Any:
    """A trained ``faiss.IndexPQ`` with this codebook and these codes.

    Args:
        codebook: (M, K, L) words, rounded to float32; K a power of two, from 2 to 65,536. (To search 2-dimensional
            words FAISS 1.15 asks for at least 8 of them.)
        codes: (N, M) integers below K; None: the index is empty.
        metric: "l2" or "dot".

    Raises:
        ImportError: FAISS is not installed.
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    faiss = _faiss()
    check_codebook(codebook)
    books, words, width = codebook.shape
    if words < 2 or words & (words - 1):
        raise ValueError(f"codebook: FAISS expects a power of two of words from 2 on, got K = {words}")
    kinds = {"l2": faiss.METRIC_L2, "dot": faiss.METRIC_INNER_PRODUCT}
    if metric not in kinds:
        raise ValueError(f"metric: FAISS has l2 and dot for product-quantized codes, got {metric!r}")
    bits = words.bit_length() - 1
    index = faiss.IndexPQ(books * width, books, bits, kinds[metric])
    centroids = codebook.detach().to("cpu", torch.float32).contiguous().numpy()
    faiss.copy_array_to_vector(centroids.ravel(), index.pq.centroids)
    index.is_trained = True
    if codes is not None:
        check_codes(codes, codebook)
        check_code_values(codes, codebook)
        index.add_sa_codes(_packed(codes.cpu(), bits))
    return index


def from_index_pq(index: Any) -> tuple[Tensor, Tensor, str]:
    """(codebook (M, K, L) float32, codes (N, M) uint8 or uint16, metric) of a trained ``faiss.IndexPQ``.

    Raises:
        ImportError: FAISS is not installed.
        TypeError: another index.
        ValueError: it is not trained, or its metric or the number of its words has no counterpart here.
    """
    faiss = _faiss()
    if isinstance(index, faiss.Index):
        index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexPQ):
        raise TypeError(f"index: expected a faiss.IndexPQ, got {type(index).__name__}")
    if not index.is_trained:
        raise ValueError("index: expected a trained faiss.IndexPQ, got one that is not")
    metrics = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "dot"}
    if index.metric_type not in metrics:
        raise ValueError(f"index: expected METRIC_L2 or METRIC_INNER_PRODUCT, got metric_type {index.metric_type}")
    pq = index.pq
    if pq.ksub > MOST_WORDS:
        raise ValueError(f"index: expected at most {MOST_WORDS} words a book (16 bits), got {pq.nbits} bits")
    centroids = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    packed = faiss.vector_to_array(index.codes).reshape(index.ntotal, pq.code_size)
    return torch.from_numpy(centroids), _unpacked(packed, pq.M, pq.nbits), metrics[index.metric_type]


def _packed(codes: Tensor, bits: int) -> np.ndarray:
    if bits == 8:
        return np.ascontiguousarray(codes.to(torch.uint8).numpy())
    packed: np.ndarray = _faiss().pack_bitstrings(codes.to(torch.int32).contiguous().numpy(), bits)
    return packed


def _unpacked(packed: np.ndarray, books: int, bits: int) -> Tensor:
    if bits == 8:
        return torch.from_numpy(packed)
    codes = torch.from_numpy(_faiss().unpack_bitstrings(packed, books, bits))
    return codes.to(torch.uint8 if bits < 8 else torch.uint16)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an index of FAISS needs faiss-cpu: pip install 'fastret[faiss]'") from error
    return faiss
