"""Functional forms of the losses."""

from fastret.losses.centroid_triplet import centroid_triplet
from fastret.losses.cqc import cqc
from fastret.losses.dpq import dpq_loss
from fastret.losses.info_nce import clip, info_nce
from fastret.losses.instance_softmax import instance_softmax
from fastret.losses.invariant_spreading import invariant_spreading
from fastret.losses.margin_softmax import arc_face, cos_face
from fastret.losses.multi_similarity import multi_similarity
from fastret.losses.nce import nce
from fastret.losses.nt_xent import nt_xent
from fastret.losses.proxy_anchor import proxy_anchor
from fastret.losses.proxy_nca import proxy_nca
from fastret.losses.proxy_softmax import normalized_softmax, proxy_nca_plus_plus
from fastret.losses.smooth_ap import smooth_ap
from fastret.losses.soft_pq import soft_pq
from fastret.losses.soft_target import soft_target_info_nce
from fastret.losses.sub_centers import soft_triple, sub_center_arc_face
from fastret.losses.sup_con import sup_con
from fastret.ops.patchmix import patchmix

__all__ = [
    "arc_face",
    "centroid_triplet",
    "clip",
    "cos_face",
    "cqc",
    "dpq_loss",
    "info_nce",
    "instance_softmax",
    "invariant_spreading",
    "multi_similarity",
    "nce",
    "normalized_softmax",
    "nt_xent",
    "patchmix",
    "proxy_anchor",
    "proxy_nca",
    "proxy_nca_plus_plus",
    "smooth_ap",
    "soft_pq",
    "soft_target_info_nce",
    "soft_triple",
    "sub_center_arc_face",
    "sup_con",
]
