"""What losses with one learned vector a class, a proxy, share: the parameter, its initialisation, their checks.

With several centres a class, proxies are (C, K, D), and all K start near the class' own direction, each with random
noise of a tenth of its length: centres that are equal would stay so.

Proxies that start at random need many epochs before they say anything about their classes: with 20,000 classes a short
run only gets worse. ``init_from`` puts them where the classes lie: with unit embeddings u and their mean m, the proxy
of class c is the direction of the mean over its rows of u - m. Embeddings of an untrained network lie in a narrow
cone; without m all proxies would point the same way.
"""

import math
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastret.backends.pairs import Head, Indexed, Listed
from fastret.backends.rows import accumulation_dtype, unit_rows
from fastret.losses.reduction import check_reduction, reduce_valid, row_weights
from fastret.ops import checks
from fastret.ops.masked_lse import masked_lse
from fastret.ops.masked_lse_sum import masked_lse_sum

ClassLabels = Tensor | Sequence[Sequence[int] | Tensor]

_NOISE = 0.1  # length of what tells the centres of a class apart at first, beside that of their mean


def check_proxies(x: Tensor, proxies: Tensor, labels: Tensor, name: str = "proxies") -> Tensor:
    """The arguments of a loss of rows (B, D) against a proxy a class (C, D), called ``name``; labels as int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected; also C < 2, and a label that
            no class has (on a GPU by device assert, without waiting for it).
    """
    _check_pair(x, proxies, name)
    checks.check_labels(labels, x, "labels")
    return _classes(labels, proxies)


def _check_pair(x: Tensor, proxies: Tensor, name: str) -> None:
    checks.check_rows(x, "x")
    checks.check_rows(proxies, name, like=x)
    if proxies.shape[0] < 2:
        raise ValueError(f"{name}: expected at least 2 rows, one a class, got {proxies.shape[0]}")


def _classes(labels: Tensor, proxies: Tensor) -> Tensor:
    labels = labels.long()  # before its values are compared with a number its own dtype may not hold
    checks.check_range(labels, proxies.shape[0], "labels")
    return labels


def class_targets(x: Tensor, proxies: Tensor, labels: ClassLabels) -> tuple[Indexed | Listed, Tensor | None]:
    """Targets of rows against a proxy a class, and which rows have any (None: all).

    Args:
        labels: (B,) integers; or B sequences of integers, where a row has several classes: they share the target
            equally, one that is named twice has two shares, and a row without any is not to be counted.

    Raises:
        TypeError, ValueError: as ``check_proxies``.
    """
    if isinstance(labels, Tensor):
        return Indexed(check_proxies(x, proxies, labels)), None
    if not isinstance(labels, Sequence) or not all(isinstance(own, (Sequence, Tensor)) for own in labels):
        raise TypeError(f"labels: expected a tensor (B,) or a sequence of sequences, got {type(labels).__name__}")
    _check_pair(x, proxies, "proxies")
    if len(labels) != x.shape[0]:
        raise ValueError(f"labels: expected {x.shape[0]} sequences, one a row, got {len(labels)}")
    given = [torch.as_tensor(own, device=x.device) for own in labels if len(own)]  # an empty list has no integer dtype
    index = torch.cat(given) if given else torch.empty(0, dtype=torch.int64, device=x.device)
    checks.check_labels(index, index, "labels")
    count = torch.tensor([len(own) for own in labels], dtype=torch.int64)
    share = 1 / count.clamp_min(1).to(accumulation_dtype(x.dtype))
    offsets, weight = nn.functional.pad(count.cumsum(0), (1, 0)), share.repeat_interleave(count)
    listed = Listed(offsets.to(x.device), _classes(index, proxies), weight.to(x.device))
    return listed, (count > 0).to(x.device)


def softmax_losses(
    x: Tensor, proxies: Tensor, head: Head, valid: Tensor | None, reduction: str, impl: str | None
) -> Tensor:
    """lse - t of one head, over rows that are valid."""
    if reduction != "none":
        weight = row_weights(x, valid, reduction)
        return masked_lse_sum(x, proxies, head=head, row_weight=weight, impl=impl)
    ((lse, t),) = masked_lse(x, proxies, heads=[head], impl=impl)
    return reduce_valid(lse - t, valid, reduction)


