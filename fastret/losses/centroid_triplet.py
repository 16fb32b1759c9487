"""Centroid bound on the triplet loss: distances to fixed class centroids instead of to N^2 other rows.

Do, Tran, Reid, Kumar, Hoang, Carneiro: A Theoretically Sound Upper Bound on the Triplet Loss for Improving the
Efficiency of Deep Distance Metric Learning. CVPR 2019, arXiv 1904.08720. For rows x_i (B, D) of the classes y_i and
centroids c_j (C, D), with d_ij = || x_i - c_j ||, not squared, without margin or hinge,

    L = mean over i of d_{i, y_i} - 1 / (3 (C - 1)) sum over j != y_i of d_ij

The paper multiplies the sum over i with G = 3 (C - 1) (N / C - 1) N / C of N rows in all, which only rescales it, and
keeps the centroids fixed: the vertices of a simplex (C unit vectors, D >= C), or centres of a clustering.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends import phi
from fastret.backends.pairs import Head, Indexed, PairMask
from fastret.backends.rows import accumulation_dtype
from fastret.losses.proxies import check_proxies
from fastret.losses.reduction import check_reduction, reduce_valid, row_weights
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.masked_lse_sum import masked_lse_sum
from fastret.ops.pair_dot import pair_dot


def centroid_triplet(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Centroid bound on the triplet loss; formula at the top of this file.

    Args:
        x: (B, D) embeddings.
        centroids: (C, D), C >= 2; they receive a gradient where they require one.
        labels: (B,) integers from 0 to C - 1.
        normalize: distances of unit rows and unit centroids, sqrt(2 - 2 cosine); False: as given.
        reduction: "mean", "sum", or "none": (B,).
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 rows), negative where rows lie much nearer to their own centroid than to the
        others; 0 for an empty batch. A distance of 0, to the resolution of the dtype, has gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    labels = check_proxies(x, centroids, labels, "centroids")
    check_reduction(reduction)
    classes = centroids.shape[0]
    wide = accumulation_dtype(torch.promote_types(x.dtype, centroids.dtype))
    # l_ij = 2 <x_i, c_j> - ||x_i||^2 - ||c_j||^2 = -d_ij^2
    if normalize:
        row_bias, column_bias = x.new_full((x.shape[0],), -2, dtype=wide), None
    else:
        row_bias, column_bias = (-rows.to(wide).square().sum(1) for rows in (x, centroids))
    others = PairMask(different=(labels, torch.arange(classes, device=labels.device)))
    head = Head(2.0, others, Indexed(labels), row_bias=row_bias, column_bias=column_bias, reduce="distance")
    share = 1 / (3 * (classes - 1))
    if reduction == "none" or centroids.requires_grad:
        ((far, own),) = masked_lse(x, centroids, heads=[head], normalize=normalize, impl=impl)
        return reduce_valid(phi.value("distance", own) - share * far, None, reduction)
    # fixed centroids: a sum of distances has its gradient in forward, that of the few own ones comes from their list
    weight = row_weights(x, None, reduction)
    far = masked_lse_sum(
        x, centroids, head=replace(head, target=None), row_weight=share * weight, normalize=normalize, impl=impl
    )
    row = torch.arange(x.shape[0], device=x.device)
    own = 2 * pair_dot(x, centroids, row, labels, normalize=normalize, impl=impl) + row_bias
    own = own if column_bias is None else own + column_bias[labels]
    return (weight * phi.value("distance", own)).sum() - far


class CentroidTriplet(nn.Module):
    """Centroid bound on the triplet loss: ``CentroidTriplet(centroids)(X, T)``.

    L = mean over i of || x_i - c_{y_i} || - 1 / (3 (C - 1)) sum over j != y_i of || x_i - c_j ||

    Cost: two matmuls of B C D, both in forward (reduction="none": three). Memory: O(B + C) and the gradient of X.

    Args:
        centroids: (C, D), C >= 2, kept as a buffer; ``torch.eye(C, D)`` are the vertices of a simplex.
        normalize, reduction, impl: as in ``fastret.functional.centroid_triplet``, and so are the errors raised.
    """

    centroids: Tensor
    citation: ClassVar[str] = (
        "@inproceedings{do2019theoretically, title={A Theoretically Sound Upper Bound on the Triplet Loss for "
        "Improving the Efficiency of Deep Distance Metric Learning}, author={Do, Thanh-Toan and Tran, Toan and "
        "Reid, Ian and Kumar, Vijay and Hoang, Tuan and Carneiro, Gustavo}, "
        "booktitle={Conference on Computer Vision and Pattern Recognition}, year={2019}}"
    )

    def __init__(
        self, centroids: Tensor, *, normalize: bool = True, reduction: str = "mean", impl: str | None = None
    ) -> None:
        super().__init__()
        checks.check_rows(centroids, "centroids")
        if centroids.shape[0] < 2:
            raise ValueError(f"centroids: expected at least 2 rows, one a class, got {centroids.shape[0]}")
        check_reduction(reduction)
        self.register_buffer("centroids", centroids.detach().clone())
        self.normalize = normalize
        self.reduction = reduction
        self.impl = impl

    def forward(self, X: Tensor, T: Tensor) -> Tensor:
        """Loss of embeddings ``X`` (B, D) of the classes ``T`` (B,)."""
        return centroid_triplet(
            X, self.centroids, T, normalize=self.normalize, reduction=self.reduction, impl=self.impl
        )

    def extra_repr(self) -> str:
        classes, width = self.centroids.shape
        return f"{classes}, {width}, normalize={self.normalize}, reduction={self.reduction!r}"
