"""The modules of NPID's released code, with its constructors, buffers and results, on fastret's ops.

    NCEAverage(D, C, K)(x, y) -> P (B, K + 1)        P_ik = exp(<x_i, M_{c_ik}> / T) / Z, the image's own first
    NCECriterion(C)(P, y) -> loss (1,)               as ``fastret.functional.nce``, eps = 1e-7
    LinearAverage(D, C)(x, y) -> (B, C)              <x_i, M_j> / T, for a cross-entropy

Each forward's rows update ``memory`` in its backward; a second backward of one graph raises, and so does torch.compile,
with fullgraph=True or without, and torch.func. Across processes they are used as ``fastret.NPID`` is, which is the
first two in one, and in logarithms; ``fastret.InstanceSoftmax`` is the third with its cross-entropy, without the (B, C)
matrix.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastret.losses.memory_bank import INITS
from fastret.losses.npid import NPID, update_in_backward
from fastret.losses.stays_float32 import StaysFloat32
from fastret.ops import checks
from fastret.ops.eager_only import eager_only
from fastret.ops.in_range import in_range
from fastret.ops.sampled_dot import sampled_dot
from fastret.ops.update_rows import check_update, update_rows_

EPS = 1e-7


class NCEAverage(StaysFloat32):
    """Likelihoods of the image and of K drawn ones: ``NCEAverage(128, len(data), 4096)(x, index)``.

    Memory: a few times B (K + 1) scores, where the released code gathers B (K + 1) rows.

    Args:
        inputSize: D. outputSize: C, images. K: noise columns, at least 1.
        T: temperature. momentum: mu, of the old row.
        Z: ignored, as in the released code: the first forward whose Z is finite sets it, in evaluation too.

    Attributes:
        draws: 0-dim int64, which a state of the released code does not have and is loaded without.
        memory: (C, D). params: [K, T, Z, momentum], where Z is -1 until it is set; of a checkpoint's, Z alone is taken,
            the others are the constructor's. float32 whatever ``half()`` or ``to()`` make of the memory.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    citation: ClassVar[str] = NPID.citation
    stays: ClassVar[str] = "params"
    memory: Tensor
    params: Tensor
    draws: Tensor

    def __init__(
        self,
        inputSize: int,
        outputSize: int,
        K: int,
        T: float = 0.07,
        momentum: float = 0.5,
        Z: float | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer(K, "K", 1)
        self.K, self.T, self.momentum = K, T, momentum
        self.register_buffer("memory", _memory(inputSize, outputSize, T, momentum))
        self.register_buffer("params", torch.tensor([K, T, -1.0, momentum]))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_without_draws)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, K + 1) of ``x`` (B, D), unit rows, the images ``y`` (B,)."""
        x = _updating(self, x, y, self.memory, self.momentum)
        likelihood = (sampled_dot(x, self.memory, first=y, count=self.K, seed=self.draws.clone()) / self.T).exp()
        self.draws += 1 << 32
        kept = self.params[2]
        of_batch = likelihood.detach().mean() * self.memory.shape[0]
        Z = torch.where((kept > 0) & kept.isfinite(), kept, of_batch)
        self.params[2] = torch.where(Z.isfinite(), Z, -1.0)  # one overflow, or an empty batch, is not to be for good
        return likelihood / Z


class NCECriterion(nn.Module):
    """NCE loss of ``NCEAverage``'s likelihoods: ``NCECriterion(len(data))(P, index)``.

    L = -mean over i of log(P_i0 / (P_i0 + c)) + sum over k >= 1 of log(c0 / (P_ik + c)),   c0 = K / C, c = c0 + 1e-7

    Args:
        nLem: C, images.
    """

    citation: ClassVar[str] = NPID.citation

    def __init__(self, nLem: int) -> None:
        super().__init__()
        checks.check_integer(nLem, "nLem", 1)
        self.nLem = nLem

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """(1,) loss of ``x`` (B, K + 1); the targets, which the first column stands for, are not read."""
        checks.check_rows(x, "x")
        ratio = (x.shape[1] - 1) / self.nLem
        c = ratio + EPS
        own, noise = x[:, 0], x[:, 1:]
        return (torch.log1p(c / own).sum() + torch.log((noise + c) / ratio).sum()).reshape(1) / max(1, x.shape[0])


class LinearAverage(StaysFloat32):
    """Scores against every row of a memory: ``LinearAverage(128, len(data))(x, index)``, for a cross-entropy.

    Memory: (B, C) logits, which are its result; ``fastret.InstanceSoftmax`` is the loss without them.

    Args:
        inputSize: D. outputSize: C, images. T: temperature. momentum: mu, of the old row.

    Attributes:
        memory: (C, D). params: [T, momentum], float32.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    citation: ClassVar[str] = NPID.citation
    stays: ClassVar[str] = "params"
    memory: Tensor
    params: Tensor

    def __init__(self, inputSize: int, outputSize: int, T: float = 0.07, momentum: float = 0.5) -> None:
        super().__init__()
        self.T, self.momentum = T, momentum
        self.register_buffer("memory", _memory(inputSize, outputSize, T, momentum))
        self.register_buffer("params", torch.tensor([T, momentum]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, C), in the wider dtype of the two, of ``x`` (B, D), unit rows, the images ``y`` (B,)."""
        x = _updating(self, x, y, self.memory, self.momentum)
        wide = torch.promote_types(x.dtype, self.memory.dtype)
        return x.to(wide) @ self.memory.to(wide).T / self.T


def _without_draws(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.setdefault(f"{prefix}draws", torch.zeros((), dtype=torch.int64))


def _memory(inputSize: int, outputSize: int, T: float, momentum: float) -> Tensor:
    checks.check_integer(inputSize, "inputSize", 1)
    checks.check_integer(outputSize, "outputSize", 1)
    checks.check_positive(T, "T")
    check_update(momentum, "old", "last")
    return INITS["uniform"](torch.empty(outputSize, inputSize))


def _updating(module: nn.Module, x: Tensor, y: Tensor, memory: Tensor, momentum: float) -> Tensor:
    """x, whose backward updates the memory."""
    checks.check_rows(x, "x", like=memory, called="the memory")
    if (x.dtype == torch.float64) != (memory.dtype == torch.float64):
        raise TypeError(f"x: expected float64 exactly where the memory is, got {x.dtype} and {memory.dtype}")
    checks.check_labels(y, x, "y")
    y = in_range(y, memory.shape[0], "y")
    name = type(module).__name__
    x = eager_only(x, f"{name}: its update in backward is eager only; fastret.NPID(update='manual') compiles")
    return update_in_backward(x, y, lambda index, rows: update_rows_(memory, index, rows, momentum=momentum))
