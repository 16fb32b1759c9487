"""Multi-Similarity: soft thresholds on the positives and on the negatives of every anchor.

Wang, Han, Huang, Dong, Scott: Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning. CVPR 2019,
arXiv 1904.06627, eq. 15. For scores s_ij = <x_i, x_j>, positives P_i (the anchor's label, not the anchor itself),
negatives N_i (other labels) and the base b, with alpha, beta > 0,

    l_i = 1/alpha log(1 + sum over p in P_i of e^{-alpha (s_ip - b)}) + 1/beta log(1 + sum over n in N_i of
          e^{beta (s_in - b)}),        L = sum of l_i / N, over all anchors

A set that is empty gives 0. Mining with a margin eps (eq. 6, 7) first leaves, of each anchor,

    the positives with s_ip < max over N_i of s_in + eps,      the negatives with s_in > min over P_i of s_ip - eps

where max and min are constants to the gradient. Without negatives the maximum is -inf and no positive is left, without
positives the minimum is +inf and no negative is: an anchor keeps pairs of both kinds or of neither, and then counts 0.

Who computes what: pytorch-metric-learning's MultiSimilarityLoss is mining_margin=None, and with
MultiSimilarityMiner(epsilon=eps) mining_margin=eps. The official code (MalongTech/research-ms-loss) is alpha=2, beta=40
(its configuration), base=0.5, mining_margin=0.1, but leaves the anchor out as every positive with s > 1 - 1e-5, so that
duplicates of it go too, and stops at an anchor without positives. The paper has alpha=2, beta=50, base=1,
mining_margin=0.1. Both codes divide by all anchors.
"""

from typing import ClassVar

from torch import Tensor, nn

from fastret.backends import registry
from fastret.backends.pairs import Head, PairMask
from fastret.losses.reduction import check_reduction, log1p_exp, reduce_valid
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.row_extrema import row_extrema


def multi_similarity(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor = 2.0,
    beta: float | Tensor = 50.0,
    base: float = 0.5,
    mining_margin: float | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Multi-Similarity loss; formula at the top of this file.

    Args:
        embeddings: (N, D) anchors.
        labels: (N,) integers, any values in any order.
        alpha, beta: sharpness > 0 of positives and negatives, in units of 1 / cosine; 0-dim tensors receive gradients.
        base: the cosine between them.
        mining_margin: eps, in units of the cosine; None: every pair counts.
        ref_emb, ref_labels: (M, D), (M,) a gallery, of which nothing is excluded; None: the batch, without the anchor.
        normalize: cosine scores; False: dot products of the rows as given.
        reduction: "mean" over all anchors, "sum", or "none": (N,).
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 embeddings); 0, connected to the graph, where no anchor has a pair.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_labelled(embeddings, labels, ref_emb, ref_labels)
    _check_settings(alpha, beta, base, mining_margin, reduction)
    gallery_labels = labels if ref_labels is None else ref_labels
    positives = PairMask(same=(labels, gallery_labels), offset=0 if ref_labels is None else None)
    negatives = PairMask(different=(labels, gallery_labels))
    if mining_margin is not None:
        # one implementation for both ops: only within it is a score equal, bit for bit, to the extremum it was
        impl = registry.resolve("row_extrema", embeddings.device, embeddings.dtype, impl)
        (least, _), (greatest, _) = row_extrema(
            embeddings.detach(),
            None if ref_emb is None else ref_emb.detach(),
            extrema=[("min", positives), ("max", negatives)],
            normalize=normalize,
            impl=impl,
        )
        positives &= PairMask(below=greatest + mining_margin)
        negatives &= PairMask(above=least - mining_margin)
    heads = [Head(-alpha, positives), Head(beta, negatives)]
    (near, _), (far, _) = masked_lse(embeddings, ref_emb, heads=heads, normalize=normalize, impl=impl)
    losses = log1p_exp(near + alpha * base) / alpha + log1p_exp(far - beta * base) / beta
    return reduce_valid(losses, None, reduction)


def _check_settings(
    alpha: float | Tensor, beta: float | Tensor, base: float, mining_margin: float | None, reduction: str
) -> None:
    checks.check_positive(alpha, "alpha")
    checks.check_positive(beta, "beta")
    checks.check_number(base, "base")
    if mining_margin is not None:
        checks.check_number(mining_margin, "mining_margin")
    check_reduction(reduction)


class MultiSimilarity(nn.Module):
    """Multi-Similarity loss: ``MultiSimilarity()(embeddings, labels)`` is pytorch-metric-learning's
    MultiSimilarityLoss, with ``mining_margin=0.1`` the same with its MultiSimilarityMiner(0.1).

    L = mean over all anchors i of log(1 + sum over positives of e^{-alpha (s - base)}) / alpha
                                 + log(1 + sum over negatives of e^{beta (s - base)}) / beta,   s = cosine

    Official configuration: ``MultiSimilarity(2, 40, 0.5, mining_margin=0.1)``; the paper's: ``(2, 50, 1,
    mining_margin=0.1)``. The anchor itself is left out by its index; the official code leaves out all that is within
    1e-5 of it.

    Cost: one matmul of N M D forward, three backward; mining adds one. Memory: O(N + M); nothing is N x M.

    Args:
        alpha, beta: sharpness > 0 of positives and negatives; 0-dim tensors receive gradients.
        base: the cosine between them.
        mining_margin: keeps the positives that are not this much nearer than the hardest negative, and the negatives
            that are not this much farther than the hardest positive, in units of the cosine; None: every pair counts.
        normalize, reduction, impl: as in ``fastret.functional.multi_similarity``, and so are the errors raised.
    """

    citation: ClassVar[str] = (
        "@inproceedings{wang2019multi, "
        "title={Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning}, "
        "author={Wang, Xun and Han, Xintong and Huang, Weilin and Dong, Dengke and Scott, Matthew R.}, "
        "booktitle={Conference on Computer Vision and Pattern Recognition}, year={2019}}"
    )

    def __init__(
        self,
        alpha: float | Tensor = 2.0,
        beta: float | Tensor = 50.0,
        base: float = 0.5,
        *,
        mining_margin: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        _check_settings(alpha, beta, base, mining_margin, reduction)
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.mining_margin = mining_margin
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
        return multi_similarity(
            embeddings,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            mining_margin=self.mining_margin,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, base={self.base}, mining_margin={self.mining_margin}, "
            f"reduction={self.reduction!r}"
        )
