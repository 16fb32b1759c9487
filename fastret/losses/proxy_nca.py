"""ProxyNCA: a softmax over squared distances to one learned proxy a class.

Movshovitz-Attias, Toshev, Leung, Ioffe, Singh: No Fuss Distance Metric Learning using Proxies. ICCV 2017,
arXiv 1703.07464. For rows x_i (B, D) of the classes y_i and proxies p_j (C, D), scaled after normalisation, with
D_ij = || sx x_i / ||x_i|| - sp p_j / ||p_j|| ||^2 and targets T_ij = 1 - s where j = y_i, s / (C - 1) elsewhere,

    include_positive=True, as the reference code has it:    L = mean over i of -sum_j T_ij log softmax_j(-D_ij)
    include_positive=False, as the paper has it:            L = mean over i of D_{i, y_i} + lse_{j != y_i} -D_ij

Since D_ij = sx^2 + sp^2 - 2 sx sp cos(x_i, p_j), both are softmaxes of l_ij = 2 sx sp cos(x_i, p_j), as constants drop
out: no distance is computed, and nothing is B x C or (B + C)^2. The smoothed target score is

    sum_j T_ij l_ij = (1 - eps) l_{i, y_i} + eps / C sum_j l_ij,      eps = s C / (C - 1)

sign=+1 is the softmax of +D_ij, as the reference code had it until 2020 and listings copied from it still have: then
l_ij = -2 sx sp cos(x_i, p_j). It is the same loss of the proxies -p_j: they end up opposite to their classes.
"""

from typing import ClassVar

import torch
from torch import Tensor

from fastret.backends.pairs import Head, Indexed, PairMask
from fastret.losses.proxies import ClassLabels, ProxyLoss, class_targets, softmax_losses
from fastret.losses.reduction import check_reduction
from fastret.ops import checks


def proxy_nca(
    x: Tensor,
    proxies: Tensor,
    labels: ClassLabels,
    *,
    smoothing: float = 0.0,
    scaling_x: float | Tensor = 3.0,
    scaling_p: float | Tensor = 3.0,
    include_positive: bool = True,
    sign: int = -1,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """ProxyNCA loss; formula at the top of this file.

    Args:
        x: (B, D) embeddings, of any length: they are normalised.
        proxies: (C, D), C >= 2, likewise; one of length 0 has cosine 0 with everything.
        labels: (B,) integers from 0 to C - 1; or B sequences of them, where rows have several classes: the target is
            shared equally, a row without any is not counted. Not with include_positive=False.
        smoothing: s, from 0 to (C - 1) / C, where the own class is no more wanted than any other.
        scaling_x, scaling_p: lengths sx, sp > 0 of the scaled rows and proxies; 0-dim tensors receive a gradient.
        include_positive: the own proxy is in the denominator.
        sign: -1: softmax of -D; +1: of +D, with proxies opposite to their classes.
        reduction: "mean", "sum", or "none": (B,).
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 rows); 0 for an empty batch.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected; also smoothing without
            include_positive, which has no definition.
    """
    target, valid = class_targets(x, proxies, labels)
    check_reduction(reduction)
    classes = proxies.shape[0]
    _check_options(classes, smoothing, scaling_x, scaling_p, include_positive, sign)
    mask = PairMask()
    if not include_positive:
        if not isinstance(target, Indexed):
            raise ValueError("labels: expected one class a row with include_positive=False, got sequences")
        mask = PairMask(different=(target.index, torch.arange(classes, device=x.device)))
    head = Head(
        -sign * 2 * scaling_x * scaling_p,
        mask,
        target,
        min(smoothing * classes / (classes - 1), 1.0),  # rounding may lead beyond 1
    )
    return softmax_losses(x, proxies, head, valid, reduction, impl)


def _check_options(
    classes: int,
    smoothing: float,
    scaling_x: float | Tensor,
    scaling_p: float | Tensor,
    include_positive: bool,
    sign: int,
) -> None:
    if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)):
        raise TypeError(f"smoothing: expected a number, got {type(smoothing).__name__}")
    if not 0 <= smoothing <= (classes - 1) / classes:
        raise ValueError(
            f"smoothing: expected a number from 0 to {(classes - 1) / classes:.6g}, (C - 1) / C of C = {classes} "
            f"classes, got {smoothing}"
        )
    if smoothing and not include_positive:
        raise ValueError(f"smoothing: expected 0 with include_positive=False, got {smoothing}")
    checks.check_positive(scaling_x, "scaling_x")
    checks.check_positive(scaling_p, "scaling_p")
    if sign not in (-1, 1):
        raise ValueError(f"sign: expected -1 or 1, got {sign!r}")


