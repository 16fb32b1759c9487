"""Softmax losses with several learned centres a class: SoftTriple and sub-center ArcFace.

Qian, Shang, Sun, Hu, Li, Jin: SoftTriple Loss: Deep Metric Learning Without Triplet Sampling. ICCV 2019,
arXiv 1909.05235. For rows x_i (B, D) of the classes y_i, centres w_ck (C, K, D) and c_ick = cos(x_i, w_ck),

    S_ic = sum over k of q_k c_ick,    q = softmax over k of c_ick / gamma
    L = mean over i of log(e^{z_i} + sum over c != y_i of e^{la S_ic}) - z_i + tau R,    z_i = la (S_{i, y_i} - margin)
    R = sum over classes c and t > s of |u_cs - u_ct| / (C K (K - 1)),                   u the unit centres

R draws the centres of a class together where one is enough. |u_s - u_t| = sqrt(2 - 2 cos); the official code has
sqrt(2 + 1e-5 - 2 cos), here coinciding centres have distance 0, with slope 0.

Deng, Guo, Liu, Gong, Zafeiriou: Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces.
ECCV 2020: ArcFace (``fastret.losses.margin_softmax``, also for angles past pi - margin) of each class' nearest centre,

    L = mean over i of log(e^{z_i} + sum over c != y_i of e^{scale S_ic}) - z_i,    S_ic = max over k of c_ick,
    z_i = scale cos(acos S_{i, y_i} + margin)

A row then moves one centre of each class, the first of equals: noise gathers at the others.
"""

import math
from typing import ClassVar

from torch import Tensor

from fastret.backends import registry
from fastret.losses.margin_softmax import check_margin, margin_losses, wider_angle
from fastret.losses.proxies import ProxyLoss, check_proxies
from fastret.losses.reduction import check_reduction, reduce_valid
from fastret.ops import checks
from fastret.ops.center_distances import center_distances


