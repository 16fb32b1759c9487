"""How well images are retrieved by their codes: mAP@1000, as hashing and quantisation are judged.

The gallery is held as codes, the words nearest to its embeddings in a codebook; queries are not quantised. They are
ranked by the sum over books of the distances to the words, which is SPQ's own score, and by the sum of the squared
distances, which is the usual asymmetric distance (ADC). Beside the codebook that was trained with the network stands
the plain product quantizer: k-means in each part of the same embeddings, as many bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastret.retrieval import PQIndex, mean_average_precision_at_n, product_kmeans, topk
from fastret.training.evaluation import Judge, Scores, embed, score
from fastret.training.sources import RetrievalData
from fastret.training.spq import BITS_A_BOOK, SPQ, WORDS

N = 1000
COMPONENTS = 64  # of pixels, for the yardstick
SUM, SQUARED = "l21", "l2"


@dataclass(frozen=True)
class CodeRetrieval(Scores):
    """mAP@1000."""

    spq: float = score("SPQ, sum of distances")
    spq_squared: float = score("SPQ, squared distances")
    plain: float = score("plain PQ, sum of distances")
    plain_squared: float = score("plain PQ, squared distances")
    embeddings: float = score("embeddings, no codes")


def evaluate_codes(model: nn.Module, loss: nn.Module, data: RetrievalData, device: str) -> CodeRetrieval:
    """mAP@1000 of the queries, by codes of the loss's codebook, by codes of k-means' codebook, and by embeddings."""
    assert isinstance(loss, SPQ)
    queries = embed(model, data.queries.images, device)
    gallery = queries if data.gallery is None else embed(model, data.gallery.images, device)
    trained = loss.quantizer.codebook.detach()
    k = _ranks(data)
    found = topk(queries, gallery, k, metric="l2")[1]
    return CodeRetrieval(
        *_by_codes(trained, queries, gallery, data),
        *_by_codes(_plain(gallery, len(trained)), queries, gallery, data),
        _precision(found, data),
    )


def pixels(data: RetrievalData, bits: int | None) -> dict[str, float]:
    """What a plain product quantizer of the images retrieves: unit rows of pixels, their first principal axes."""
    assert bits is not None
    queries = normalize(data.queries.images.flatten(1).float())
    gallery = queries if data.gallery is None else normalize(data.gallery.images.flatten(1).float())
    # Through the origin: retrieved better than through the mean.
    axes = torch.linalg.eigh((gallery.T @ gallery).double())[1][:, -COMPONENTS:].float()
    queries, gallery = queries @ axes, gallery @ axes
    found = _by_codes(_plain(gallery, bits // BITS_A_BOOK), queries, gallery, data)
    return {"pixels, plain PQ": max(found)}


def _plain(gallery: Tensor, books: int) -> Tensor:
    """The codebook of k-means.

    Raises:
        ValueError: fewer rows than words.
    """
    if len(gallery) < WORDS:
        raise ValueError(f"data: expected at least {WORDS} images to search, one a word of a book, got {len(gallery)}")
    return product_kmeans(gallery, books, WORDS)


def _by_codes(codebook: Tensor, queries: Tensor, gallery: Tensor, data: RetrievalData) -> tuple[float, float]:
    """By the sum of distances, and of squared distances."""
    index = PQIndex(codebook)
    index.add(gallery)
    by_sum, by_squares = (
        _precision(index.search(queries, _ranks(data), metric=metric)[1], data) for metric in (SUM, SQUARED)
    )
    return by_sum, by_squares


def _ranks(data: RetrievalData) -> int:
    """To search for: queries that are searched themselves find themselves, too."""
    return min(N, len(data.gallery.images)) if data.gallery is not None else min(N + 1, len(data.queries.images))


def _precision(found: Tensor, data: RetrievalData) -> float:
    labels = data.queries.labels.to(found.device)
    rows = None if data.gallery is None else data.gallery.labels.to(found.device)
    return mean_average_precision_at_n(found, labels, rows, n=N)


BY_CODE = Judge(
    CodeRetrieval, evaluate_codes, "mAP@1000 of {images:,} images by codes of {bits} bits", yardsticks=pixels
)
