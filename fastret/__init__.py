"""fastret: image-retrieval and metric-learning losses without their huge tensors.

Every loss is a formula over per-row reductions of a pair matrix that is never stored: the same values and gradients as
the official codes, in O(N) memory, on CPU (C++), GPU (Triton) and anywhere else (PyTorch tiles).
"""

from fastret import functional, retrieval
from fastret._version import __version__
from fastret.backends.registry import available_backends, backend
from fastret.env import env_report
from fastret.losses import (
    DPQ,
    ArcFace,
    CentroidTriplet,
    CLIPLoss,
    CosFace,
    CQCLoss,
    DPQLoss,
    InfoNCE,
    InstanceSoftmax,
    InvariantSpreading,
    MultiSimilarity,
    NormalizedSoftmax,
    NTXent,
    PatchMixTargets,
    ProxyAnchor,
    ProxyNCA,
    ProxyNCAPlusPlus,
    SmoothAP,
    SoftPQ,
    SoftTargetInfoNCE,
    SoftTriple,
    SubCenterArcFace,
    SupCon,
)

__all__ = [
    "DPQ",
    "ArcFace",
    "CLIPLoss",
    "CQCLoss",
    "CentroidTriplet",
    "CosFace",
    "DPQLoss",
    "InfoNCE",
    "InstanceSoftmax",
    "InvariantSpreading",
    "MultiSimilarity",
    "NTXent",
    "NormalizedSoftmax",
    "PatchMixTargets",
    "ProxyAnchor",
    "ProxyNCA",
    "ProxyNCAPlusPlus",
    "SmoothAP",
    "SoftPQ",
    "SoftTargetInfoNCE",
    "SoftTriple",
    "SubCenterArcFace",
    "SupCon",
    "__version__",
    "available_backends",
    "backend",
    "env_report",
    "functional",
    "retrieval",
]