def soft_triple(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    la: float | Tensor = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    tau: float = 0.2,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """SoftTriple loss; formula at the top of this file.

    Args:
        x: (B, D) embeddings, of any length: they are normalised.
        proxies: (C, K, D), C >= 2, K >= 1 centres a class, likewise.
        labels: (B,) integers from 0 to C - 1.
        la: scale > 0; a 0-dim tensor receives a gradient.
        gamma: temperature > 0 of the softmax over the centres of a class.
        margin: >= 0, in units of the cosine.
        tau: weight >= 0 of R, which every row's loss has; 0: R is not computed.
        reduction: "mean", "sum", or "none": (B,).
        impl: "reference", "tiled" or "cpu"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 rows); 0 for an empty batch.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
        NotImplementedError: impl="triton", which has no sub-centres.
    """
    labels = _checked(x, proxies, labels, reduction)
    _check_soft_triple(la, gamma, margin, tau)
    classes, count, _ = proxies.shape
    rows = proxies.flatten(0, 1)
    regulariser: float | Tensor = 0.0
    if tau and count > 1:
        chosen = registry.resolve("masked_lse", x.device, x.dtype, impl, ("centers",))
        rows, distances = center_distances(rows, count, impl=chosen)
        regulariser = tau * distances.sum() / (classes * count * (count - 1))
    losses = margin_losses(x, rows, labels, lambda s: s - margin, la, impl, centers=count, center_temperature=gamma)
    losses = losses + regulariser
    return reduce_valid(losses, None, reduction)


def sub_center_arc_face(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    scale: float | Tensor = 64.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Sub-center ArcFace loss; formula at the top of this file.

    Args:
        x, proxies, labels, reduction, impl: as in ``soft_triple``.
        margin: from 0 to below pi, in radians (pytorch-metric-learning's is in degrees).
        scale: > 0; a 0-dim tensor receives a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
        NotImplementedError: impl="triton", which has no sub-centres.
    """
    labels = _checked(x, proxies, labels, reduction)
    check_margin(margin, math.pi)
    checks.check_positive(scale, "scale")
    rows, count = proxies.flatten(0, 1), proxies.shape[1]
    losses = margin_losses(x, rows, labels, lambda s: wider_angle(s, margin), scale, impl, centers=count)
    return reduce_valid(losses, None, reduction)


def _checked(x: Tensor, proxies: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Labels as int64."""
    if not isinstance(proxies, Tensor):
        raise TypeError(f"proxies: expected a tensor of shape (classes, centers, width), got {type(proxies).__name__}")
    if proxies.dim() != 3 or proxies.shape[1] == 0:
        raise ValueError(f"proxies: expected shape (classes, centers, width), got {tuple(proxies.shape)}")
    check_reduction(reduction)
    return check_proxies(x, proxies[:, 0], labels)


def _check_soft_triple(la: float | Tensor, gamma: float, margin: float, tau: float) -> None:
    checks.check_positive(la, "la")
    checks.check_number(gamma, "gamma")
    checks.check_positive(gamma, "gamma")
    check_margin(margin, math.inf)
    checks.check_number(tau, "tau")
    if tau < 0:
        raise ValueError(f"tau: expected a number >= 0, got {tau}")


class SoftTriple(ProxyLoss):
    """SoftTriple loss with its centres: ``SoftTriple(nb_classes, sz_embed, centers_per_class)(X, T)``.

    L = mean over i of log(e^{z_i} + sum over c != y_i of e^{la S_ic}) - z_i + tau R,   z_i = la (S_{i, y_i} - margin),
    S_ic the mean of cos(x_i, w_ck) over k under softmax(cos / gamma), R the mean distance within classes, halved

    Cost: one matmul of B C K D forward, three backward, and C K^2 D for R. Memory: O(B + C) and the gradients, where
    the official code keeps B x C x K several times, and for R the cosines of all (C K)^2 pairs of centres.

    Centres want a learning rate of their own (the official one is 100 times the network's), and ``init_from`` or
    ``init_from_loader`` before the first step.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings.
        centers_per_class: K >= 1.
        la, gamma, margin, tau, reduction, impl: as in ``fastret.functional.soft_triple``, and so are the errors raised.

    Attributes:
        proxies: (C, K, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{qian2019softtriple, "
        "title={SoftTriple Loss: Deep Metric Learning Without Triplet Sampling}, "
        "author={Qian, Qi and Shang, Lei and Sun, Baigui and Hu, Juhua and Li, Hao and Jin, Rong}, "
        "booktitle={International Conference on Computer Vision}, year={2019}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        centers_per_class: int = 10,
        la: float | Tensor = 20.0,
        gamma: float = 0.1,
        margin: float = 0.01,
        *,
        tau: float = 0.2,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__(nb_classes, sz_embed, centers=centers_per_class, reduction=reduction, impl=impl)
        _check_soft_triple(la, gamma, margin, tau)
        self.la = la
        self.gamma = gamma
        self.margin = margin
        self.tau = tau

    def forward(self, X: Tensor, T: Tensor) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,)."""
        return soft_triple(
            X,
            self.proxies,
            T,
            la=self.la,
            gamma=self.gamma,
            margin=self.margin,
            tau=self.tau,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        names = ("la", "gamma", "margin", "tau")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in names)])


class SubCenterArcFace(ProxyLoss):
    """Sub-center ArcFace loss with its centres: ``SubCenterArcFace(nb_classes, sz_embed)(X, T)``.

    L = mean over i of log(e^{z_i} + sum over c != y_i of e^{scale S_ic}) - z_i,
    S_ic = max over k of cos(x_i, w_ck), z_i = scale cos(acos S_{i, y_i} + margin)

    Cost: one matmul of B C K D forward, three backward. Memory: O(B + C) and the gradients.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings.
        margin: from 0 to below pi, in radians.
        scale: > 0; a 0-dim tensor receives a gradient.
        centers_per_class: K >= 1.
        reduction, impl: as in ``fastret.functional.sub_center_arc_face``, and so are the errors raised.

    Attributes:
        proxies: (C, K, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{deng2020subcenter, "
        "title={Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces}, "
        "author={Deng, Jiankang and Guo, Jia and Liu, Tongliang and Gong, Mingming and Zafeiriou, Stefanos}, "
        "booktitle={European Conference on Computer Vision}, year={2020}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        margin: float = 0.5,
        scale: float | Tensor = 64.0,
        centers_per_class: int = 3,
        *,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__(nb_classes, sz_embed, centers=centers_per_class, reduction=reduction, impl=impl)
        check_margin(margin, math.pi)
        checks.check_positive(scale, "scale")
        self.margin = margin
        self.scale = scale

    def forward(self, X: Tensor, T: Tensor) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,)."""
        return sub_center_arc_face(
            X, self.proxies, T, margin=self.margin, scale=self.scale, reduction=self.reduction, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin}, scale={self.scale}"
