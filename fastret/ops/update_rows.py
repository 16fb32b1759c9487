"""update_rows_: rows of a memory bank moved towards new ones, in place, the same way on every device and run.

    M_y <- normalise(mu M_y + (1 - mu) x)          convention "old": mu weighs what was there
    M_y <- normalise((1 - mu) M_y + mu x)          convention "new": mu weighs what comes

The first is the official code of NPID (Wu, Xiong, Yu, Lin, CVPR 2018), the second that of articles about it; they agree
at mu = 1/2. mu = 0 ("old") writes unit rows, as queues do. An index that comes several times in a batch stands for one
update, from the row as it was: by the last of its rows, by the first, or by their mean.

Cost: B D, and the sorting of B indices. Memory: O(B D).
"""

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype, row_norms
from fastret.ops import checks
from fastret.ops.in_range import in_range
from fastret.ops.segment_mean import segment_mean

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
) -> Tensor:
    """Update ``bank[index]`` in place; formulas and duplicates stand at the top of this file.

    Args:
        bank: (C, D), any floating dtype; the update is computed in float32, or float64 for float64 rows.
        index: (B,) integers from 0 to C - 1.
        x: (B, D), of the device of the bank; receives no gradient.
        momentum: mu in [0, 1]. convention: "old" or "new".
        normalize: divide by the norm, of which no less than 1e-12 counts (the official code divides 0 by 0).
        duplicates: "last" (the highest place in the batch), "first" or "mean".

    Returns:
        The bank.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    check_update(momentum, convention, duplicates)
    checks.check_rows(bank, "bank")
    if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] != bank.shape[1]:
        raise ValueError(f"x: expected {bank.shape[1]} columns like the bank, got {x.shape[1]}")
    checks.check_rows(x, "x", like=bank)
    checks.check_labels(index, x, "index")
    with torch.no_grad(), torch.autocast(bank.device.type, enabled=False):
        index = in_range(index, bank.shape[0], "index")
        wide = accumulation_dtype(bank.dtype)
        new = _one_of_each(index, x.detach().to(wide), duplicates)
        kept, taken = (momentum, 1 - momentum) if convention == "old" else (1 - momentum, momentum)
        rows = kept * bank[index].to(wide) + taken * new
        if normalize:
            rows = rows / row_norms(rows)
        bank[index] = rows.to(bank.dtype)  # those of one index are equal, whichever is written last
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


def _one_of_each(index: Tensor, x: Tensor, duplicates: str) -> Tensor:
    """(B, D): for each place the row that stands for all that have its index."""
    ascending, order = index.sort(stable=True)
    begin = torch.searchsorted(ascending, index)
    end = torch.searchsorted(ascending, index, right=True)
    if duplicates == "last":
        return x[order[end - 1]]
    if duplicates == "first":
        return x[order[begin]]
    means, _ = segment_mean(x, begin, len(x), impl="auto")
    return means[begin]
