"""Smooth-AP: average precision with its step functions replaced by sigmoids.

Brown, Xie, Kalogeiton, Zisserman: Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval. ECCV 2020,
arXiv 2007.12163, eq. 7-9. For query q with positives P_q and rank_all, rank_pos of ``fastret.ops.rank_sums``,

    AP_q = 1 / |P_q| sum over i in P_q of rank_pos[q, i] / rank_all[q, i],      L = 1 - mean over q of AP_q

The official code counts the query among its own positives and competitors (``include_self=True``, the default here);
the paper's formula does not (``include_self=False``). The two values are not comparable.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends.rows import poison
from fastret.losses.reduction import check_reduction, reduce_valid
from fastret.ops import checks
from fastret.ops.rank_sums import rank_sums, sum_by_query


def smooth_ap(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.01,
    include_self: bool = True,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    samples_per_class: int | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Smooth-AP loss of a batch, or of a batch against a gallery; formula at the top of this file.

    Args:
        embeddings: (N, D) queries.
        labels: (N,) integers, any values in any order.
        temperature: tau > 0 of the sigmoids, in units of the score; a 0-dim tensor receives a gradient.
        include_self: the query is among its own positives and competitors, as in the official code. With ref_emb it
            has no effect: nothing of a gallery is the query.
        ref_emb: (M, D) gallery; None: the batch itself. Nothing of it is excluded.
        ref_labels: (M,) integers, given exactly when ref_emb is.
        samples_per_class: positives of each query where all have equally many (itself counted where gallery = batch):
            shapes become static and CUDA needs no synchronisation.
        normalize: cosine scores; False: dot products of the rows as given, as in the official code.
        reduction: "mean" over queries with a positive, "sum", or "none": (N,), 0 where a query has no positive.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 embeddings); 0, connected to the graph, where no query has a positive.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_labelled(embeddings, labels, ref_emb, ref_labels)
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    exclude_self = ref_emb is None and not include_self
    ranks = rank_sums(
        embeddings,
        labels,
        ref_emb,
        ref_labels,
        temperature=temperature,
        exclude_self=exclude_self,
        normalize=normalize,
        samples_per_class=samples_per_class,
        impl=impl,
    )
    precision = ranks.rank_pos / ranks.rank_all
    if samples_per_class is None:
        total = sum_by_query(precision, ranks.counts)
    else:
        total = precision.view(-1, samples_per_class).sum(1)
    positives = ranks.counts - 1 if exclude_self else ranks.counts
    # a batch without any positive pair reaches no kernel: NaN must show there too
    nothing = poison(embeddings) if ref_emb is None else poison(embeddings, ref_emb)
    return reduce_valid(1 - total / positives.clamp_min(1) + nothing, positives > 0, reduction)


class SmoothAP(nn.Module):
    """Smooth-AP loss. ``SmoothAP(0.01, batch_size, num_id, feat_dims)(preds)`` is the official call.

    L = 1 - mean over queries q of 1 / |P_q| sum over i in P_q of rank_pos[q, i] / rank_all[q, i], where rank_all
    (rank_pos) is 1 + the sum over all other rows (other positives) j of sigmoid((s_qj - s_qi) / anneal).

    Cost for G positives a query: N M G sigmoids and one product of the rows forward, as many sigmoids and three
    products backward; where gallery = batch, half of those products. Memory: sorted copies of the rows; kept for
    backward: two floats a positive pair, on triton three. Nothing is N x N, where the official code is N x N x N.

    Args:
        anneal: temperature tau > 0 of the sigmoids, in units of the score; a 0-dim tensor receives a gradient.
        batch_size, num_id: only needed when called without labels: rows then are consecutive blocks of
            batch_size // num_id of one class. The batch that is given need not have batch_size rows.
        feat_dims: accepted as the official code has it; nothing depends on it.
        include_self: the query is among its own positives and competitors, as in the official code; False: as in the
            paper. Queries without a positive are then skipped.
        normalize: cosine scores. Equal to the official value on unit rows, which the official code expects; False: raw
            dot products.
        reduction: "mean" over queries with a positive, "sum" or "none".
        samples_per_class: positives of each query where all have equally many: static shapes, no CUDA synchronisation.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.

    Example:
        >>> loss = fastret.SmoothAP(anneal=0.01)(model(images), labels)
    """

    citation: ClassVar[str] = (
        "@inproceedings{brown2020smoothap, "
        "title={Smooth-{AP}: Smoothing the Path Towards Large-Scale Image Retrieval}, "
        "author={Brown, Andrew and Xie, Weidi and Kalogeiton, Vicky and Zisserman, Andrew}, "
        "booktitle={European Conference on Computer Vision}, year={2020}}"
    )

    def __init__(
        self,
        anneal: float | Tensor = 0.01,
        batch_size: int | None = None,
        num_id: int | None = None,
        feat_dims: int | None = None,
        *,
        include_self: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        samples_per_class: int | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive(anneal, "anneal")
        for value, name in ((batch_size, "batch_size"), (num_id, "num_id"), (feat_dims, "feat_dims")):
            checks.check_count(value, name)
        checks.check_count(samples_per_class, "samples_per_class")
        check_reduction(reduction)
        if batch_size is not None and num_id is not None and batch_size % num_id:
            raise ValueError(f"batch_size: expected a multiple of num_id = {num_id}, got {batch_size}")
        self.anneal = anneal
        self.batch_size = batch_size
        self.num_id = num_id
        self.feat_dims = feat_dims
        self.include_self = include_self
        self.normalize = normalize
        self.reduction = reduction
        self.samples_per_class = samples_per_class
        self.impl = impl

    def forward(
        self,
        preds: Tensor,
        labels: Tensor | None = None,
        *,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``preds`` (N, D) with ``labels`` (N,); without labels, of consecutive equal blocks of one class."""
        samples_per_class = self.samples_per_class
        if labels is None:
            if ref_emb is not None:
                raise ValueError("labels: expected labels of the queries where ref_emb is given, got None")
            checks.check_rows(preds, "preds")
            block = self._block(preds.shape[0])
            if samples_per_class not in (None, block):
                raise ValueError(
                    f"samples_per_class: expected {block}, as batch_size and num_id say, got {samples_per_class}"
                )
            samples_per_class = block
            labels = torch.arange(preds.shape[0], device=preds.device) // samples_per_class
        return smooth_ap(
            preds,
            labels,
            temperature=self.anneal,
            include_self=self.include_self,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            samples_per_class=samples_per_class,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def _block(self, rows: int) -> int:
        """Rows of one class in a batch without labels."""
        if self.num_id is None:
            raise ValueError(
                "labels: expected labels, or num_id in the constructor for consecutive blocks; got neither"
            )
        block = (rows if self.batch_size is None else self.batch_size) // self.num_id
        if block == 0 or rows % block or (self.batch_size is None and block * self.num_id != rows):
            wanted = self.num_id if self.batch_size is None else max(block, 1)
            raise ValueError(
                f"preds: expected a multiple of {wanted} rows "
                f"(batch_size = {self.batch_size}, num_id = {self.num_id}), got {rows}"
            )
        return block

    def extra_repr(self) -> str:
        names = ("anneal", "include_self", "normalize", "reduction", "samples_per_class", "impl")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
