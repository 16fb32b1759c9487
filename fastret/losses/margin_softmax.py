"""Softmax over cosines to class proxies, with a margin on the own class: CosFace and ArcFace.

Wang et al.: CosFace: Large Margin Cosine Loss for Deep Face Recognition. CVPR 2018, arXiv 1801.09414, eq. 4.
Deng, Guo, Xue, Zafeiriou: ArcFace: Additive Angular Margin Loss for Deep Face Recognition. CVPR 2019,
arXiv 1801.07698, eq. 3. For rows x_i (B, D) of the classes y_i, proxies p_j (C, D) and c_ij = cos(x_i, p_j),

    L = mean over i of log(e^{z_i} + sum over j != y_i of e^{scale c_ij}) - z_i,      z_i = scale phi(c_{i, y_i})

    CosFace: phi(c) = c - margin
    ArcFace: phi(c) = cos(theta + margin) = c cos(margin) - sin(theta) sin(margin),   c = cos(theta)

ArcFace where theta + margin > pi, past which cos would rise again: phi(c) = c - margin sin(margin), as insightface
(easy_margin=False) and pytorch-metric-learning have it; phi jumps there. Where 1 - c^2 is below the resolution of the
dtype, row and proxy have no direction from each other: sin(theta) is then 0, with slope 0, and gradients stay finite.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fastret.backends.pairs import Head, Indexed, PairMask
from fastret.losses.proxies import ProxyLoss, check_proxies
from fastret.losses.reduction import check_reduction, reduce_valid
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse


def cos_face(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.35,
    scale: float | Tensor = 64.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """CosFace loss; formula at the top of this file.

    Args:
        x, proxies, labels, reduction, impl: as in ``proxy_nca``.
        margin: >= 0, in units of the cosine.
        scale: > 0; a 0-dim tensor receives a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    check_margin(margin, math.inf)
    return _margin_softmax(x, proxies, labels, lambda c: c - margin, scale, reduction, impl)


def arc_face(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    scale: float | Tensor = 64.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """ArcFace loss; formula at the top of this file.

    Args:
        x, proxies, labels, reduction, impl: as in ``proxy_nca``.
        margin: from 0 to below pi, in radians (pytorch-metric-learning's is in degrees).
        scale: > 0; a 0-dim tensor receives a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    check_margin(margin, math.pi)
    return _margin_softmax(x, proxies, labels, lambda c: wider_angle(c, margin), scale, reduction, impl)


def _margin_softmax(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    phi: Callable[[Tensor], Tensor],
    scale: float | Tensor,
    reduction: str,
    impl: str | None,
) -> Tensor:
    labels = check_proxies(x, proxies, labels)
    checks.check_positive(scale, "scale")
    check_reduction(reduction)
    losses = margin_losses(x, proxies, labels, phi, scale, impl)
    return reduce_valid(losses, None, reduction)


def margin_losses(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    phi: Callable[[Tensor], Tensor],
    scale: float | Tensor,
    impl: str | None,
    *,
    centers: int = 1,
    center_temperature: float | None = None,
) -> Tensor:
    """(B,) losses of checked arguments; with several centres a class, proxies are (C K, D) and c_ij is what
    ``fastret.ops.masked_lse`` reduces their cosines to."""
    classes = torch.arange(proxies.shape[0] // centers, device=labels.device)
    head = Head(scale, PairMask(different=(labels, classes)), Indexed(labels))
    ((lse, own),) = masked_lse(
        x, proxies, heads=[head], centers=centers, center_temperature=center_temperature, impl=impl
    )
    z = scale * phi(own / scale)
    return torch.logaddexp(lse - z, torch.zeros_like(z))


def wider_angle(c: Tensor, margin: float) -> Tensor:
    """ArcFace's phi."""
    square = (1 - c) * (1 + c)
    near = square.detach() < torch.finfo(c.dtype).eps
    sine = torch.where(near, 0, torch.where(near, 1, square).sqrt())
    return torch.where(
        c.detach() < -math.cos(margin),
        c - margin * math.sin(margin),
        c * math.cos(margin) - sine * math.sin(margin),
    )


def check_margin(margin: float, below: float) -> None:
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"margin: expected a number, got {type(margin).__name__}")
    if not 0 <= margin < below:
        raise ValueError(f"margin: expected a number from 0 to below {below:.6g}, got {margin}")


class CosFace(ProxyLoss):
    """CosFace loss with its proxies: ``CosFace(nb_classes, sz_embed)(X, T)``.

    L = mean over i of log(e^{z_i} + sum over j != y_i of e^{scale cos(x_i, p_j)}) - z_i,
    z_i = scale (cos(x_i, p_{y_i}) - margin)

    Cost: one matmul of B C D forward, three backward. Memory: O(B + C) and the gradients.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings.
        margin: >= 0, in units of the cosine.
        scale: > 0; a 0-dim tensor receives a gradient.
        reduction, impl: as in ``fastret.functional.cos_face``, and so are the errors raised.

    Attributes:
        proxies: (C, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{wang2018cosface, title={CosFace: Large Margin Cosine Loss for Deep Face Recognition}, "
        "author={Wang, Hao and Wang, Yitong and Zhou, Zheng and Ji, Xing and Gong, Dihong and Zhou, Jingchao and "
        "Li, Zhifeng and Liu, Wei}, booktitle={Conference on Computer Vision and Pattern Recognition}, year={2018}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        margin: float = 0.35,
        scale: float | Tensor = 64.0,
        *,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__(nb_classes, sz_embed, reduction=reduction, impl=impl)
        check_margin(margin, math.inf)
        checks.check_positive(scale, "scale")
        self.margin = margin
        self.scale = scale

    def forward(self, X: Tensor, T: Tensor) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,)."""
        return cos_face(
            X, self.proxies, T, margin=self.margin, scale=self.scale, reduction=self.reduction, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin}, scale={self.scale}"


class ArcFace(ProxyLoss):
    """ArcFace loss with its proxies: ``ArcFace(nb_classes, sz_embed)(X, T)``.

    L = mean over i of log(e^{z_i} + sum over j != y_i of e^{scale cos(x_i, p_j)}) - z_i,
    z_i = scale cos(theta_i + margin), theta_i the angle between x_i and p_{y_i}

    Cost: one matmul of B C D forward, three backward. Memory: O(B + C) and the gradients.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings.
        margin: from 0 to below pi, in radians.
        scale: > 0; a 0-dim tensor receives a gradient.
        reduction, impl: as in ``fastret.functional.arc_face``, and so are the errors raised.

    Attributes:
        proxies: (C, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{deng2019arcface, "
        "title={ArcFace: Additive Angular Margin Loss for Deep Face Recognition}, "
        "author={Deng, Jiankang and Guo, Jia and Xue, Niannan and Zafeiriou, Stefanos}, "
        "booktitle={Conference on Computer Vision and Pattern Recognition}, year={2019}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        margin: float = 0.5,
        scale: float | Tensor = 64.0,
        *,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__(nb_classes, sz_embed, reduction=reduction, impl=impl)
        check_margin(margin, math.pi)
        checks.check_positive(scale, "scale")
        self.margin = margin
        self.scale = scale

    def forward(self, X: Tensor, T: Tensor) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,)."""
        return arc_face(
            X, self.proxies, T, margin=self.margin, scale=self.scale, reduction=self.reduction, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin}, scale={self.scale}"
