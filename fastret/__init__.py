"""fastret: image-retrieval and metric-learning losses without their huge tensors.

Every loss is a formula over per-row reductions of a pair matrix that is never stored: the same values and gradients as
the official codes, in O(N) memory, on CPU (C++), GPU (Triton) and anywhere else (PyTorch tiles).
"""

from fastret import functional, retrieval
from fastret._version import __version__
from fastret.backends.registry import available_backends, backend
from fastret.env import env_report
from fastret.losses import (
    NPID,
    ArcFace,
    CentroidTriplet,
    CLIPLoss,
    CosFace,
    CQCLoss,
    InfoNCE,
    InstanceSoftmax,
    InvariantSpreading,
    LinearAverage,
    MemoryBank,
    MultiSimilarity,
    NCEAverage,
    NCECriterion,
    NCELoss,
    NormalizedSoftmax,
    NTXent,
    PatchMixLoss,
    PatchMixTargets,
    ProxyAnchor,
    ProxyNCA,
    ProxyNCAPlusPlus,
    SmoothAP,
    SoftTargetInfoNCE,
    SoftTriple,
    SubCenterArcFace,
    SupCon,
)

__all__ = [
    "NPID",
    "ArcFace",
    "CLIPLoss",
    "CQCLoss",
    "CentroidTriplet",
    "CosFace",
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
    "ProxyAnchor",
    "ProxyNCA",
    "ProxyNCAPlusPlus",
    "SmoothAP",
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
