"""Sub-centres: a class has K consecutive columns of the pair matrix, and their scores become one before anything else.

Of the scores s_1 .. s_K of a row with the centres of a class,

    max (SubCenterArcFace):              r = max over k of s_k,          dr/ds_k = 1 at the first k that has it, else 0
    a temperature gamma (SoftTriple):    r = sum over k of q_k s_k,      dr/ds_k = q_k (1 + (s_k - r) / gamma),
                                         q = softmax(s / gamma)

Masks, biases, targets and log-sum-exps then see r: a column is a class.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = -1000.0  # e to this is 0 in every dtype, and times this still 0


@dataclass(frozen=True)
class Centers:
    """``count`` centres a class, K >= 1, reduced by a softmax over ``temperature``, or, None, by the maximum."""

    count: int
    temperature: float | None = None

    def reduce(self, scores: Tensor) -> Tensor:
        """r (N, C) of scores (N, C K); differentiable, twice."""
        s = self._grouped(scores)
        if self.temperature is None:
            return s.max(2).values
        weights = _softmax(self._exponents(s, self.temperature))
        return (weights * s).sum(2)

    def expand(self, slopes: Tensor, scores: Tensor) -> Tensor:
        """Gradient of the scores (N, C K) from that of r (N, C)."""
        s = self._grouped(scores)
        if self.temperature is None:
            return torch.zeros_like(s).scatter_(2, s.argmax(2, keepdim=True), slopes[:, :, None]).flatten(1)
        z = self._exponents(s, self.temperature)
        weights = _softmax(z)
        z = z.sub_((weights * z).sum(2, keepdim=True)).add_(1)
        return z.mul_(weights).mul_(slopes[:, :, None]).flatten(1)

    def _grouped(self, scores: Tensor) -> Tensor:
        n, columns = scores.shape
        return scores.view(n, columns // self.count, self.count)

    @staticmethod
    def _exponents(s: Tensor, temperature: float) -> Tensor:
        """s / gamma less its greatest: neither overflows, whatever gamma is."""
        return ((s - s.detach().amax(2, keepdim=True)) * (1 / temperature)).clamp_min(_LEAST)


def _softmax(z: Tensor) -> Tensor:
    """Of exponents <= 0 of which one is 0; torch.softmax over a short last dimension is many times slower."""
    e = z.exp()
    return e / e.sum(2, keepdim=True)