class ProxyLoss(nn.Module):
    """Owns the proxies of a loss over classes 0 .. C - 1.

    Args:
        nb_classes: C >= 2. sz_embed: D >= 1, the width of the embeddings.
        centers: K >= 1 centres a class; None: one proxy a class.
        reduction: "mean", "sum", or "none". impl: "reference", "tiled", "cpu" or "triton"; None: the fastest.

    Attributes:
        proxies: (C, D) parameter, or (C, K, D), drawn from a normal distribution of deviation 1/8.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    def __init__(
        self,
        nb_classes: int,
        sz_embed: int,
        *,
        centers: int | None = None,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        sizes = [(nb_classes, "nb_classes", 2), (sz_embed, "sz_embed", 1)]
        if centers is not None:
            sizes.insert(1, (centers, "centers_per_class", 1))
        for value, name, least in sizes:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        check_reduction(reduction)
        self.proxies = nn.Parameter(torch.randn([value for value, *_ in sizes]) / 8)
        self.reduction = reduction
        self.impl = impl

    @torch.no_grad()
    def init_from(self, embeddings: Tensor, labels: Tensor) -> None:
        """Proxies of unit length at the class means of ``embeddings`` (N, D) with ``labels`` (N,), as described at the
        top of this file. A class without a row, or whose mean is that of all rows, gets a random direction.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected.
        """
        sums, counts = self._nothing()
        self._accumulate(sums, counts, embeddings, labels)
        self._start(sums, counts)

    @torch.no_grad()
    def init_from_loader(self, model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
        """``init_from`` the embeddings of a whole data set: one pass of ``model`` in eval mode, without gradients.

        Only the sums of the classes are kept, (C, D). Every module gets its own mode back.

        Args:
            model: maps a batch of inputs to embeddings (N, D); inputs are moved to the device of its parameters.
            loader: batches (inputs, labels), for example a ``torch.utils.data.DataLoader``.

        Raises:
            TypeError, ValueError: as ``init_from``.
        """
        sums, counts = self._nothing()
        device = next((p.device for p in model.parameters()), self.proxies.device)
        from tqdm import tqdm

        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            bar = tqdm(loader, desc="class means", unit="batch", mininterval=0.1 if sys.stderr.isatty() else 10)
            for inputs, labels in bar:
                self._accumulate(sums, counts, model(inputs.to(device)), labels)
            if not counts.any():
                raise ValueError("loader: expected at least one row, got none")
        finally:
            for module, mode in modes:
                module.training = mode
        self._start(sums, counts)

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """Sums (C, D) and counts (C, 1) of no rows."""
        classes, *_, width = self.proxies.shape
        sums = self.proxies.new_zeros(classes, width, dtype=accumulation_dtype(self.proxies.dtype))
        return sums, sums.new_zeros(classes, 1)

    def _accumulate(self, sums: Tensor, counts: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        checks.check_rows(embeddings, "embeddings")
        if embeddings.shape[1] != sums.shape[1]:
            raise ValueError(
                f"embeddings: expected {sums.shape[1]} columns like the proxies, got {embeddings.shape[1]}"
            )
        embeddings, labels = embeddings.to(sums.device), labels.to(sums.device)
        labels = check_proxies(embeddings, sums, labels)
        sums.index_add_(0, labels, unit_rows(embeddings).to(sums.dtype))
        counts.index_add_(0, labels, counts.new_ones(len(labels), 1))

    def _start(self, sums: Tensor, counts: Tensor) -> None:
        means = sums / counts.clamp_min(1) - sums.sum(0) / counts.sum().clamp_min(1)
        nowhere = (counts == 0) | (means == 0).all(1, keepdim=True)
        starts = unit_rows(torch.where(nowhere, torch.randn_like(means), means))
        if self.proxies.dim() == 3:
            noise = torch.randn_like(self.proxies, dtype=starts.dtype) * (_NOISE / math.sqrt(starts.shape[1]))
            starts = unit_rows((starts[:, None] + noise).flatten(0, 1)).view_as(noise)
        self.proxies.copy_(starts)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.proxies.shape))}, reduction={self.reduction!r}"
