"""SupCon: every other row of an anchor's class is its positive, all other rows are candidates.

Khosla et al.: Supervised Contrastive Learning. NeurIPS 2020, arXiv 2004.11362, eq. 2 (L_out). With logits
l_ij = <x_i, x_j> / tau, the candidates j != i and the positives P_i among them,

    L = mean over i with positives of lse_{j != i} l_ij - 1 / |P_i| sum over p in P_i of l_ip
"""

from typing import ClassVar

from torch import Tensor, nn

from fastret.backends.pairs import Head, Masked, PairMask
from fastret.backends.rows import accumulation_dtype
from fastret.backends.segments import label_segments
from fastret.losses.reduction import check_reduction, reduce_valid, row_weights
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
        reduction: "mean" over anchors with a positive, "sum", or "none": (N,), 0 for an anchor without a positive.
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
    head = Head(1 / temperature, candidates, target)
    valid = count > 0
    if reduction != "none":
        weight = row_weights(embeddings, valid, reduction)
        return masked_lse_sum(embeddings, ref_emb, head=head, row_weight=weight, normalize=normalize, impl=impl)
    ((lse, t),) = masked_lse(embeddings, ref_emb, heads=[head], normalize=normalize, impl=impl)
    # an anchor that is alone in its batch has lse = -inf, which times 0 would be NaN
    return reduce_valid(lse.masked_fill(lse.isneginf(), 0) - t, valid, reduction)


class SupCon(nn.Module):
    """Supervised contrastive loss, as pytorch-metric-learning's SupConLoss: ``SupCon(0.1)(embeddings, labels)``.

    L = mean over anchors i with positives P_i of lse_{j != i} l_ij - mean over p in P_i of l_ip,   l = cosine / tau

    Cost: three matmuls of N M D for loss and gradients. Memory: O(N + M) and the gradients; nothing is N x M.

    Args:
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        normalize, reduction, impl: as in ``fastret.functional.sup_con``, and so are the errors raised.
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
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive(temperature, "temperature")
        check_reduction(reduction)
        self.temperature = temperature
        self.normalize = normalize
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
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
