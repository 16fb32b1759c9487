"""SupCon: every other row of an anchor's class is its positive, all other rows are candidates.

Khosla et al.: Supervised Contrastive Learning. NeurIPS 2020, arXiv 2004.11362, eq. 2 (L_out). With logits
l_ij = <x_i, x_j> / tau, the candidates j != i and the positives P_i among them,

    L = mean over i with positives of lse_{j != i} l_ij - 1 / |P_i| sum over p in P_i of l_ip

and with ``matryoshka`` the sum of that over prefixes of the features (Kusupati et al., fastret.losses.matryoshka).
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastret.backends.pairs import Head, Masked, PairMask
from fastret.backends.rows import accumulation_dtype
from fastret.backends.segments import label_segments
from fastret.losses.matryoshka import check_matryoshka, prefixes, weighted
from fastret.losses.reduction import check_reduction, over_temperature, reduce_valid, row_weights
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.masked_lse_sum import masked_lse_sum


def sup_con(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    matryoshka: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Supervised contrastive loss; formula at the top of this file.

    Args:
        embeddings: (N, D) anchors.
        labels: (N,) integers, any values in any order.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        ref_emb, ref_labels: (M, D), (M,) a gallery, of which nothing is excluded; None: the batch, without the anchor.
        normalize: cosine scores; False: dot products of the rows as given.
        matryoshka: widths w_1 < ... < w_K, at most D: the sum of the losses on the first w_k features (of prefixes over
            their own norms where normalised). None: all features.
        matryoshka_weights: (K,) positive factors of these losses; None: 1 each.
        reduction: "mean" over anchors with a positive, "sum", or "none": (N,), summed over widths, 0 for an
            anchor without a positive.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 embeddings); 0, connected to the graph, where no anchor has a positive.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_labelled(embeddings, labels, ref_emb, ref_labels)
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    itself = ref_labels is None
    gallery_labels = labels if ref_labels is None else ref_labels
    count = label_segments(labels, ref_labels).count - int(itself)
    candidates = PairMask(offset=0) if itself else PairMask()
    weight = 1 / count.clamp_min(1).to(accumulation_dtype(embeddings.dtype))
    target = Masked(candidates & PairMask(same=(labels, gallery_labels)), weight)
    widths, weights = prefixes(matryoshka, matryoshka_weights, embeddings.shape[1])
    scale = over_temperature(temperature, embeddings)
    heads = [Head(scale, candidates, target, width=w) for w in widths]
    valid = count > 0
    if reduction != "none" and len(heads) == 1:
        weight = row_weights(embeddings, valid, reduction) * weights[0]
        return masked_lse_sum(embeddings, ref_emb, head=heads[0], row_weight=weight, normalize=normalize, impl=impl)
    results = masked_lse(embeddings, ref_emb, heads=heads, normalize=normalize, impl=impl)
    # an anchor that is alone in its batch has lse = -inf, which times 0 would be NaN
    losses = weighted([lse.masked_fill(lse.isneginf(), 0) - t for lse, t in results], weights)
    return reduce_valid(losses, valid, reduction)


class SupCon(nn.Module):
    """Supervised contrastive loss, as pytorch-metric-learning's SupConLoss: ``SupCon(0.1)(embeddings, labels)``.

    L = mean over anchors i with positives P_i of lse_{j != i} l_ij - mean over p in P_i of l_ip,   l = cosine / tau

    Cost: three matmuls of N M D for loss and gradients. Memory: O(N + M) and the gradients; nothing is N x M.
    K widths of ``matryoshka`` cost four matmuls of N M w_K in all in C++ (half of that for a batch by itself), and K
    exponentials a pair in each direction; a call a width costs three of N M sum(w).

    Args:
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        normalize, matryoshka, matryoshka_weights, reduction, impl: as in ``fastret.functional.sup_con``, and so are
            the errors raised.
    """

    citation: ClassVar[str] = (
        "@inproceedings{khosla2020supervised, title={Supervised Contrastive Learning}, "
        "author={Khosla, Prannay and Teterwak, Piotr and Wang, Chen and Sarna, Aaron and Tian, Yonglong and "
        "Isola, Phillip and Maschinot, Aaron and Liu, Ce and Krishnan, Dilip}, "
        "booktitle={Advances in Neural Information Processing Systems}, year={2020}}"
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        normalize: bool = True,
        matryoshka: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive(temperature, "temperature")
        check_reduction(reduction)
        check_matryoshka(matryoshka, matryoshka_weights)
        self.temperature = temperature
        self.normalize = normalize
        self.matryoshka = matryoshka
        self.matryoshka_weights = matryoshka_weights
        self.reduction = reduction
        self.impl = impl

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``embeddings`` (N, D) with ``labels`` (N,), in their batch or against a gallery."""
        return sup_con(
            embeddings,
            labels,
            temperature=self.temperature,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            normalize=self.normalize,
            matryoshka=self.matryoshka,
            matryoshka_weights=self.matryoshka_weights,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        widths = "" if self.matryoshka is None else f", matryoshka={self.matryoshka}"
        return f"temperature={self.temperature}, reduction={self.reduction!r}{widths}"
