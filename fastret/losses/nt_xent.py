"""NT-Xent with labels: each positive pair against all negatives of its anchor.

Sohn: Improved Deep Metric Learning with Multi-class N-pair Loss Objective. NeurIPS 2016; Chen et al.: A Simple
Framework for Contrastive Learning of Visual Representations. ICML 2020, arXiv 2002.05709, eq. 1. With logits
l_ij = <x_i, y_j> / tau and the negatives N_a of an anchor (other labels), as pytorch-metric-learning defines it,

    L = mean over positive pairs (a, p) of -log( e^{l_ap} / (e^{l_ap} + sum over n in N_a of e^{l_an}) )
      = mean over positive pairs of softplus(lse_{n in N_a} l_an - l_ap)

An anchor's other positives are in no denominator of its pairs: with two views of each image this is SimCLR's loss.
"""

from typing import ClassVar

from torch import Tensor, nn

from fastret.backends.pairs import Head, PairMask
from fastret.backends.rows import poison
from fastret.losses.reduction import check_reduction, log1p_exp, over_temperature, reduce_valid
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.pair_dot import pair_dot, positive_pairs


def nt_xent(
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
    """NT-Xent loss over positive pairs; formula at the top of this file.

    Args:
        embeddings: (N, D) anchors.
        labels: (N,) integers, any values in any order.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        ref_emb, ref_labels: (M, D), (M,) a gallery, of which nothing is excluded; None: the batch, without the anchor.
        normalize: cosine scores; False: dot products of the rows as given.
        reduction: "mean" over positive pairs, "sum", or "none": (P,), anchor by anchor.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 embeddings); 0, connected to the graph, where there is no positive pair.
        CUDA waits once for the number of pairs.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_labelled(embeddings, labels, ref_emb, ref_labels)
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    gallery_labels = labels if ref_labels is None else ref_labels
    scale = over_temperature(temperature, embeddings)
    head = Head(scale, PairMask(different=(labels, gallery_labels)))
    ((negatives, _),) = masked_lse(embeddings, ref_emb, heads=[head], normalize=normalize, impl=impl)
    anchor, positive = positive_pairs(labels, ref_labels)
    scores = pair_dot(embeddings, ref_emb, anchor, positive, normalize=normalize, impl=impl)
    losses = log1p_exp(negatives[anchor] - scale * scores)
    # a batch without any positive pair reads no score: NaN must show there too
    nothing = poison(embeddings) if ref_emb is None else poison(embeddings, ref_emb)
    return reduce_valid(losses, None, reduction) + nothing


class NTXent(nn.Module):
    """NT-Xent loss, as pytorch-metric-learning's NTXentLoss: ``NTXent(0.1)(embeddings, labels)``.

    L = mean over positive pairs (a, p) of softplus(lse over negatives n of a of l_an - l_ap),   l = cosine / tau

    Cost: one matmul of N M D forward, three backward, and P D for P positive pairs. Memory: O(N + M + P), where the
    formula written out pair by pair takes P times the number of negatives.

    Args:
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        normalize, reduction, impl: as in ``fastret.functional.nt_xent``, and so are the errors raised.
    """

    citation: ClassVar[str] = (
        "@inproceedings{chen2020simple, "
        "title={A Simple Framework for Contrastive Learning of Visual Representations}, "
        "author={Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey}, "
        "booktitle={International Conference on Machine Learning}, year={2020}}"
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
        return nt_xent(
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
