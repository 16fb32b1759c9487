"""Floor 4: losses as formulas over what ops return. One file per family."""

from fastret.losses.centroid_triplet import CentroidTriplet
from fastret.losses.cqc import CQCLoss
from fastret.losses.dpq import DPQ, DPQLoss
from fastret.losses.info_nce import CLIPLoss, InfoNCE
from fastret.losses.instance_softmax import InstanceSoftmax
from fastret.losses.invariant_spreading import InvariantSpreading
from fastret.losses.lemniscate import LinearAverage, NCEAverage, NCECriterion
from fastret.losses.margin_softmax import ArcFace, CosFace
from fastret.losses.memory_bank import MemoryBank
from fastret.losses.multi_similarity import MultiSimilarity
from fastret.losses.nce import NCELoss
from fastret.losses.npid import NPID
from fastret.losses.nt_xent import NTXent
from fastret.losses.patch_mixer import PatchMixer
from fastret.losses.patchmix import PatchMixLoss
from fastret.losses.proxy_anchor import ProxyAnchor
from fastret.losses.proxy_nca import ProxyNCA
from fastret.losses.proxy_softmax import NormalizedSoftmax, ProxyNCAPlusPlus
from fastret.losses.smooth_ap import SmoothAP
from fastret.losses.soft_pq import SoftPQ
from fastret.losses.soft_target import PatchMixTargets, SoftTargetInfoNCE
from fastret.losses.sub_centers import SoftTriple, SubCenterArcFace
from fastret.losses.sup_con import SupCon

__all__ = [
    "DPQ",
    "NPID",
    "ArcFace",
    "CLIPLoss",
    "CQCLoss",
    "CentroidTriplet",
    "CosFace",
    "DPQLoss",
    "InfoNCE",
    "InstanceSoftmax",
    "InvariantSpreading",
    "LinearAverage",
    "MemoryBank",
    "MultiSimilarity",
    "NCEAverage",
    "NCECriterion",
    "NCELoss",
    "NTXent",
    "NormalizedSoftmax",
    "PatchMixLoss",
    "PatchMixTargets",
    "PatchMixer",
    "ProxyAnchor",
    "ProxyNCA",
    "ProxyNCAPlusPlus",
    "SmoothAP",
    "SoftPQ",
    "SoftTargetInfoNCE",
    "SoftTriple",
    "SubCenterArcFace",
    "SupCon",
]
