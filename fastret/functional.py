"""Functional forms of the losses."""

from fastret.losses.cqc import cqc
from fastret.losses.info_nce import clip, info_nce
from fastret.losses.instance_softmax import instance_softmax
from fastret.losses.nt_xent import nt_xent
from fastret.losses.proxy_nca import proxy_nca
from fastret.losses.smooth_ap import smooth_ap
from fastret.losses.soft_target import soft_target_info_nce
from fastret.losses.sup_con import sup_con

__all__ = [
    "clip",
    "cqc",
    "info_nce",
    "instance_softmax",
    "nt_xent",
    "proxy_nca",
    "smooth_ap",
    "soft_target_info_nce",
    "sup_con",
]
