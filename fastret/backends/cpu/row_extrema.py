"""row_extrema in C++: the program of masked_lse (csrc/cpu/masked_lse.cpp) with another reduction, so that scores are
those of masked_lse, bit for bit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastret import _C
from fastret.backends.cpu.array import array, rows_of
from fastret.backends.cpu.masked_lse import mask_tuple
from fastret.backends.pairs import PairMask
from fastret.backends.rows import accumulation_dtype


def forward(
    x: Tensor, y: Tensor | None, extrema: Sequence[tuple[str, PairMask]], *, normalize: bool, first_column: int
) -> list[tuple[Tensor, Tensor]]:
    """(value, index) of each extremum, as backends/reference defines them."""
    rows, others = rows_of(x), None if y is None else rows_of(y)
    values = [torch.empty(len(x), dtype=accumulation_dtype(x.dtype)) for _ in extrema]
    results = [(value, torch.empty(len(x), dtype=torch.int64)) for value in values]
    _C.row_extrema(
        array(rows),
        None if others is None else array(others),
        [(kind == "max", mask_tuple(mask)) for kind, mask in extrema],
        normalize,
        first_column,
        torch.get_num_threads(),
        [(array(value), array(index)) for value, index in results],
    )
    return results
