"""NPID: a memory bank with a row an image, noise drawn from it, and the loss that tells an image from the noise.

Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination. CVPR 2018,
arXiv 1805.01978. The loss is that of ``fastret.functional.nce``. What the paper leaves open, as in the released code:

    noise   K columns a row, uniform over the bank, with replacement; the image itself may be among them
    Z       set by the first batch, C times the mean of exp(<x_i, M_{c_ik}> / tau) over all B (K + 1) scores, and
            constant from then on, in that batch too
    bank    M_y <- normalise(mu M_y + (1 - mu) x) in backward, before the optimiser's step, of the rows of this forward

Articles about it differ: one Z a place in the batch (``Z_rows``), no eps, the weights of the bank's update exchanged
(``convention="new"``), and the update after the optimiser's step (``update="manual"``).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastret.backends.rows import unit_rows
from fastret.losses.memory_bank import MemoryBank
from fastret.losses.nce import check_eps, nce_of_logits
from fastret.losses.reduction import check_reduction
from fastret.losses.stays_float32 import StaysFloat32
from fastret.ops import checks
from fastret.ops.eager_only import eager_only
from fastret.ops.in_range import in_range
from fastret.ops.sampled_dot import sampled_dot

UPDATES = ("backward", "manual")
ONLY_EAGER = "NPID: update='backward' is eager only; update='manual' compiles"


class NPID(StaysFloat32):
    """Non-parametric instance discrimination: ``loss = NPID(len(data), 128)(x, index)``.

    L = mean over i of softplus(-a_i0) + sum over k of softplus(a_ik) + K log(1 + eps / c0),
    a_ik = <x_i, M_{c_ik}> / tau - log Z - log(K / C + eps)

    Cost: B K D products in each direction, and as many reads of the bank. Memory: a few times B (K + 1) scores beside
    the bank; neither the drawn columns nor their rows are stored. Nothing waits for the device. All state, that of the
    noise too, is in the state_dict: a run that goes on draws what it would have drawn.

    With update="backward" a loss without backward updates nothing, and a second backward of one graph raises, as the
    first has changed rows that it needs; so does one backward of two losses of one bank. Under activation checkpointing
    the loss has to stay outside, as its noise would be drawn again. torch.compile raises, with fullgraph=True or
    without; update="manual" is the form that compiles. torch.func raises in training, whatever the update, as state
    changes there that is none of its arguments.

    Z is of the first batch in training whose scores are finite; until there is one, of each batch itself. Neither
    evaluation nor torch.no_grad() sets Z, moves the noise on or updates the bank.

    Across processes each module is its process's own: gather (x, index) from all ranks in the order of the ranks before
    the loss, with a gather that differentiates; banks that start equal stay so. With update="manual" the loss may take
    the rank's own x, with another seed on every rank, and only ``update_`` the gathered; Z then differs unless given.
    Either way ``DistributedDataParallel(broadcast_buffers=False)``: otherwise every forward sends the whole bank.

    Args:
        size: C, images. dim: D.
        num_noise: K >= 1.
        temperature: tau > 0.
        momentum: mu in [0, 1]. convention: "old", mu weighs the old row; "new", the new one.
        eps: >= 0; articles: 0.
        update: "backward", as the official code, eager only; "manual": call ``update_(x, index)``, which also compiles.
        Z: the normaliser where it is known; None: of the first batch.
        Z_rows: the batch size, for one Z a place in the batch, as articles have it; None: one Z.
        normalize: x to unit rows; False: as given, which the official code expects to be unit rows.
        init, duplicates, dtype: of the bank, as in ``fastret.MemoryBank``.
        seed: of the noise, from 0 to 2^32 - 1.
        reduction: "mean", "sum", or "none": (B,).
        impl: as in ``fastret.ops.sampled_dot``.

    Attributes:
        bank: the ``MemoryBank``. log_Z: 0-dim (or (Z_rows,)), NaN until it is known; float32 whatever
            ``half()`` or ``to()`` make of the others. Z: its exponential.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    citation: ClassVar[str] = MemoryBank.citation
    stays: ClassVar[str] = "log_Z"
    log_Z: Tensor
    draws: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        num_noise: int = 4096,
        temperature: float = 0.07,
        momentum: float = 0.5,
        convention: str = "old",
        eps: float = 1e-7,
        update: str = "backward",
        Z: float | None = None,
        Z_rows: int | None = None,
        normalize: bool = False,
        init: str = "uniform",
        duplicates: str = "last",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer(num_noise, "num_noise", 1)
        checks.check_positive(temperature, "temperature")
        check_eps(eps)
        if update not in UPDATES:
            raise ValueError(f"update: expected one of {', '.join(UPDATES)}, got {update!r}")
        if Z is not None:
            checks.check_positive(Z, "Z")
        checks.check_count(Z_rows, "Z_rows")
        checks.check_integer(seed, "seed", 0)
        if seed >= 2**32:
            raise ValueError(f"seed: expected a number below 2^32, got {seed}")
        check_reduction(reduction)
        self.bank = MemoryBank(
            size, dim, momentum=momentum, convention=convention, duplicates=duplicates, init=init, dtype=dtype
        )
        self.num_noise, self.temperature, self.eps, self.update = num_noise, temperature, eps, update
        self.normalize, self.reduction, self.impl = normalize, reduction, impl
        log_Z = math.nan if Z is None else math.log(Z)
        self.register_buffer("log_Z", torch.full(() if Z_rows is None else (Z_rows,), log_Z))
        self.register_buffer("draws", torch.tensor(seed))  # 64 bits: the number of the batch above the seed

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Loss of ``x`` (B, D), the images ``index`` (B,) from 0 to size - 1."""
        checks.check_rows(x, "x", like=self.bank.memory, called="the bank")
        checks.check_labels(index, x, "index")
        index = in_range(index, self.bank.size, "index")
        if self.log_Z.dim() and x.shape[0] != self.log_Z.shape[0]:
            raise ValueError(
                f"x: expected {self.log_Z.shape[0]} rows, one for each Z (drop the last batch), got {x.shape[0]}"
            )
        x = unit_rows(x) if self.normalize else x
        learning = self.training and torch.is_grad_enabled()
        differentiated = x.view_as(x).requires_grad  # of x itself Dynamo may not know (``fastret.ops.library.apply``)
        if self.update == "backward" and learning and differentiated:
            x = update_in_backward(eager_only(x, ONLY_EAGER), index, self.bank.update_)
        rows = x.to(self.bank.memory.dtype) if torch.float64 in (x.dtype, self.bank.memory.dtype) else x
        logits = sampled_dot(
            rows, self.bank.memory, first=index, count=self.num_noise, seed=self.draws.clone(), impl=self.impl
        )
        logits = logits / self.temperature
        return nce_of_logits(logits, self._normalizer(logits, learning), self.bank.size, self.eps, self.reduction)

    @property
    def Z(self) -> Tensor:
        """The normaliser; NaN until the first batch."""
        return self.log_Z.exp()

    @torch.no_grad()
    def _normalizer(self, logits: Tensor, learning: bool) -> Tensor:
        """log Z, of this batch where there is none yet; and, learning, on to the noise of the next."""
        numbers = logits if self.log_Z.dim() else logits.flatten()
        kept = self.log_Z.to(logits.dtype)
        of_batch = numbers.logsumexp(-1) + math.log(self.bank.size / max(1, numbers.shape[-1]))
        log_Z = torch.where(kept.isfinite(), kept, of_batch) if len(logits) else kept
        if learning:
            self.log_Z.copy_(torch.where(log_Z.isfinite(), log_Z, math.nan))  # one overflow is not to be for good
            self.draws += 1 << 32
        return log_Z

    def update_(self, x: Tensor, index: Tensor) -> None:
        """Update the bank's rows ``index`` with ``x``: with update="manual", after the optimiser's step for example."""
        self.bank.update_(index, unit_rows(x.detach()) if self.normalize else x)

    def extra_repr(self) -> str:
        return (
            f"num_noise={self.num_noise}, temperature={self.temperature}, update={self.update!r}, "
            f"reduction={self.reduction!r}"
        )


def update_in_backward(x: Tensor, index: Tensor, update: Callable[[Tensor, Tensor], object]) -> Tensor:
    """x; its gradient calls ``update(index, x)`` on the way, once all that needs the bank as it was has run."""
    rows: Tensor = _UpdateInBackward.apply(x, index, update)
    return rows


class _UpdateInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, update: Callable[[Tensor, Tensor], object]) -> Tensor:
        ctx.save_for_backward(x, index)
        ctx.update = update
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, index = ctx.saved_tensors
        ctx.update(index, x)
        return grad, None, None
