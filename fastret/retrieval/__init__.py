"""Search, and evaluation of embeddings as a retrieval system."""

from fastret.retrieval.kmeans import KMeans, kmeans, product_kmeans
from fastret.retrieval.knn import knn_classify
from fastret.retrieval.metrics import (
    map_at_r,
    mean_average_precision,
    queries_without_match,
    r_precision,
    recall_at_k,
)
from fastret.retrieval.nmi import nmi
from fastret.retrieval.pq_index import PQIndex
from fastret.retrieval.ranked import mean_average_precision_at_n
from fastret.retrieval.search import topk

__all__ = [
    "KMeans",
    "PQIndex",
    "kmeans",
    "knn_classify",
    "map_at_r",
    "mean_average_precision",
    "mean_average_precision_at_n",
    "nmi",
    "product_kmeans",
    "queries_without_match",
    "r_precision",
    "recall_at_k",
    "topk",
]
