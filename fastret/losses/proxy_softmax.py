"""Softmax over cosines to one learned proxy a class: normalised softmax and ProxyNCA++, which differ in name only.

Zhai, Wu: Classification is a Strong Baseline for Deep Metric Learning. BMVC 2019, arXiv 1811.12649. For rows
x_i (B, D) of the classes y_i and proxies p_j (C, D),

    NormalizedSoftmax = mean over i of lse_j l_ij - l_{i, y_i},      l_ij = cos(x_i, p_j) / temperature

Teh, DeVries, Taylor: ProxyNCA++: Revisiting and Revitalizing Proxy Neighborhood Component Analysis. ECCV 2020,
arXiv 2004.01113, "prob" in its code: the softmax of -D_ij, squared distances of rows and proxies of length
``scale``; in the paper's terms, of unit rows at temperature 1 / scale^2 (3: 1/9). Since D_ij = 2 scale^2 (1 - cos),

    ProxyNCA++ = mean over i of lse_j l_ij - l_{i, y_i},             l_ij = 2 scale^2 cos(x_i, p_j)

The rest of ProxyNCA++ is training: max pooling, layer normalisation, batches balanced by class, fast proxies.
"""

from typing import ClassVar

from torch import Tensor

from fastret.backends.pairs import Head
from fastret.losses.proxies import ClassLabels, ProxyLoss, class_targets, softmax_losses
from fastret.losses.proxy_nca import proxy_nca
from fastret.losses.reduction import check_reduction, over_temperature
from fastret.ops import checks


def normalized_softmax(
    x: Tensor,
    proxies: Tensor,
    labels: ClassLabels,
    *,
    temperature: float | Tensor = 0.05,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of cosines over a temperature; formula at the top of this file.

    Args:
        x, proxies, labels, reduction, impl: as in ``proxy_nca``.
        temperature: > 0; a 0-dim tensor receives a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    target, valid = class_targets(x, proxies, labels)
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    head = Head(over_temperature(temperature, x), target=target)
    return softmax_losses(x, proxies, head, valid, reduction, impl)


def proxy_nca_plus_plus(
    x: Tensor,
    proxies: Tensor,
    labels: ClassLabels,
    *,
    scale: float | Tensor = 3.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """ProxyNCA++ loss; formula at the top of this file.

    Args:
        x, proxies, labels, reduction, impl: as in ``proxy_nca``.
        scale: length > 0 of rows and proxies; a 0-dim tensor receives a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_positive(scale, "scale")
    return proxy_nca(x, proxies, labels, scaling_x=scale, scaling_p=scale, reduction=reduction, impl=impl)


class NormalizedSoftmax(ProxyLoss):
    """Normalised softmax loss with its proxies: ``NormalizedSoftmax(nb_classes, sz_embed)(X, T)``.

    L = mean over i of lse_j(cos(x_i, p_j) / temperature) - cos(x_i, p_{y_i}) / temperature

    Cost: three matmuls of B C D for loss and gradients (reduction="none": four). Memory: O(B + C) and the gradients.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings.
        temperature: > 0; a 0-dim tensor receives a gradient.
        reduction, impl: as in ``fastret.functional.normalized_softmax``, and so are the errors raised.

    Attributes:
        proxies: (C, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{zhai2019classification, "
        "title={Classification is a Strong Baseline for Deep Metric Learning}, author={Zhai, Andrew and Wu, Hao-Yu}, "
        "booktitle={British Machine Vision Conference}, year={2019}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        temperature: float | Tensor = 0.05,
        *,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__(nb_classes, sz_embed, reduction=reduction, impl=impl)
        checks.check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, X: Tensor, T: ClassLabels) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,), or B sequences of classes."""
        return normalized_softmax(
            X, self.proxies, T, temperature=self.temperature, reduction=self.reduction, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


class ProxyNCAPlusPlus(ProxyLoss):
    """ProxyNCA++ loss with its proxies: ``ProxyNCAPlusPlus(nb_classes, sz_embed, scale)(X, T)`` is the official call.

    L = mean over i of lse_j(2 scale^2 cos(x_i, p_j)) - 2 scale^2 cos(x_i, p_{y_i})

    Cost: three matmuls of B C D for loss and gradients (reduction="none": four). Memory: O(B + C) and the gradients,
    where the official code computes the distances of all (B + C)^2 pairs.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings.
        scale: length of rows and proxies; the paper's temperature is 1 / scale^2.
        reduction, impl: as in ``fastret.functional.proxy_nca_plus_plus``, and so are the errors raised.

    Attributes:
        proxies: (C, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{teh2020proxynca, "
        "title={ProxyNCA++: Revisiting and Revitalizing Proxy Neighborhood Component Analysis}, "
        "author={Teh, Eu Wern and DeVries, Terrance and Taylor, Graham W.}, "
        "booktitle={European Conference on Computer Vision}, year={2020}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        scale: float | Tensor = 3.0,
        *,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__(nb_classes, sz_embed, reduction=reduction, impl=impl)
        checks.check_positive(scale, "scale")
        self.scale = scale

    def forward(self, X: Tensor, T: ClassLabels) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,), or B sequences of classes."""
        return proxy_nca_plus_plus(X, self.proxies, T, scale=self.scale, reduction=self.reduction, impl=self.impl)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"
