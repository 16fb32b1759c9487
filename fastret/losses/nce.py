"""Noise-contrastive estimation over a memory bank: each row tells its own image from K drawn ones.

Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination. CVPR 2018,
arXiv 1805.01978, eqs. 5 to 8, as their released code computes it. Row i has its image c_i0 and the noise c_i1 .. c_iK
in a bank M of C rows; with P_ik = exp(<x_i, M_{c_ik}> / tau) / Z, c0 = K / C and c = c0 + eps,

    L = -mean over i of log(P_i0 / (P_i0 + c)) + sum over k >= 1 of log(c0 / (P_ik + c))
      = mean over i of softplus(-a_i0) + sum over k >= 1 of softplus(a_ik) + K log(1 + eps / c0)

with a_ik = <x_i, M_{c_ik}> / tau - log Z - log c. The last term is a constant, 0.13 for K = 4096 of 1.28M images, that
the reported values of the loss hold. Articles about the paper leave eps out (eps = 0).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends.rows import unit_rows
from fastret.losses.memory_bank import MemoryBank
from fastret.losses.reduction import check_reduction, log1p_exp, over_temperature, reduce_valid
from fastret.ops import checks
from fastret.ops.in_range import in_range
from fastret.ops.sampled_dot import check_columns, sampled_dot


def nce(
    x: Tensor,
    bank: Tensor,
    index: Tensor,
    noise: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    Z: float | Tensor,
    eps: float = 1e-7,
    normalize: bool = False,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """NCE loss of rows against a bank with the noise given; formula at the top of this file.

    Args:
        x: (B, D). bank: (C, D); it receives a gradient where it asks for one.
        index: (B,) integers from 0 to C - 1, the image of each row. noise: (B, K) likewise, K >= 1.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        Z: the normaliser, > 0: a number, a 0-dim tensor, or (B,) one a row, as articles have it; a constant.
        eps: >= 0.
        normalize: of x; the bank is taken as it is.
        reduction: "mean", "sum", or "none": (B,).
        impl: as in ``fastret.ops.sampled_dot``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    check_eps(eps)
    checks.check_rows(x, "x")
    check_normalizer(Z, x)
    x = unit_rows(x) if normalize else x
    checks.check_rows(bank, "bank", like=x, called="x")
    if x.shape[0] and not bank.shape[0]:
        raise ValueError("bank: expected at least one row, got none")
    checks.check_labels(index, x, "index")
    check_columns(noise, x, "noise")
    index, noise = (in_range(t, bank.shape[0], name) for t, name in ((index, "index"), (noise, "noise")))
    scores = sampled_dot(x, bank, first=index, index=noise, impl=impl) * over_temperature(temperature, x)
    log_Z = Z.detach().to(scores.dtype).log() if isinstance(Z, Tensor) else math.log(Z)
    return nce_of_logits(scores, log_Z, bank.shape[0], eps, reduction)


def nce_of_logits(logits: Tensor, log_Z: float | Tensor, size: int, eps: float, reduction: str) -> Tensor:
    """The loss of (B, K + 1) scores over temperature, that of the image first, from a bank of ``size`` rows."""
    k = logits.shape[1] - 1
    ratio = k / size
    if isinstance(log_Z, Tensor):
        log_Z = log_Z.to(logits.dtype)
        log_Z = log_Z[:, None] if log_Z.dim() else log_Z
    a = logits - (log_Z + math.log(ratio + eps))
    losses = log1p_exp(-a[:, 0]) + log1p_exp(a[:, 1:]).sum(1) + k * math.log1p(eps / ratio)
    return reduce_valid(losses, None, reduction)


def check_eps(eps: float) -> None:
    """A finite number >= 0."""
    checks.check_number(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")


def check_normalizer(Z: float | Tensor, x: Tensor) -> None:
    """Z > 0, one or one a row; values are looked at where they are on the CPU."""
    if not isinstance(Z, Tensor) or Z.dim() == 0:
        checks.check_positive(Z, "Z")
        return
    checks.check_vector(Z, x, "Z")
    if Z.device.type != "cpu" or torch.compiler.is_compiling() or checks.is_wrapped(Z):
        return
    wrong = ~((Z > 0) & Z.isfinite())
    if wrong.any():
        raise ValueError(f"Z: expected positive finite numbers, got {float(Z[wrong][0])}")


class NCELoss(nn.Module):
    """NCE over a bank and noise of one's own: ``NCELoss(0.07, Z=3.2e4)(x, bank, index, noise)``.

    L = mean over i of softplus(-a_i0) + sum over k of softplus(a_ik) + K log(1 + eps / c0),
    a_ik = <x_i, M_{c_ik}> / tau - log Z - log(K / C + eps)

    Cost: B K D products in each direction. Memory: a few times B (K + 1) scores; no gathered rows. ``fastret.NPID``
    draws the noise, keeps the bank and finds Z.

    Args:
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        Z, eps, normalize, reduction, impl: as in ``fastret.functional.nce``, and so are the errors raised.
    """

    citation: ClassVar[str] = MemoryBank.citation

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        Z: float | Tensor,
        eps: float = 1e-7,
        normalize: bool = False,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive(temperature, "temperature")
        check_reduction(reduction)
        check_eps(eps)
        self.temperature = temperature
        self.Z: float | Tensor
        if isinstance(Z, Tensor):
            self.register_buffer("Z", Z)
        else:
            self.Z = Z
        self.eps = eps
        self.normalize = normalize
        self.reduction = reduction
        self.impl = impl

    def forward(self, x: Tensor, bank: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """Loss of ``x`` (B, D), images ``index`` (B,) of ``bank`` (C, D), against ``noise`` (B, K)."""
        return nce(
            x,
            bank,
            index,
            noise,
            temperature=self.temperature,
            Z=self.Z,
            eps=self.eps,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, Z={self.Z}, eps={self.eps}, reduction={self.reduction!r}"
