"""sampled_dot by the kernels of kernels/triton/sampled_dot.py; the gradient of the bank by pair_dot's.

Nothing here waits for the device. Memory beyond inputs and outputs: backward, parts of dx, RESIDENT rows or so a
multiprocessor; where the bank has a gradient, that in the dtype of accumulation, and what a stable sort of all columns
takes, about 50 bytes a score. The bank is read where it lies.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fastret.backends.rows import accumulation_dtype
from fastret.backends.sampling import Draws
from fastret.backends.triton.rows import total
from fastret.kernels.triton import config
from fastret.kernels.triton import sampled_dot as kernels
from fastret.kernels.triton.pair_dot import pair_gradient_kernel

NARROWEST = 16  # features of a tile
RESIDENT = 8  # programs of which a multiprocessor has room for as many


class _Problem:
    """Where the columns of every row come from, and how the kernels are launched."""

    def __init__(self, x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None):
        self.x = x.contiguous()
        self.bank = bank if bank.stride(1) == 1 or bank.shape[1] == 1 else bank.contiguous()
        first, index = (None if t is None else t.contiguous() for t in (first, index))
        self.columns = (first, index, None if draws is None else draws.seed)
        self.before = 0 if first is None else 4  # places in front of the drawn columns, of which the last is taken
        if draws is not None:
            self.count = draws.count
        else:
            assert index is not None
            self.count = index.shape[1]
        self.width = self.count + (first is not None)

    def launch(self, kernel: Any, *tensors: Tensor | None, **options: int) -> None:
        """A kernel with a program for each block of each row."""
        blocks = self.blocks(options["BLOCK_S"])
        kernel[(len(self.x) * blocks,)](*tensors, blocks, self.count, len(self.bank), **options)

    def blocks(self, size: int) -> int:
        return int(triton.cdiv(self.before + self.count, size))

    def options(self, kind: str, across: str) -> dict[str, int]:
        """Tiles no wider than the rows, and the shape of the bank, known when a kernel is compiled: its strides then
        tell where 16 bytes are read at once."""
        tile = config.lookup(kind, self.bank.device, self.bank.dtype)
        d = self.bank.shape[1]
        narrow = max(NARROWEST, triton.next_power_of_2(d))
        return {**tile, across: min(tile[across], narrow), "WIDTH": d, "STRIDE": self.bank.stride(0)}


def forward(x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None) -> Tensor:
    """(N, S) scores."""
    with torch.cuda.device_of(x):
        problem = _Problem(x, bank, first, index, draws)
        scores = torch.empty(len(x), problem.width, dtype=accumulation_dtype(x.dtype), device=x.device)
        if len(x):
            options = problem.options("sampled scores", "BLOCK_D")
            arguments = problem.x, problem.bank, *problem.columns, scores
            problem.launch(kernels.sampled_scores_kernel, *arguments, **options)
        return scores


def backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    first: Tensor | None,
    index: Tensor | None,
    draws: Draws | None,
    *,
    need_x: bool,
    need_bank: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbank) from the gradient of the scores."""
    with torch.cuda.device_of(x):
        problem, grad = _Problem(x, bank, first, index, draws), grad.contiguous()
        dx = _row_gradient(problem, grad) if need_x else None
        d_bank = _bank_gradient(problem, grad) if need_bank else None
        return dx, d_bank


def _row_gradient(problem: _Problem, grad: Tensor) -> Tensor:
    n, d = problem.x.shape
    if not n:
        return torch.empty_like(problem.x)
    options = problem.options("sampled gradient", "SLICE")
    blocks, slices = problem.blocks(options["BLOCK_S"]), triton.cdiv(d, options["SLICE"])
    parts = config.parts(grad.device, n * slices, blocks, resident=RESIDENT)
    dx = torch.empty(parts, n, d, dtype=grad.dtype, device=grad.device)
    kernels.sampled_row_gradient_kernel[n, slices, parts](
        *(problem.bank, *problem.columns, grad, dx, blocks, problem.count, len(problem.bank)), **options
    )
    return total(dx).to(problem.x.dtype)


def _bank_gradient(problem: _Problem, grad: Tensor) -> Tensor:
    """One writer a row of the bank, which adds in the order of the scores."""
    size, d = problem.bank.shape
    d_bank = torch.empty(size, d, dtype=grad.dtype, device=grad.device)
    columns = torch.empty(grad.shape, dtype=torch.int32 if size < 2**31 else torch.int64, device=grad.device)
    if len(grad):
        tile = config.lookup("sampled scores", grad.device, problem.bank.dtype)
        options = {name: value for name, value in tile.items() if name != "BLOCK_D"}
        problem.launch(kernels.sampled_columns_kernel, *problem.columns, columns, **options)
    ordered, order = columns.flatten().sort(stable=True)
    start = torch.searchsorted(ordered, torch.arange(size + 1, dtype=ordered.dtype, device=grad.device))
    if size:
        options = dict(config.lookup("pair gradient", grad.device, problem.x.dtype, d))
        pair_gradient_kernel[size, triton.cdiv(d, options["SLICE"])](
            *(problem.x, start, order // problem.width, grad.flatten()[order], d_bank, d), **options
        )
    return d_bank.to(problem.bank.dtype)
