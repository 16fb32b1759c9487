"""Columns drawn for every row by a counter-based generator: the same numbers wherever and whenever they are asked for,
so that backward draws again what forward drew, and nothing is stored.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011): the key is the seed,
64 bits, and the counter (q, i, 0, 0) for draws 4 q .. 4 q + 3 of row i. A word w of 32 bits becomes the column
floor(w size / 2^32): uniform but for a relative error of size / 2^32, with replacement.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MOST_COLUMNS = 1 << 31

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Draws:
    """``count`` columns a row, uniform with replacement; drawn, never stored.

    Attributes:
        count: draws a row, at least 1.
        seed: a 0-dim int64 tensor on the device of the rows, all 64 bits of which count.
        first_row: number of the first row; rows that come in pieces draw what they draw together.
    """

    count: int
    seed: Tensor
    first_row: int = 0

    def of_rows(self, begin: int) -> "Draws":
        """Those of the rows from ``begin`` on."""
        return replace(self, first_row=self.first_row + begin)

    def columns(self, rows: int, size: int, begin: int = 0, end: int | None = None) -> Tensor:
        """(rows, end - begin) int64: draws begin .. end - 1 of the first ``rows`` rows, numbers from 0 to size - 1."""
        end = self.count if end is None else end
        device = self.seed.device
        first_block, last_block = begin // 4, (end + 3) // 4
        block = torch.arange(first_block, last_block, device=device)
        row = torch.arange(self.first_row, self.first_row + rows, device=device)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        words = philox((block[None, :] & _WORD, row[:, None] & _WORD, zero, zero), self.seed)
        drawn = torch.stack(torch.broadcast_tensors(*words), 2).flatten(1)
        return (drawn[:, begin - 4 * first_block : end - 4 * first_block] * size) >> 32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 bits, as int64, of counters of four such words and a key of 64 bits; all broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word. The product of 64 bits wraps around the sign, which the mask takes away."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD
