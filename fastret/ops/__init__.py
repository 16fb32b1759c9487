"""Floor 3: differentiable reductions over a pair matrix that is never stored. One file per reduction."""

from fastret.backends.pairs import Circulant, Dense, Head, Indexed, Listed, Masked, PairMask, Shifted
from fastret.ops.knn_vote import knn_vote
from fastret.ops.masked_lse import masked_lse
from fastret.ops.masked_lse_sum import masked_lse_sum
from fastret.ops.pair_dot import pair_dot, positive_pairs
from fastret.ops.pair_sums import pair_sums
from fastret.ops.patchmix import patch_groups, patchmix
from fastret.ops.pq_topk import pq_topk
from fastret.ops.rank_sums import RankSums, rank_sums, sum_by_query
from fastret.ops.row_extrema import row_extrema
from fastret.ops.sampled_dot import sampled_dot
from fastret.ops.segment_mean import segment_mean
from fastret.ops.soft_assign import SoftAssign, soft_assign
from fastret.ops.topk import topk
from fastret.ops.update_rows import update_rows_

__all__ = [
    "Circulant",
    "Dense",
    "Head",
    "Indexed",
    "Listed",
    "Masked",
    "PairMask",
    "RankSums",
    "Shifted",
    "SoftAssign",
    "knn_vote",
    "masked_lse",
    "masked_lse_sum",
    "pair_dot",
    "pair_sums",
    "patch_groups",
    "patchmix",
    "positive_pairs",
    "pq_topk",
    "rank_sums",
    "row_extrema",
    "sampled_dot",
    "segment_mean",
    "soft_assign",
    "sum_by_query",
    "topk",
    "update_rows_",
]
