"""CQC: cross quantized contrastive loss of two views and their soft quantisations.

Jang, Cho: Self-supervised Product Quantization for Deep Unsupervised Image Retrieval. ICCV 2021, arXiv 2109.02244.
For Xa, Xb, Za, Zb (N, D), row n of each from image n, cosine scores over tau, and M(n) the other half's row of image n:

stacked (official code): anchors and candidates are U = [Xa; Zb], and U' = [Xb; Za]; 4N row losses
    l_r = lse_{c != r} S_rc - S_{r, M(r)}
cross, positive_in_denominator=True (as modfire): anchors [Xa; Xb], candidates [Za; Zb] but the anchor's own; 2N losses
    l_r = lse_{c != r} S_rc - S_{r, M(r)}
cross, positive_in_denominator=False (the paper, eq. 7): anchors Xa, candidates Zb, and Xb with Za; 2N row losses
    l_i = lse_{j != i} S_ij - S_ii

Without the positive, a single image leaves nothing in the denominator: its row losses count 0.

L = sum of all row losses / 2N: the official value is twice the mean of its 4N rows.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends.pairs import Head, PairMask, Shifted
from fastret.losses.reduction import check_reduction, over_temperature, row_weights
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.masked_lse_sum import masked_lse_sum

PAIRS = ("stacked", "cross")


def cqc(
    Xa: Tensor,
    Xb: Tensor,
    Za: Tensor,
    Zb: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    pairs: str = "stacked",
    positive_in_denominator: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross quantized contrastive loss; formulas at the top of this file.

    Args:
        Xa, Xb: (N, D) descriptors of two views. Za, Zb: (N, D) their soft quantisations.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        pairs: "stacked" (official) or "cross".
        positive_in_denominator: False leaves the positive out of the log-sum-exp.
        normalize: cosine scores; False: dot products of the rows as given.
        reduction: "mean": sum of the row losses over 2N; "sum", or "none": (4N,) stacked, those of [Xa; Zb] first;
            (2N,) cross, those of Xa first.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(Xa, "Xa")
    for rows, name in ((Xb, "Xb"), (Za, "Za"), (Zb, "Zb")):
        checks.check_rows(rows, name, like=Xa)
        if rows.shape[0] != Xa.shape[0]:
            raise ValueError(f"{name}: expected {Xa.shape[0]} rows like Xa, got {rows.shape[0]}")
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    _check_pairs(pairs)
    n, scale = Xa.shape[0], over_temperature(temperature, Xa)
    other_half = Shifted(n, 2 * n)
    problems: list[tuple[Tensor, Tensor | None]]
    if n == 0:
        problems, head = [(Xa, Zb)], Head(scale)
    elif pairs == "stacked":
        problems = [(torch.cat([Xa, Zb]), None), (torch.cat([Xb, Za]), None)]
        image = torch.arange(2 * n, device=Xa.device) % n
        mask = PairMask(offset=0) if positive_in_denominator else PairMask(distinct=(image, image))
        head = Head(scale, mask, other_half)
    elif positive_in_denominator:
        problems = [(torch.cat([Xa, Xb]), torch.cat([Za, Zb]))]
        head = Head(scale, PairMask(offset=0), other_half)
    else:
        problems = [(Xa, Zb), (Xb, Za)]
        head = Head(scale, PairMask(offset=0), Shifted())
    counted = n > 1 or positive_in_denominator
    losses = [_losses(x, y, head, n, counted, normalize, reduction, impl) for x, y in problems]
    return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()


def _losses(
    x: Tensor,
    y: Tensor | None,
    head: Head,
    n: int,
    counted: bool,
    normalize: bool,
    reduction: str,
    impl: str | None,
) -> Tensor:
    if reduction == "none":
        ((lse, t),) = masked_lse(x, y, heads=[head], normalize=normalize, impl=impl)
        return lse - t if counted else torch.where(lse == -math.inf, 0, lse - t)
    weight = row_weights(x, None, "sum") * counted
    if reduction == "mean":
        weight = weight / max(2 * n, 1)
    return masked_lse_sum(x, y, head=head, row_weight=weight, normalize=normalize, impl=impl)


def _check_pairs(pairs: str) -> None:
    if pairs not in PAIRS:
        raise ValueError(f"pairs: expected one of {', '.join(PAIRS)}, got {pairs!r}")


class CQCLoss(nn.Module):
    """CQC loss: ``CQCLoss(device, batch_size, tau_cqc)(Xa, Xb, Za, Zb)`` is the official call and value.

    L = 1 / 2N sum over the 2N rows r of U = [Xa; Zb] and of U' = [Xb; Za] of
        lse_{c != r} cos(u_r, u_c) / tau - cos(u_r, u_{(r + N) mod 2N}) / tau

    Cost: three matmuls of 2N 2N D for each of U and U'. Memory: O(N) and the gradients, where the official code
    broadcasts 2N x 2N x D.

    Args:
        device, batch_size: accepted as the official code has them; nothing depends on them.
        tau_cqc: temperature > 0; a 0-dim tensor receives a gradient.
        pairs, positive_in_denominator, normalize, reduction, impl: as in ``fastret.functional.cqc``, and so are the
            errors raised.
    """

    citation: ClassVar[str] = (
        "@inproceedings{jang2021self, "
        "title={Self-supervised Product Quantization for Deep Unsupervised Image Retrieval}, "
        "author={Jang, Young Kyun and Cho, Nam Ik}, "
        "booktitle={International Conference on Computer Vision}, year={2021}}"
    )

    def __init__(
        self,
        device: object = None,
        batch_size: int | None = None,
        tau_cqc: float | Tensor = 0.5,
        *,
        pairs: str = "stacked",
        positive_in_denominator: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_count(batch_size, "batch_size")
        checks.check_positive(tau_cqc, "tau_cqc")
        check_reduction(reduction)
        _check_pairs(pairs)
        self.device = device
        self.batch_size = batch_size
        self.tau_cqc = tau_cqc
        self.pairs = pairs
        self.positive_in_denominator = positive_in_denominator
        self.normalize = normalize
        self.reduction = reduction
        self.impl = impl

    def forward(self, Xa: Tensor, Xb: Tensor, Za: Tensor, Zb: Tensor) -> Tensor:
        """Loss of descriptors ``Xa``, ``Xb`` and soft quantisations ``Za``, ``Zb``, (N, D) each."""
        return cqc(
            Xa,
            Xb,
            Za,
            Zb,
            temperature=self.tau_cqc,
            pairs=self.pairs,
            positive_in_denominator=self.positive_in_denominator,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"tau_cqc={self.tau_cqc}, pairs={self.pairs!r}, reduction={self.reduction!r}"
