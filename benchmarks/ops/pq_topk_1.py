"""Codes searched for one query; all else as in pq_topk."""

from benchmarks.ops.pq_topk import op

OP = op("pq_topk_1", __name__, n=1)
