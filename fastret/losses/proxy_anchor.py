"""Proxy-Anchor: every class proxy is an anchor for the rows of the batch.

Kim, Kim, Cho, Kwak: Proxy Anchor Loss for Deep Metric Learning. CVPR 2020, arXiv 2003.13911, eq. 4. For rows x_i
(B, D) of the classes y_i and proxies p_j (C, D), of which C+ have a row of their class,

    L = 1 / C+ sum over j of log(1 + sum over i with y_i = j of e^{-alpha (cos(x_i, p_j) - margin)})
      + 1 / C  sum over j of log(1 + sum over i with y_i != j of e^{alpha (cos(x_i, p_j) + margin)})

log(1 + e^a) of a log-sum-exp over each column of the B x C scores, of its positives and of its negatives: two heads
over one product.
"""

from typing import ClassVar

import torch
from torch import Tensor

from fastret.backends.pairs import Head, Indexed, PairMask
from fastret.losses.proxies import ProxyLoss, check_proxies
from fastret.losses.reduction import check_reduction
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse


def proxy_anchor(
    x: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    alpha: float | Tensor = 32.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Proxy-Anchor loss; formula at the top of this file.

    Args:
        x, proxies, labels, impl: as in ``proxy_nca``.
        margin: delta, in units of the cosine.
        alpha: scale > 0; a 0-dim tensor receives a gradient.
        reduction: "mean": each sum over proxies divided as in the formula; "sum": neither is; "none": (C,), the two
            terms of each proxy together, undivided.

    Returns:
        float32 loss (float64 for float64 rows); 0, connected to the graph, for an empty batch.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    labels = check_proxies(x, proxies, labels)
    check_reduction(reduction)
    checks.check_number(margin, "margin")
    checks.check_positive(alpha, "alpha")
    classes = torch.arange(proxies.shape[0], device=labels.device)
    # the target of labels is for the operator, which checks them where this function is traced and cannot
    heads = [
        Head(-alpha, PairMask(same=(labels, classes)), Indexed(labels), axis="column"),
        Head(alpha, PairMask(different=(labels, classes)), axis="column"),
    ]
    (positives, _), (negatives, _) = masked_lse(x, proxies, heads=heads, impl=impl)
    attract, repel = (torch.logaddexp(lse + alpha * margin, torch.zeros_like(lse)) for lse in (positives, negatives))
    if reduction == "none":
        return attract + repel
    if reduction == "sum":
        return attract.sum() + repel.sum()
    return attract.sum() / (positives > -torch.inf).sum().clamp_min(1) + repel.mean()


class ProxyAnchor(ProxyLoss):
    """Proxy-Anchor loss with its proxies: ``ProxyAnchor(nb_classes, sz_embed, margin, alpha)(X, T)``, as the official
    constructor and call have it.

    L = 1 / C+ sum_j log(1 + sum_{i: y_i = j} e^{-alpha (s_ij - margin)})
      + 1 / C sum_j log(1 + sum_{i: y_i != j} e^{alpha (s_ij + margin)}),   s_ij = cos(x_i, p_j)

    Cost: one matmul of B C D forward, three backward. Memory: O(B + C) and the gradients.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings.
        margin: delta, in units of the cosine.
        alpha: scale > 0; a 0-dim tensor receives a gradient.
        reduction, impl: as in ``fastret.functional.proxy_anchor``, and so are the errors raised.

    Attributes:
        proxies: (C, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{kim2020proxy, title={Proxy Anchor Loss for Deep Metric Learning}, "
        "author={Kim, Sungyeon and Kim, Dongwon and Cho, Minsu and Kwak, Suha}, "
        "booktitle={Conference on Computer Vision and Pattern Recognition}, year={2020}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        margin: float = 0.1,
        alpha: float | Tensor = 32.0,
        *,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__(nb_classes, sz_embed, reduction=reduction, impl=impl)
        checks.check_number(margin, "margin")
        checks.check_positive(alpha, "alpha")
        self.margin = margin
        self.alpha = alpha

    def forward(self, X: Tensor, T: Tensor) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,)."""
        return proxy_anchor(
            X, self.proxies, T, margin=self.margin, alpha=self.alpha, reduction=self.reduction, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin}, alpha={self.alpha}"
