"""PatchMix's mixer with the released code's constructor: images and the soft targets of their contrasts in one call.

Shen, Liu, Tang, Qu, Wang: Inter-Instance Similarity Modeling for Contrastive Learning. arXiv 2306.12243. The images are
``fastret.functional.patchmix`` of the batch, the targets ``fastret.PatchMixTargets``.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastret.losses.patchmix import PatchMixLoss
from fastret.losses.soft_target import PatchMixTargets
from fastret.ops import checks
from fastret.ops.patchmix import patchmix

Targets = Tensor | PatchMixTargets


class PatchMixer:
    """Mixes a batch, as a whole or not at all: ``PatchMixer(len(batch), mix_s=16, mix_n=2, mix_p=1.0)(images, None)``.

    With probability ``mix_p`` it returns the mixed images and their targets, mix-to-origin and mix-to-mix; otherwise,
    or where m = 1 was drawn, the images as they are, and one-hot targets twice.

    Cost: the images read and written once. Memory: the result; dense targets add twice B C numbers.

    Args:
        num_classes: C, columns of the targets: images of all processes' batches.
        mix_s: side of a patch in pixels, or several, one of which is drawn for a batch.
        mix_n: m, images mixed into each, or several likewise.
        mix_p: how often a batch is mixed, in [0, 1].
        smoothing: s of the targets, in [0, 1]; the released configurations have 0.
        offset: column of this process's first image: its rank times B. (The released code asks torch.distributed.)
        dense: targets as matrices (B, C) float32, as in the released code; False: as ``PatchMixTargets``, of which no
            matrix is ever made.
        generator: a CPU generator of all that is drawn; None: PyTorch's own.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    citation: ClassVar[str] = PatchMixLoss.citation

    def __init__(
        self,
        num_classes: int,
        mix_s: int | Sequence[int],
        mix_n: int | Sequence[int] = 1,
        mix_p: float = 0.0,
        smoothing: float = 0.1,
        *,
        offset: int = 0,
        dense: bool = True,
        generator: torch.Generator | None = None,
        impl: str | None = None,
    ) -> None:
        self.mix_s, self.mix_n = _choices(mix_s, "mix_s"), _choices(mix_n, "mix_n")
        checks.check_number(mix_p, "mix_p")
        if not 0 <= mix_p <= 1:
            raise ValueError(f"mix_p: expected a probability from 0 to 1, got {mix_p}")
        checks.check_integer(num_classes, "num_classes", 1)
        PatchMixTargets("origin", 1, 1, smoothing=smoothing, offset=offset)  # checks both
        self.num_classes, self.mix_p, self.smoothing, self.offset = num_classes, mix_p, smoothing, offset
        self.dense, self.generator, self.impl = dense, generator, impl

    @torch.no_grad()
    def __call__(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Targets, Targets]:
        """Images, the targets against keys of whole images, and those against keys of images mixed alike.

        Args:
            x: (B, C, H, W), or (B, T, D) with patches of 1; left as it is.
            target: (B,) columns of the images, read for dense targets of a batch that is not mixed; None: offset + b.
        """
        share = torch.rand((), generator=self.generator, dtype=torch.float64)
        patch, m = (self._draw(choices) for choices in (self.mix_s, self.mix_n))
        if share >= self.mix_p or m == 1:
            origin = self._targets("origin", x, 1)
            if target is not None and self.dense:
                origin = self._one_hot(target, x)
            return x, origin, origin
        mixed = patchmix(x, patch, m, generator=self.generator, impl=self.impl)
        return mixed, self._targets("mix-to-origin", x, m), self._targets("mix-to-mix", x, m)

    def _draw(self, choices: tuple[int, ...]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def _targets(self, kind: str, x: Tensor, m: int) -> Targets:
        targets = PatchMixTargets(kind, len(x), m, self.smoothing, self.offset, self.num_classes)
        return targets.dense().to(x.device, torch.float32) if self.dense else targets

    def _one_hot(self, target: Tensor, x: Tensor) -> Tensor:
        checks.check_labels(target, x, "target")
        checks.check_range(target, self.num_classes, "target")
        result = x.new_full((len(x), self.num_classes), self.smoothing / self.num_classes, dtype=torch.float32)
        return result.scatter_add_(1, target.long()[:, None].to(x.device), result.new_ones(len(x), 1) - self.smoothing)


def _choices(given: int | Sequence[int], name: str) -> tuple[int, ...]:
    """One number or several, all at least 1."""
    choices = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not choices:
        raise ValueError(f"{name}: expected a number or several, got none")
    for choice in choices:
        checks.check_integer(choice, name, 1)
    return choices
