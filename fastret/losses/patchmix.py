"""PatchMix's contrasts of one step: views, mixed views and crops, against keys that receive no gradient.

Shen, Liu, Tang, Qu, Wang: Inter-Instance Similarity Modeling for Contrastive Learning. arXiv 2306.12243, with the
weights of the released code. Of two views x1, x2 and their mixtures M1, M2 (``fastret.functional.patchmix``, each with
a permutation of its own), L(q, k, Y) being InfoNCE against soft targets and Y those of ``fastret.PatchMixTargets``:

      1   L(q(x1), k(x2), origin)
    + 1/2 L(q(M2), k(x1), mix-to-origin)
    + 1/2 L(q(M2), k(M1), mix-to-mix)
    + 1/V sum over crops v of L(q(v), k(x1), origin) + L(q(v), k(x2), origin)
    + 1/V sum over crops v of L(q(M v), k(x1), mix-to-origin) + L(q(M v), k(x2), mix-to-origin)

3 + 4 V contrasts, 35 for V = 8. Queries that meet the same keys with the same kind of target are rows of one sweep,
weighted: 5 sweeps whatever V is (3 without crops).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends.pairs import Circulant, Head
from fastret.losses.reduction import over_temperature, row_weights
from fastret.losses.soft_target import PatchMixTargets
from fastret.ops import checks
from fastret.ops.masked_lse_sum import masked_lse_sum


class PatchMixLoss(nn.Module):
    """The step's loss of PatchMix: ``PatchMixLoss(2)(q1, k1, k2, mixed_q2, mixed_k1)``; formula: top of this file.

    Cost: a matmul of rows x keys x D for each of the contrasts, and one for its gradient. Memory: O(B + keys) and the
    gradients of the queries.

    Args:
        m: images mixed into each, at least 1; a batch has at least 2 m - 1.
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        weights: of the three contrasts of whole views; 1, 1/2, 1/2 in the released code. Crops weigh 1 / V each.
        smoothing: of the targets, in [0, 1]; 0 in the released configurations.
        normalize: cosine scores; False: dot products of the rows as given.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    citation: ClassVar[str] = (
        "@article{shen2023inter, title={Inter-Instance Similarity Modeling for Contrastive Learning}, "
        "author={Shen, Chengchao and Liu, Dawei and Tang, Hao and Qu, Zhe and Wang, Jianxin}, "
        "journal={arXiv preprint arXiv:2306.12243}, year={2023}}"
    )

    def __init__(
        self,
        m: int = 2,
        temperature: float | Tensor = 0.2,
        *,
        weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
        smoothing: float = 0.0,
        normalize: bool = True,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive(temperature, "temperature")
        PatchMixTargets("origin", 1, m, smoothing=smoothing)  # checks both
        if len(weights) != 3:
            raise ValueError(f"weights: expected three, got {len(weights)}")
        for weight in weights:
            checks.check_number(weight, "weights")
        self.m, self.temperature, self.weights = m, temperature, tuple(weights)
        self.smoothing, self.normalize, self.impl = smoothing, normalize, impl

    def forward(
        self,
        q1: Tensor,
        k1: Tensor,
        k2: Tensor,
        mixed_q2: Tensor,
        mixed_k1: Tensor,
        *,
        crops: Tensor | None = None,
        mixed_crops: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """The loss of one step.

        Args:
            q1: (B, D) queries of view 1. mixed_q2: (B, D) of the mixture of view 2.
            k1, k2: (C, D) keys of the views, of all processes. mixed_k1: (C, D) of the mixture of view 1.
            crops: (V B, D) queries of the crops, one crop of all images after another. mixed_crops: of their mixtures.
            offset: column of this process's first image among the keys: its rank times B.

        Returns:
            0-dim; gradients go to the queries and the temperature.
        """
        batch = self._check(q1, k1, k2, mixed_q2, mixed_k1, crops, mixed_crops, offset)
        origin, mixed = [(q1, self.weights[0])], [(mixed_q2, self.weights[1])]
        of_crops = [] if crops is None else [(crops, 1.0)]
        of_mixed_crops = [] if mixed_crops is None else [(mixed_crops, 1.0)]
        contrasts = [
            (origin + of_crops, k2, "origin"),
            (of_crops, k1, "origin"),
            (mixed + of_mixed_crops, k1, "mix-to-origin"),
            (of_mixed_crops, k2, "mix-to-origin"),
            ([(mixed_q2, self.weights[2])], mixed_k1, "mix-to-mix"),
        ]
        return torch.stack(
            [self._contrast(queries, key, kind, batch, offset) for queries, key, kind in contrasts if queries]
        ).sum()

    def _contrast(self, queries: list[tuple[Tensor, float]], key: Tensor, kind: str, batch: int, offset: int) -> Tensor:
        """Of several (rows, weight of their mean) against the same keys, in one sweep."""
        rows = queries[0][0] if len(queries) == 1 else torch.cat([q for q, _ in queries])
        weight = torch.cat([row_weights(q, None, "mean") * w for q, w in queries])
        target: Circulant = PatchMixTargets(kind, batch, self.m, offset=offset).circulant()
        scale = over_temperature(self.temperature, rows)
        head = Head(scale, target=target, smoothing=float(self.smoothing))
        return masked_lse_sum(
            rows, key.detach(), head=head, row_weight=weight, normalize=self.normalize, impl=self.impl
        )

    def _check(
        self,
        q1: Tensor,
        k1: Tensor,
        k2: Tensor,
        mixed_q2: Tensor,
        mixed_k1: Tensor,
        crops: Tensor | None,
        mixed_crops: Tensor | None,
        offset: int,
    ) -> int:
        """B."""
        checks.check_rows(q1, "q1")
        batch = q1.shape[0]
        PatchMixTargets("mix-to-mix", batch, self.m)  # a batch that is too small for m
        checks.check_integer(offset, "offset", 0)
        for name, rows in (("mixed_q2", mixed_q2), ("k1", k1), ("k2", k2), ("mixed_k1", mixed_k1)):
            checks.check_rows(rows, name, like=q1, called="q1")
        if mixed_q2.shape[0] != batch:
            raise ValueError(f"mixed_q2: expected {batch} rows like q1, got {mixed_q2.shape[0]}")
        for name, rows in (("k1", k1), ("k2", k2), ("mixed_k1", mixed_k1)):
            if rows.shape[0] < offset + batch:
                raise ValueError(f"{name}: expected at least offset + B = {offset + batch} keys, got {rows.shape[0]}")
        for name, extra in (("crops", crops), ("mixed_crops", mixed_crops)):
            if extra is not None:
                checks.check_rows(extra, name, like=q1, called="q1")
                if not extra.shape[0] or extra.shape[0] % batch:
                    raise ValueError(f"{name}: expected a multiple of the {batch} images, got {extra.shape[0]} rows")
        return batch

    def extra_repr(self) -> str:
        return f"m={self.m}, temperature={self.temperature}, weights={self.weights}"
