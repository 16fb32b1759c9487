"""A memory of embeddings, one row an image, or a queue of the latest ones."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastret.backends.rows import accumulation_dtype, unit_rows
from fastret.ops import checks
from fastret.ops.update_rows import check_update, update_rows_

INITS: dict[str, Callable[[Tensor], Tensor]] = {
    # of the official code of NPID: of unit length in the mean
    "uniform": lambda rows: rows.uniform_(-math.sqrt(3 / rows.shape[1]), math.sqrt(3 / rows.shape[1])),
    "normal": lambda rows: rows.copy_(unit_rows(rows.normal_())),
    "zeros": lambda rows: rows.zero_(),
}


class MemoryBank(nn.Module):
    """(size, dim) embeddings that outlive their batch: ``bank.update_(index, x)``, or a queue by ``bank.enqueue_(x)``.

        update_:    M_y <- normalise(mu M_y + (1 - mu) x)          ("new": the weights change places)
        enqueue_:   x take the places of the oldest rows

    NPID keeps a row for every image (Wu, Xiong, Yu, Lin, CVPR 2018), MoCo (He et al., CVPR 2020) and cross-batch memory
    (Wang et al., CVPR 2020) the rows of the latest batches. Updates are the same in every run, duplicates included, are
    no part of a graph, and wait for no device. All state is in the state_dict.

    Across processes each bank is its process's own: gather (index, x), or (x, labels), from all ranks in the order of
    the ranks, and give every bank the same; banks that start equal then stay so. Wrap them with
    ``DistributedDataParallel(broadcast_buffers=False)``: otherwise every forward sends the whole memory.

    Args:
        size: rows. dim: D.
        momentum: mu in [0, 1]. convention: "old", mu weighs the old row (official NPID); "new", the new one.
        duplicates: an image that comes twice in a batch: "last", "first" or "mean" of its rows.
        normalize: keep unit rows, those of ``enqueue_`` too.
        init: "uniform" on (-sqrt(3 / D), sqrt(3 / D)) as the official code; "normal", unit rows; "zeros".
        dtype: of the rows; None: torch's default.

    Attributes:
        memory: (size, dim).
        labels: (size,) int64, of the rows that were enqueued with labels; -1 elsewhere.
        pointer: 0-dim int64, where ``enqueue_`` writes next. filled: 0-dim int64, rows enqueued so far, up to size.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    citation: ClassVar[str] = (
        "@inproceedings{wu2018unsupervised, "
        "title={Unsupervised Feature Learning via Non-Parametric Instance Discrimination}, "
        "author={Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua}, "
        "booktitle={Conference on Computer Vision and Pattern Recognition}, year={2018}}"
    )
    memory: Tensor
    labels: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        momentum: float = 0.5,
        convention: str = "old",
        duplicates: str = "last",
        normalize: bool = True,
        init: str = "uniform",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer(size, "size", 1)
        checks.check_integer(dim, "dim", 1)
        check_update(momentum, convention, duplicates)
        if init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
        if dtype is not None and dtype not in checks.FLOATS:
            raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
        self.size, self.dim = size, dim
        self.momentum, self.convention, self.duplicates, self.normalize = momentum, convention, duplicates, normalize
        self.register_buffer("memory", INITS[init](torch.empty(size, dim, dtype=dtype)))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def update_(self, index: Tensor, x: Tensor) -> "MemoryBank":
        """Move rows ``index`` (B,) towards ``x`` (B, D)."""
        update_rows_(
            self.memory,
            index,
            x,
            momentum=self.momentum,
            convention=self.convention,
            normalize=self.normalize,
            duplicates=self.duplicates,
        )
        return self

    @torch.no_grad()
    def enqueue_(self, x: Tensor, labels: Tensor | None = None) -> "MemoryBank":
        """Put ``x`` (B, D), B <= size, with ``labels`` (B,) in the places of the oldest rows."""
        checks.check_rows(x, "x", like=self.memory, called="the memory")
        if x.shape[0] > self.size:
            raise ValueError(f"x: expected at most {self.size} rows, the size of the queue, got {x.shape[0]}")
        if labels is not None:
            checks.check_labels(labels, x, "labels")
        place = (self.pointer + torch.arange(x.shape[0], device=x.device)) % self.size
        rows = x.detach().to(accumulation_dtype(x.dtype))
        self.memory[place] = (unit_rows(rows) if self.normalize else rows).to(self.memory.dtype)
        self.labels[place] = place.new_full(place.shape, -1) if labels is None else labels.to(torch.int64)
        self.pointer.copy_((self.pointer + x.shape[0]) % self.size)
        self.filled.copy_((self.filled + x.shape[0]).clamp_max(self.size))
        return self

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, momentum={self.momentum}, convention={self.convention!r}"
