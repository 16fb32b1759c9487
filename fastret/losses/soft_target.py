"""InfoNCE against soft targets, as PatchMix's three contrasts use it.

Shen, Liu, Tang, Qu, Wang: Inter-Instance Similarity Modeling for Contrastive Learning. arXiv 2306.12243. With logits
l_ij = <q_i, k_j> / tau, targets Y (B, C) and R_i = sum over j of Y_ij,

    L = mean over i of R_i lse_j l_ij - sum over j of Y_ij l_ij

A mixed image i holds patches of the images i .. i + m - 1 (modulo B). With smoothing s, and columns counted from the
offset of the local block, Y is (1 - s) times the following, plus s / C everywhere:

    origin: 1 at i      mix-to-origin: 1 / m at i + j, 0 <= j < m      mix-to-mix: (1 - |d| / m) / m at i + d, |d| < m
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends.pairs import Block, Circulant, Dense, Head
from fastret.losses.reduction import check_reduction, over_temperature, reduce_valid, row_weights
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.masked_lse_sum import masked_lse_sum

KINDS = ("origin", "mix-to-origin", "mix-to-mix")


@dataclass(frozen=True)
class PatchMixTargets:
    """Targets of one of PatchMix's contrasts, never stored as a matrix; formulas at the top of this file.

    Attributes:
        kind: "origin", "mix-to-origin" or "mix-to-mix".
        batch: B, rows. m: images mixed.
        smoothing: s in [0, 1].
        offset: column of the first image of the local batch among all keys (rank x B).
        columns: C, the number of keys; None: as many as the loss is given, and offset + batch for ``dense``.

    Raises:
        TypeError: a size that is no integer.
        ValueError: an argument out of its range; B < 2m - 1 with a mixing kind: shifts then meet in one column, which
            the official labels overwrite instead of adding.
    """

    kind: str
    batch: int
    m: int
    smoothing: float = 0.0
    offset: int = 0
    columns: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        checks.check_integer(self.batch, "batch", 1)
        checks.check_integer(self.m, "m", 1)
        checks.check_integer(self.offset, "offset", 0)
        checks.check_count(self.columns, "columns")
        if self.kind != "origin" and self.batch < 2 * self.m - 1:
            raise ValueError(
                f"batch: expected at least 2m - 1 = {2 * self.m - 1} rows for m = {self.m} (with fewer, the circulant "
                f"shifts of the labels collide), got {self.batch}"
            )
        if isinstance(self.smoothing, bool) or not isinstance(self.smoothing, (int, float)):
            raise TypeError(f"smoothing: expected a number, got {type(self.smoothing).__name__}")
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing: expected a number from 0 to 1, got {self.smoothing}")
        if self.columns is not None and self.columns < self.offset + self.batch:
            raise ValueError(
                f"columns: expected at least offset + batch = {self.offset + self.batch}, got {self.columns}"
            )

    def circulant(self) -> Circulant:
        """The targets without their smoothing."""
        m = self.m
        shifts: tuple[int, ...]
        weights: tuple[float, ...]
        if self.kind == "origin":
            shifts, weights = (0,), (1.0,)
        elif self.kind == "mix-to-origin":
            shifts, weights = tuple(range(m)), (1 / m,) * m
        else:
            shifts = tuple(range(1 - m, m))
            weights = tuple((1 - abs(d) / m) / m for d in shifts)
        return Circulant(shifts, weights, self.batch, self.offset)

    def dense(self) -> Tensor:
        """(B, C) float64."""
        columns = self.offset + self.batch if self.columns is None else self.columns
        block = Block(0, self.batch, 0, columns)
        mixed = self.circulant().block(block, torch.empty(0, dtype=torch.float64))
        return (1 - self.smoothing) * mixed + self.smoothing / columns


def soft_target_info_nce(
    query: Tensor,
    key: Tensor,
    targets: Tensor | PatchMixTargets,
    *,
    temperature: float | Tensor = 0.2,
    detach_keys: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy between soft targets and the softmax of scores; formula at the top of this file.

    Args:
        query: (B, D).
        key: (C, D).
        targets: (B, C) real numbers, whatever their row sums; or a ``PatchMixTargets``. They receive no gradient.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        detach_keys: keys are constants, as in the official code.
        normalize: cosine scores; False: dot products of the rows as given.
        reduction: "mean", "sum", or "none": (B,).
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(query, "query")
    checks.check_rows(key, "key", like=query)
    checks.check_positive(temperature, "temperature")
    check_reduction(reduction)
    b, c = query.shape[0], key.shape[0]
    key = key.detach() if detach_keys else key
    scale = over_temperature(temperature, query)
    if isinstance(targets, PatchMixTargets):
        _check_fit(targets, b, c)
        head = Head(scale, target=targets.circulant(), smoothing=float(targets.smoothing))
        if reduction != "none":
            weight = row_weights(query, None, reduction)
            return masked_lse_sum(query, key, head=head, row_weight=weight, normalize=normalize, impl=impl)
        ((lse, t),) = masked_lse(query, key, heads=[head], normalize=normalize, impl=impl)
        return lse - t
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        given = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets: expected a floating point tensor or a PatchMixTargets, got {given}")
    if targets.shape != (b, c):
        raise ValueError(f"targets: expected shape {(b, c)}, a column per key, got {tuple(targets.shape)}")
    if targets.device != query.device:
        raise ValueError(f"targets: expected device {query.device} like the queries, got {targets.device}")
    targets = targets.detach()
    if b and not c:
        raise ValueError("key: expected at least one row, got none")
    head = Head(scale, target=Dense(targets))
    ((lse, t),) = masked_lse(query, key, heads=[head], normalize=normalize, impl=impl)
    losses = targets.sum(1, dtype=lse.dtype) * lse - t
    return reduce_valid(losses, None, reduction)


def _check_fit(targets: PatchMixTargets, b: int, c: int) -> None:
    if targets.batch != b:
        raise ValueError(f"targets: expected a batch of {b} like the queries, got {targets.batch}")
    columns = targets.offset + targets.batch if targets.columns is None else targets.columns
    if c < columns or (targets.columns is not None and c != columns):
        raise ValueError(f"targets: expected columns for {c} keys, got {columns}")


class SoftTargetInfoNCE(nn.Module):
    """InfoNCE against soft targets: ``SoftTargetInfoNCE(0.2)(query, key, PatchMixTargets("mix-to-mix", B, m))``.

    L = mean over i of R_i lse_j(<q_i, k_j> / tau) - sum over j of Y_ij <q_i, k_j> / tau,   R_i = sum over j of Y_ij

    Cost: two matmuls of B C D for loss and gradient with detached keys and structured targets. Memory: O(B + C) and
    the gradients, beyond dense targets where they are given.

    Args:
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        normalize, reduction, impl: as in ``fastret.functional.soft_target_info_nce``, and so are the errors raised.
    """

    citation: ClassVar[str] = (
        "@article{shen2023inter, title={Inter-Instance Similarity Modeling for Contrastive Learning}, "
        "author={Shen, Chengchao and Liu, Dawei and Tang, Hao and Qu, Zhe and Wang, Jianxin}, "
        "journal={arXiv preprint arXiv:2306.12243}, year={2023}}"
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
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
        self, query: Tensor, key: Tensor, targets: Tensor | PatchMixTargets, *, detach_keys: bool = True
    ) -> Tensor:
        """Loss of ``query`` (B, D) against ``key`` (C, D) with ``targets`` (B, C) or structured."""
        return soft_target_info_nce(
            query,
            key,
            targets,
            temperature=self.temperature,
            detach_keys=detach_keys,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
