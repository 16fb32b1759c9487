"""word_numbers: codes (N, M), each the number of a word of its book, as numbers among the words of all books.

    number_nm = m K + code_nm

An operator, so that codes are checked in compiled code as well: one that is no word would be one of the next book.
"""

import torch
from torch import Tensor

from fastret.ops import checks
from fastret.ops.library import define


def word_numbers(codes: Tensor, words: int) -> Tensor:
    """(N, M) int64, of codes of any integer dtype, ``words`` a book.

    Raises:
        ValueError: a code is no word; a device other than the CPU is not waited for but asserts.
    """
    numbers: Tensor = torch.ops.fastret.word_numbers.default(codes, words)
    return numbers


def _forward(codes: Tensor, words: int) -> Tensor:
    codes = codes.long()  # of uint16 PyTorch compares nothing
    checks.check_range(codes, words, "codes")
    return codes + torch.arange(codes.shape[1], device=codes.device) * words


def _forward_fake(codes: Tensor, words: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.int64)


define("word_numbers(Tensor codes, SymInt words) -> Tensor", _forward, _forward_fake)
