"""Evaluation of embeddings as a retrieval system."""

from fastret.retrieval.metrics import map_at_r, mean_average_precision, r_precision, recall_at_k

__all__ = ["map_at_r", "mean_average_precision", "r_precision", "recall_at_k"]
