"""Invariant and spreading instance features: each image recognised by its other view, and by none of the others.

Ye, Zhang, Yuen, Chang: Unsupervised Embedding Learning via Invariant and Spreading Instance Feature. CVPR 2019,
arXiv 1904.03436, as its code has it. For x (2b, D) = [view 1; view 2], pair(i) = (i + b) mod 2b, logits
a_ij = <x_i, x_j> / T, the negatives j of i being all but i and pair(i), and the weight m >= 1 of the negatives,

    Den_i = m sum over negatives of e^{a_ij} + e^{a_i,pair(i)},      P_ij = e^{a_ij} / Den_i
    L = mean over i of -log P_{i,pair(i)} - m sum over negatives j of log(1 - P_ij)

With z_i = lse over negatives of a_ij + log m - a_i,pair(i): -log P_{i,pair(i)} = log(1 + e^{z_i}), and
log Den_i is a_i,pair(i) above that. Two passes: one head gives lse and a_i,pair(i), then log(1 - P) is summed.

The official code takes columns as constants, the pair's too: only rows get a gradient. A P_ij that rounds to 1 counts
as 1 less the resolution of the dtype (``fastret.backends.phi``), where the official code has infinity.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends.pairs import Head, PairMask, Shifted
from fastret.losses.reduction import check_reduction, log1p_exp, over_temperature, reduce_valid
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.pair_sums import pair_sums


def invariant_spreading(
    embeddings: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negative_weight: float = 1.0,
    detach_columns: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Invariant and spreading instance loss; formula at the top of this file.

    Args:
        embeddings: (2b, D), the b images' second views below their first; of one image alone the loss is 0.
        temperature: T > 0, in units of the cosine; a 0-dim tensor receives a gradient.
        negative_weight: m >= 1: below that a P_ij may exceed 1, and log(1 - P_ij) has no value.
        detach_columns: gradients reach rows only, as in the official code; False: rows and columns.
        normalize: cosine scores; False: dot products of the rows as given, as in the official code.
        reduction: "mean" over rows, "sum", or "none": (2b,).
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 embeddings); 0 for an empty batch.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(embeddings, "embeddings")
    _check_settings(temperature, negative_weight, reduction)
    n = embeddings.shape[0]
    if n % 2:
        raise ValueError(f"embeddings: expected an even number of rows, two views of every image, got {n}")
    columns = embeddings.detach() if detach_columns else None
    image = torch.arange(n, device=embeddings.device) % max(n // 2, 1)
    negatives = PairMask(distinct=(image, image))
    scale = over_temperature(temperature, embeddings)
    head = Head(scale, negatives, Shifted(n // 2, max(n, 1)))
    ((lse, pair),) = masked_lse(embeddings, columns, heads=[head], normalize=normalize, impl=impl)
    recognised = log1p_exp(lse + math.log(negative_weight) - pair)
    spread = pair_sums(
        embeddings,
        columns,
        phi="log1m_exp",
        row_stat=pair + recognised,
        scale=scale,
        mask=negatives,
        normalize=normalize,
        impl=impl,
    )
    losses = recognised - negative_weight * spread
    return reduce_valid(losses, None, reduction)


def _check_settings(temperature: float | Tensor, negative_weight: float, reduction: str) -> None:
    checks.check_positive(temperature, "temperature")
    checks.check_number(negative_weight, "negative_weight")
    if negative_weight < 1:
        raise ValueError(f"negative_weight: expected at least 1, got {negative_weight}")
    check_reduction(reduction)


class InvariantSpreading(nn.Module):
    """Invariant and spreading instance loss: ``InvariantSpreading(negM, T, batchSize)(x, targets)`` is the official
    BatchCriterion's call and value, for x (2b, D) = [view 1; view 2].

    L = mean over i of -log P_{i,pair(i)} - negM sum over j not in {i, pair(i)} of log(1 - P_ij)
    P_ij = e^{a_ij} / (e^{a_{i,pair(i)}} + negM sum over k not in {i, pair(i)} of e^{a_ik}),   a = cosine / T

    Cost: two matmuls of 2b 2b D forward, four backward (six with detach_columns=False). Memory: O(b), nothing 2b x 2b.

    Args:
        negM: weight >= 1 of the negatives. T: temperature > 0; a 0-dim tensor receives a gradient.
        batchSize: accepted as the official code has it; nothing depends on it.
        detach_columns, normalize, reduction, impl: as in ``fastret.functional.invariant_spreading``, and so are the
            errors raised.
    """

    citation: ClassVar[str] = (
        "@inproceedings{ye2019unsupervised, "
        "title={Unsupervised Embedding Learning via Invariant and Spreading Instance Feature}, "
        "author={Ye, Mang and Zhang, Xu and Yuen, Pong C. and Chang, Shih-Fu}, "
        "booktitle={Conference on Computer Vision and Pattern Recognition}, year={2019}}"
    )

    def __init__(
        self,
        negM: float = 1,
        T: float | Tensor = 0.1,
        batchSize: int | None = None,
        *,
        detach_columns: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_count(batchSize, "batchSize")
        _check_settings(T, negM, reduction)
        self.negative_weight = negM
        self.temperature = T
        self.detach_columns = detach_columns
        self.normalize = normalize
        self.reduction = reduction
        self.impl = impl

    def forward(self, x: Tensor, targets: object = None) -> Tensor:
        """Loss of ``x`` (2b, D); ``targets`` are accepted as the official code has them, and not looked at."""
        return invariant_spreading(
            x,
            temperature=self.temperature,
            negative_weight=self.negative_weight,
            detach_columns=self.detach_columns,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"negM={self.negative_weight}, T={self.temperature}, detach_columns={self.detach_columns}, "
            f"reduction={self.reduction!r}"
        )
