"""sampled_dot in CUDA C++ (csrc/cuda/sampled_dot.cu)."""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import cuda
from fastret.backends.cuda.launch import array, call, on, rows_of
from fastret.backends.registry import Call
from fastret.backends.sampling import Draws
from fastret.backends.tiled import sampled_dot as tiled


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    return "the CUDA kernels of sampled_dot take no float64" if call.dtype == torch.float64 else None


def forward(x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None) -> Tensor:
    """(N, S) scores."""
    problem, columns, _borrowed = _problem(x, bank, first, index, draws)
    scores = torch.empty(len(x), columns, dtype=torch.float32, device=x.device)
    call("sampled_dot_forward", x.device, problem, array(scores, "scores"))
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
    """(dx, dbank) from the gradient of the scores. That of the bank, which no memory bank wants, is PyTorch's."""
    dx = None
    if need_x:
        problem, _, _borrowed = _problem(x, bank, first, index, draws)
        grad_rows, dx = rows_of(grad), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with on(x.device):
            parts = cuda.extension().sampled_dot_parts(problem)
        partial = torch.empty(parts * len(x), x.shape[1], dtype=torch.float32, device=x.device) if parts > 1 else None
        given = (array(grad_rows, "grad"), None if partial is None else array(partial, "partial"))
        call("sampled_dot_backward", x.device, problem, *given, array(dx, "dx"))
    d_bank = None
    if need_bank:
        d_bank = tiled.backward(grad, x, bank, first, index, draws, need_x=False, need_bank=True)[1]
    return dx, d_bank


def _problem(
    x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, draws: Draws | None
) -> tuple[tuple[Any, ...], int, tuple[Tensor | None, ...]]:
    """The problem as C++ takes it, its number of scores a row, and the tensors it borrows."""
    x, bank = rows_of(x), rows_of(bank)
    first = None if first is None else first.contiguous()
    index = None if index is None else rows_of(index)
    seed, count = (None, 0) if draws is None else (draws.seed.reshape(1), draws.count)
    listed = (None if t is None else array(t, name) for t, name in ((first, "first"), (index, "index"), (seed, "seed")))
    columns = (first is not None) + (count if index is None else index.shape[1])
    return (array(x, "x"), array(bank, "bank"), *listed, count), columns, (x, bank, first, index, seed)
