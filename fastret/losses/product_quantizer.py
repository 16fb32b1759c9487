"""What learned product quantizers share: the codebook, and what is done with codes.

A row is M parts; each becomes the number of one of the K words of length L of its book. Which word that is, a subclass
says: the nearest (``SoftPQ``) or the one of the highest logit (``DPQ``).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastret.ops import checks
from fastret.ops.in_range import in_range
from fastret.retrieval.faiss_pq import to_index_pq

ROWS = 1 << 14  # encoded at once: their int64 codes are what exists beside the result


class CodeUsage(NamedTuple):
    """How often the words of a product codebook are taken.

    Attributes:
        counts: (M, K) int64.
        perplexity: (M,) e to the entropy of a book's counts: K where all words are taken equally often, 1 where one
            has all, NaN without a row.
        dead_words: (M,) int64, how many words of a book no row takes.
    """

    counts: Tensor
    perplexity: Tensor
    dead_words: Tensor


class ProductQuantizer(nn.Module):
    """Owns a product codebook.

    Args:
        num_books: M >= 1. num_words: K from 1 to 65,536. word_dim: L >= 1.
        impl: "reference", "tiled", "cpu" or "triton" (parts and words of a width of at most 128); None: the fastest.

    Attributes:
        codebook: (M, K, L) parameter, drawn as SPQ's official code does: Xavier uniform of a (K, M L) matrix.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    def __init__(self, num_books: int, num_words: int, word_dim: int, impl: str | None) -> None:
        super().__init__()
        for value, name in ((num_books, "num_books"), (num_words, "num_words"), (word_dim, "word_dim")):
            checks.check_integer(value, name, 1)
        if num_words > checks.MOST_WORDS:
            raise ValueError(f"num_words: expected at most {checks.MOST_WORDS:,}, got {num_words:,}")
        bound = math.sqrt(6 / (num_words + num_books * word_dim))
        self.codebook = nn.Parameter(torch.empty(num_books, num_words, word_dim).uniform_(-bound, bound))
        self.impl = impl

    @property
    def num_books(self) -> int:
        return self.codebook.shape[0]

    @property
    def num_words(self) -> int:
        return self.codebook.shape[1]

    @property
    def word_dim(self) -> int:
        return self.codebook.shape[2]

    @property
    def num_bits(self) -> int:
        """Bits of a row's codes, M log2 K, rounded up a book. The official script of SPQ prints M sqrt(K), which is the
        same for K = 4 and 16 only."""
        return self.num_books * (self.num_words - 1).bit_length()

    def _codes(self, x: Tensor) -> Tensor:
        """(n, M) int64 codes of rows."""
        raise NotImplementedError

    def _words(self) -> Tensor:
        """(M, K, L), what a code stands for."""
        return self.codebook

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes (N, M) of rows: uint8 for K <= 256, else int32; ties to the lower word. Of a part with NaN: any code.

        Memory: the codes, and those of 16,384 rows as int64.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected.
        """
        checks.check_rows(x, "x")
        dtype = torch.uint8 if self.num_words <= 256 else torch.int32
        codes = torch.empty(x.shape[0], self.num_books, dtype=dtype, device=x.device)
        for block in _blocks(x):
            codes[block] = self._codes(x[block]).to(dtype)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Rows (N, M L) of codes (N, M) of any integer dtype, in the dtype of the codebook.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected; also a code that is no
                word (on a GPU by device assert, without waiting for it).
        """
        checks.check_codes(codes, self.codebook)
        words = self._words().detach().flatten(0, 1)
        rows = words.new_empty(codes.shape[0], words.shape[1] * self.num_books)
        for block in _blocks(codes):
            rows[block] = words[self._places(codes[block])].flatten(1)
        return rows

    def usage(self, x: Tensor) -> CodeUsage:
        """How often each word is taken by rows x, which are encoded first, or by codes (N, M) of an integer dtype.

        Raises:
            TypeError, ValueError: as ``encode`` and ``decode``.
        """
        codes = self.encode(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        checks.check_codes(codes, self.codebook)
        books, words = self.num_books, self.num_words
        counts = torch.zeros(books * words, dtype=torch.int64, device=codes.device)
        for block in _blocks(codes):
            counts += torch.bincount(self._places(codes[block]).flatten(), minlength=books * words)
        counts = counts.view(books, words)
        shares = counts / counts.sum(1, keepdim=True)
        return CodeUsage(counts, torch.special.entr(shares).sum(1).exp(), (counts == 0).sum(1))

    def to_faiss(self) -> Any:
        """An empty trained ``faiss.IndexPQ`` (L2) with this codebook; ``retrieval.PQIndex`` keeps codes as well.

        It takes the nearest words of what is added: rows for ``SoftPQ``, for ``DPQ`` ``decode(encode(x))``.

        Raises:
            ImportError: faiss is not installed.
            ValueError: the number of words is no power of two.
        """
        return to_index_pq(self._words().detach(), None, "l2")

    def _places(self, codes: Tensor) -> Tensor:
        """Numbers of words among those of all books."""
        codes = in_range(codes, self.num_words, "codes")  # compiled as well: what is no word would be the next book's
        return codes + torch.arange(self.num_books, device=codes.device) * self.num_words

    def extra_repr(self) -> str:
        return f"num_books={self.num_books}, num_words={self.num_words}, word_dim={self.word_dim}"


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows; one where there are none, so that they are checked."""
    return (slice(begin, begin + ROWS) for begin in range(0, max(rows.shape[0], 1), ROWS))