class ProxyNCA(ProxyLoss):
    """ProxyNCA loss with its proxies: ``ProxyNCA(nb_classes, sz_embed)(X, T)`` is the reference's call and value.

    L = mean over i of -sum_j T_ij log softmax_j(-D_ij),   D_ij = squared distance of scaled unit vectors

    Cost: three matmuls of B C D for loss and gradients (reduction="none": four). Memory: O(B + C) and the gradients,
    where the reference's listing computes the distances of all (B + C)^2 pairs.

    Proxies want a learning rate of their own, and ``init_from`` or ``init_from_loader`` before the first step.

    Args:
        nb_classes: C >= 2. sz_embed: D, the width of the embeddings; or sz_embedding, as later code calls it, whose own
            defaults are smoothing_const=0.1, scaling_x=1, scaling_p=3.
        smoothing_const: s of the targets; with include_positive=False it has to be 0.
        scaling_x, scaling_p, include_positive, sign, reduction, impl: as in ``fastret.functional.proxy_nca``, and so
            are the errors raised.

    Attributes:
        proxies: (C, D) parameter.
    """

    citation: ClassVar[str] = (
        "@inproceedings{movshovitz2017no, title={No Fuss Distance Metric Learning using Proxies}, "
        "author={Movshovitz-Attias, Yair and Toshev, Alexander and Leung, Thomas K. and Ioffe, Sergey and "
        "Singh, Saurabh}, booktitle={International Conference on Computer Vision}, year={2017}}"
    )

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int | None = None,
        smoothing_const: float = 0.0,
        scaling_x: float = 3.0,
        scaling_p: float = 3.0,
        *,
        sz_embedding: int | None = None,
        include_positive: bool = True,
        sign: int = -1,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        if (sz_embed is None) == (sz_embedding is None):
            raise ValueError(f"sz_embed: expected it or sz_embedding, got {sz_embed} and {sz_embedding}")
        width = sz_embed if sz_embedding is None else sz_embedding
        super().__init__(nb_classes, width, reduction=reduction, impl=impl)  # type: ignore[arg-type]
        _check_options(nb_classes, smoothing_const, scaling_x, scaling_p, include_positive, sign)
        self.smoothing_const = smoothing_const
        self.scaling_x = scaling_x
        self.scaling_p = scaling_p
        self.include_positive = include_positive
        self.sign = sign

    def forward(self, X: Tensor, T: ClassLabels) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,), or B sequences of classes."""
        return proxy_nca(
            X,
            self.proxies,
            T,
            smoothing=self.smoothing_const,
            scaling_x=self.scaling_x,
            scaling_p=self.scaling_p,
            include_positive=self.include_positive,
            sign=self.sign,
            reduction=self.reduction,
            impl=self.impl,
        )

    def _start(self, sums: Tensor, counts: Tensor) -> None:
        super()._start(sums, counts)
        self.proxies.mul_(-self.sign)  # where +D attracts, proxies belong opposite to their classes

    def extra_repr(self) -> str:
        names = ("smoothing_const", "scaling_x", "scaling_p", "include_positive", "sign")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in names)])
