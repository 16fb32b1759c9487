"""Floor 3: differentiable reductions over a pair matrix that is never stored. One file per reduction."""

from fastret.ops.rank_sums import RankSums, rank_sums, sum_by_query

__all__ = ["RankSums", "rank_sums", "sum_by_query"]
