"""update_rows_: rows of a memory bank moved towards new ones, in place, the same way on every device and run.

    M_y <- normalise(mu M_y + (1 - mu) x)          convention "old": mu weighs what was there
    M_y <- normalise((1 - mu) M_y + mu x)          convention "new": mu weighs what comes

The first is the official code of NPID (Wu, Xiong, Yu, Lin, CVPR 2018), the second that of articles about it; they agree
at mu = 1/2. mu = 0 ("old") writes unit rows, as queues do. An index that comes several times in a batch stands for one
update, from the row as it was: by the last of its rows, by the first, or by their mean.

Cost: B D, and the sorting of B indices. Memory: O(B D).

The interface of an implementation, ``fastret.backends.*.update_rows``:

    update(bank, index, x, momentum, convention, *, normalize, duplicates) -> None

with bank (C, D); index (B,) int64 from 0 to C - 1; x (B, D) in the dtype of accumulation of the bank.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.in_range import in_range
from fastret.ops.library import define

CONVENTIONS = ("old", "new")
DUPLICATES = ("last", "first", "mean")


def update_rows_(
    bank: Tensor,
    index: Tensor,
    x: Tensor,
    *,
    momentum: float = 0.5,
    convention: str = "old",
    normalize: bool = True,
    duplicates: str = "last",
    impl: str | None = None,
) -> Tensor:
    """Update ``bank[index]`` in place; formulas and duplicates stand at the top of this file.

    Args:
        bank: (C, D), any floating dtype; the update is computed in float32, or float64 for float64 rows.
        index: (B,) integers from 0 to C - 1.
        x: (B, D), of the device of the bank; receives no gradient.
        momentum: mu in [0, 1]. convention: "old" or "new".
        normalize: divide by the norm, of which no less than 1e-12 counts (the official code divides 0 by 0).
        duplicates: "last" (the highest place in the batch), "first" or "mean".
        impl: "reference", "tiled", "cpu" or "triton"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Returns:
        The bank.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    check_update(momentum, convention, duplicates)
    checks.check_rows(bank, "bank")
    checks.check_rows(x, "x", like=bank, called="the bank")
    if x.shape[0] and not bank.shape[0]:
        raise ValueError("bank: expected at least one row, got none")
    checks.check_labels(index, x, "index")
    options = ("mean",) if duplicates == "mean" else ()
    chosen = registry.resolve("update_rows", bank.device, bank.dtype, impl, options)
    with torch.no_grad():
        index = in_range(index, bank.shape[0], "index")
        rows = x.detach().to(accumulation_dtype(bank.dtype))
        rule = (momentum, convention, normalize, duplicates)
        torch.ops.fastret.update_rows_.default(bank, index, rows, *rule, chosen)
    return bank


def check_update(momentum: float, convention: str, duplicates: str) -> None:
    """The arguments that make up a rule of updating."""
    checks.check_number(momentum, "momentum")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected a number from 0 to 1, got {momentum}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates: expected one of {', '.join(DUPLICATES)}, got {duplicates!r}")


def _update(
    bank: Tensor,
    index: Tensor,
    x: Tensor,
    momentum: float,
    convention: str,
    normalize: bool,
    duplicates: str,
    impl: str,
) -> None:
    module = registry.IMPLEMENTATIONS[impl].module("update_rows")
    module.update(bank, index, x, momentum, convention, normalize=normalize, duplicates=duplicates)
    torch.autograd.graph.increment_version(bank)  # a graph that needs the old rows is to notice


def _update_fake(*_: Any) -> None:
    return None


define(
    "update_rows_(Tensor(a!) bank, Tensor index, Tensor x, float momentum, str convention, bool normalize, "
    "str duplicates, str impl) -> ()",
    _update,
    _update_fake,
)
