"""soft_assign by the kernels of kernels/triton/soft_assign.py: one launch forward, two with usage; two backward.

Nothing here waits for the device. Memory beyond inputs and outputs: a number a part in backward; where several programs
share a block of words, a copy of its sums for each, of which there are at most RESIDENT a multiprocessor: 17 MiB on an
H100 for the widest words.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fastret.backends.registry import Call
from fastret.backends.triton.rows import total
from fastret.kernels.triton import config
from fastret.kernels.triton import soft_assign as kernels

NARROWEST = 16  # a side of a product
RESIDENT = 4  # programs that own words, of which a multiprocessor has room for as many


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if "wide parts" in call.options:
        return "the Triton kernels take keys and words of a width of at most 128; impl='tiled' takes any"
    return None


class _Problem:
    """A call's scores and codebook, and how its kernels are launched.

    Attributes:
        rows: x or the logits, contiguous.
        scores: x, keys, bias and logits, as the kernels take them.
    """

    def __init__(
        self, x: Tensor | None, keys: Tensor | None, bias: Tensor | None, logits: Tensor | None, codebook: Tensor
    ) -> None:
        self.scores = tuple(None if t is None else t.contiguous() for t in (x, keys, bias, logits))
        rows = self.scores[0] if logits is None else self.scores[3]
        assert rows is not None
        self.rows, self.codebook = rows, codebook.contiguous()
        self.key_width = 0 if keys is None else keys.shape[2]

    def new(self, *shape: int) -> Tensor:
        return self.codebook.new_empty(shape)

    def options(self, kind: str) -> dict[str, Any]:
        """Widths and tiles; SLICE as small as the widths allow."""
        width = max(self.key_width, self.codebook.shape[2])
        dtype = torch.float32 if self.rows.dtype == torch.float16 else self.rows.dtype
        tiles = config.lookup(kind, self.rows.device, dtype, width)
        widths = {"KEY_WIDTH": self.key_width, "WORD_WIDTH": self.codebook.shape[2]}
        return {**tiles, **widths, "SLICE": max(NARROWEST, triton.next_power_of_2(width))}

    def launch_for_rows(self, kernel: Any, kind: str, *arguments: Tensor | None, **constants: bool) -> None:
        """A kernel whose programs own rows."""
        books, words, _ = self.codebook.shape
        options = self.options(kind)
        kernel[triton.cdiv(len(self.rows), options["BLOCK_M"]), books](
            *(*self.scores, self.codebook, *arguments, len(self.rows), books, words), **constants, **options
        )

    def word_sums(
        self,
        grads: tuple[Tensor | None, ...],
        lse: Tensor | None,
        codes: Tensor | None,
        mean_slope: Tensor | None,
        *,
        wanted: tuple[bool, bool, bool, bool],
        straight_through: bool = False,
    ) -> list[Tensor | None]:
        """Sums over the rows for usage, and of the gradients of keys, bias and codebook, where wanted."""
        books, words, width = self.codebook.shape
        options = self.options("assign words")
        blocks, tiles = triton.cdiv(words, options["BLOCK_N"]), triton.cdiv(len(self.rows), options["BLOCK_M"])
        parts = config.parts(self.rows.device, blocks * books, tiles, resident=RESIDENT)
        shapes = ((), (self.key_width,), (), (width,))
        tables = [
            self.new(parts, books, words, *shape) if want else None for shape, want in zip(shapes, wanted, strict=True)
        ]
        kernels.soft_assign_word_sums_kernel[blocks, books, parts](
            *(*self.scores, self.codebook, *grads, lse, codes, mean_slope, *tables, len(self.rows), books, words),
            STRAIGHT=straight_through,
            **options,
        )
        return [None if t is None else total(t) for t in tables]


def forward(
    x: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    codebook: Tensor,
    *,
    soft: bool,
    usage: bool,
    purity: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(soft, lse, codes, usage, purity), None where not asked for."""
    with torch.cuda.device_of(codebook):
        problem = _Problem(x, keys, bias, logits, codebook)
        n, (books, words, width) = len(problem.rows), codebook.shape
        values = problem.rows.new_empty(n, books * width) if soft else None
        lse = problem.new(n, books) if soft or usage or purity else None
        codes = torch.empty(n, books, dtype=torch.int64, device=codebook.device)
        squares = problem.new(n, books) if purity else None
        used = codebook.new_zeros(books, words) if usage else None
        if n:
            problem.launch_for_rows(kernels.soft_assign_kernel, "assign", values, lse, codes, squares)
            if usage:
                used, *_ = problem.word_sums((None,) * 4, lse, None, None, wanted=(True, False, False, False))
        return values, lse, codes, None if used is None else used / max(n, 1), squares


def backward(
    grad_soft: Tensor | None,
    grad_hard: Tensor | None,
    grad_usage: Tensor | None,
    grad_purity: Tensor | None,
    lse: Tensor | None,
    codes: Tensor,
    x: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    codebook: Tensor,
    *,
    straight_through: bool,
    need_scores: bool,
    need_codebook: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dkeys, dbias, dlogits, dcodebook)."""
    with torch.cuda.device_of(codebook):
        problem = _Problem(x, keys, bias, logits, codebook)
        n, (books, _, _) = len(problem.rows), codebook.shape
        d_rows = torch.empty_like(problem.rows) if need_scores else None
        wanted = (False, need_scores and keys is not None, need_scores and bias is not None, need_codebook)
        sums = [
            t.new_zeros(t.shape) if t is not None and w else None
            for t, w in zip((None, keys, bias, codebook), wanted, strict=True)
        ]
        if n:
            if grad_usage is not None:
                grad_usage = grad_usage / n
            grads = tuple(
                None if g is None else g.contiguous() for g in (grad_soft, grad_hard, grad_usage, grad_purity)
            )
            straight_through = straight_through and grad_hard is not None
            lse = None if lse is None else lse.contiguous()
            codes = codes.contiguous()
            mean_slope = None
            if d_rows is not None:
                mean_slope = problem.new(n, books)
                problem.launch_for_rows(
                    *(kernels.soft_assign_row_gradient_kernel, "assign rows"),
                    *(*grads, lse, mean_slope, d_rows),
                    STRAIGHT=straight_through,
                )
            if any(wanted):
                sums = problem.word_sums(
                    grads, lse, codes, mean_slope, wanted=wanted, straight_through=straight_through
                )
        dx, d_logits = (d_rows, None) if logits is None else (None, d_rows)
        return dx, sums[1], sums[2], d_logits, sums[3]
