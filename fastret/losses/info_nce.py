"""InfoNCE and its two-sided form for image and text (CLIP).

van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding. arXiv 1807.03748, eq. 4.
Radford et al.: Learning Transferable Visual Models From Natural Language Supervision. ICML 2021, arXiv 2103.00020.
With logits l_ij = <q_i, k_j> / tau and the positive key p_i of each query,

    InfoNCE = mean over i of lse_j l_ij - l_{i, p_i}
    symmetric, CLIP (p_i = i, 1 / tau = logit_scale) = mean over i of (lse_j l_ij + lse_j l_ji) / 2 - l_ii

and with ``matryoshka`` the sum of either over prefixes of the features (Kusupati et al., fastret.losses.matryoshka).
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastret.backends.pairs import Head, Indexed, Shifted
from fastret.losses.matryoshka import check_matryoshka, prefixes, weighted
from fastret.losses.reduction import check_reduction, over_temperature, reduce_valid, row_weights
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.masked_lse_sum import masked_lse_sum


def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    normalize: bool = True,
    matryoshka: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """InfoNCE of queries against keys; formula at the top of this file.

    Args:
        query: (N, D).
        key: (M, D). Detached keys cost no gradient.
        target: (N,) integers, the key that is each query's positive; None: key i for query i. Others are negatives.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        symmetric: mean of both directions: queries are also negatives of keys. Needs N = M and no target.
        normalize: cosine scores; False: dot products of the rows as given.
        matryoshka: widths w_1 < ... < w_K, at most D: the sum of the losses on the first w_k features (of prefixes over
            their own norms where normalised). None: all features.
        matryoshka_weights: (K,) positive factors of these losses; None: 1 each.
        reduction: "mean", "sum", or "none": (N,), summed over widths.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Returns:
        float32 loss (float64 for float64 rows); 0 for an empty batch.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(query, "query")
    checks.check_rows(key, "key", like=query)
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    n, m = query.shape[0], key.shape[0]
    if target is not None:
        checks.check_labels(target, query, "target")
        checks.check_range(target, m, "target")
        if symmetric:
            raise ValueError("target: expected None with symmetric=True, where key i belongs to query i, got a tensor")
    elif m < n or (symmetric and m != n):
        raise ValueError(f"key: expected {'' if symmetric else 'at least '}{n} rows like the queries, got {m}")
    widths, weights = prefixes(matryoshka, matryoshka_weights, query.shape[1])
    scale, positive = over_temperature(temperature, query), Shifted() if target is None else Indexed(target)
    heads = [Head(scale, target=positive, width=w) for w in widths]
    if symmetric:
        return _both_directions(query, key, heads, weights, normalize, reduction, impl)
    if reduction != "none" and len(heads) == 1:
        weight = row_weights(query, None, reduction) * weights[0]
        return masked_lse_sum(query, key, head=heads[0], row_weight=weight, normalize=normalize, impl=impl)
    results = masked_lse(query, key, heads=heads, normalize=normalize, impl=impl)
    losses = weighted([lse - t for lse, t in results], weights)
    return reduce_valid(losses, None, reduction)


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """The mean of both directions of InfoNCE, as OpenCLIP computes it; formula at the top of this file.

    Args:
        image_features, text_features: (N, D), used as given: normalise them before.
        logit_scale: what dot products are multiplied with, > 0: exp() of the learned parameter. A 0-dim tensor
            receives a gradient.
        reduction, impl: as in ``info_nce``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(image_features, "image_features")
    checks.check_rows(text_features, "text_features", like=image_features)
    checks.check_positive(logit_scale, "logit_scale")
    check_reduction(reduction)
    if text_features.shape[0] != image_features.shape[0]:
        raise ValueError(f"text_features: expected {image_features.shape[0]} rows, got {text_features.shape[0]}")
    heads = [Head(logit_scale, target=Shifted())]
    return _both_directions(image_features, text_features, heads, [1.0], False, reduction, impl)


def _both_directions(
    x: Tensor,
    y: Tensor,
    heads: list[Head],
    weights: list[float],
    normalize: bool,
    reduction: str,
    impl: str | None,
) -> Tensor:
    columns = [Head(head.scale, axis="column", width=head.width) for head in heads]
    results = masked_lse(x, y, heads=[*heads, *columns], normalize=normalize, impl=impl)
    pairs = zip(results[: len(heads)], results[len(heads) :], strict=True)
    losses = weighted([(row + column) / 2 - positive for (row, positive), (column, _) in pairs], weights)
    return reduce_valid(losses, None, reduction)


class InfoNCE(nn.Module):
    """InfoNCE loss: ``InfoNCE(0.07)(query, key)``, the key i being the positive of query i and all others negatives.

    L = mean over i of lse_j(<q_i, k_j> / tau) - <q_i, k_{p_i}> / tau

    Cost: three matmuls of N M D for loss and gradients (reduction="none", symmetric and matryoshka: four). Memory:
    O(N + M) and the gradients; nothing is N x M. K widths of ``matryoshka`` cost four matmuls of N M w_K in all in C++,
    and K exponentials a pair in each direction; a call a width costs three of N M sum(w).

    Args:
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        symmetric: mean of both directions.
        normalize, matryoshka, matryoshka_weights, reduction, impl: as in ``fastret.functional.info_nce``, and so
            are the errors raised.
    """

    citation: ClassVar[str] = (
        "@article{oord2018representation, title={Representation Learning with Contrastive Predictive Coding}, "
        "author={van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol}, "
        "journal={arXiv preprint arXiv:1807.03748}, year={2018}}"
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        symmetric: bool = False,
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
        self.symmetric = symmetric
        self.normalize = normalize
        self.matryoshka = matryoshka
        self.matryoshka_weights = matryoshka_weights
        self.reduction = reduction
        self.impl = impl

    def forward(self, query: Tensor, key: Tensor, target: Tensor | None = None) -> Tensor:
        """Loss of ``query`` (N, D) against ``key`` (M, D); ``target`` (N,): the positive key, None: key i."""
        return info_nce(
            query,
            key,
            target,
            temperature=self.temperature,
            symmetric=self.symmetric,
            normalize=self.normalize,
            matryoshka=self.matryoshka,
            matryoshka_weights=self.matryoshka_weights,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        widths = "" if self.matryoshka is None else f", matryoshka={self.matryoshka}"
        return f"temperature={self.temperature}, symmetric={self.symmetric}, reduction={self.reduction!r}{widths}"


class CLIPLoss(nn.Module):
    """CLIP loss of image and text features as given: ``CLIPLoss()(image_features, text_features, logit_scale)``.

    L = mean over i of (lse_j l_ij + lse_j l_ji) / 2 - l_ii,   l_ij = logit_scale <image_i, text_j>

    Cost: one matmul of N N D forward, three backward, for both directions. Memory: O(N); nothing is N x N.

    Args:
        reduction: "mean", "sum", or "none": (N,).
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Raises:
        TypeError, ValueError: as ``fastret.functional.clip``.
    """

    citation: ClassVar[str] = (
        "@inproceedings{radford2021learning, "
        "title={Learning Transferable Visual Models From Natural Language Supervision}, "
        "author={Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others}, "
        "booktitle={International Conference on Machine Learning}, year={2021}}"
    )

    def __init__(self, *, reduction: str = "mean", impl: str | None = None) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction
        self.impl = impl

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
        """Loss of (N, D) features; pair i is the positive in both directions."""
        return clip(image_features, text_features, logit_scale, reduction=self.reduction, impl=self.impl)
