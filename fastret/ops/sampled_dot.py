"""sampled_dot: scores of every row against a few rows of a bank, which are never gathered.

    s_ik = <x_i, M_{c_ik}>        dx_i = sum over k of g_ik M_{c_ik},        dM_j = sum over c_ik = j of g_ik x_i

The columns c_i of a row are, in this order: its own (``first``), then those of ``index``, or ``count`` columns drawn
uniformly with replacement from ``seed``. A column may come several times, and the row's own among the drawn. Draws are
those of a counter-based generator (``fastret.backends.sampling``): backward draws again, and no index is stored.

Cost: N S D products and as many reads of the bank, in each direction. Memory: the scores, N S. Kept for backward: the
arguments.

The interface of an implementation, ``fastret.backends.*.sampled_dot``:

    forward(x, bank, first, index, draws) -> Tensor                                                (N, S)
    backward(grad, x, bank, first, index, draws, *, need_x, need_bank) -> tuple[Tensor | None, Tensor | None]

with x (N, D) and bank (C, D) of floating dtypes, which differ only where neither is float64; first (N,) int64 or None;
one of index (N, K) int64 and draws; scores and grad float32, or float64 for float64 rows; gradients in the dtypes of x
and bank.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.reference import sampled_dot as reference
from fastret.backends.rows import accumulation_dtype
from fastret.backends.sampling import MOST_COLUMNS, Draws
from fastret.ops import checks
from fastret.ops.library import apply, define, refuse


def sampled_dot(
    x: Tensor,
    bank: Tensor,
    *,
    first: Tensor | None = None,
    index: Tensor | None = None,
    count: int | None = None,
    seed: int | Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """(N, S) scores, S = K or count, and one more with ``first``; formulas and cost stand at the top of this file.

    Args:
        x: (N, D) rows. bank: (C, D), float32, bfloat16 or float16 as x or another of them, or both float64.
        first: (N,) integers from 0 to C - 1, the column of score 0; None: no such score.
        index: (N, K) integers from 0 to C - 1.
        count: how many columns are drawn for each row instead.
        seed: of the draws; an integer of 64 bits, or a 0-dim int64 tensor on the device of x, which is not waited for.
        impl: "reference", "tiled", "cpu", "triton" or "cuda"; None: ``fastret.backend``, FASTRET_IMPL, else the
            fastest.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    _check_rows(x, bank)
    if first is not None:
        checks.check_labels(first, x, "first")
        first = first.to(torch.int64)
    if (index is None) == (count is None):
        raise ValueError("index, count: expected exactly one of them")
    if (seed is None) != (count is None):
        raise ValueError("count, seed: expected both or neither")
    drawn = None
    if index is not None:
        check_columns(index, x, "index")
        index = index.to(torch.int64)
    else:
        checks.check_count(count, "count")
        drawn = _seed(seed, x.device)
        if bank.shape[0] > MOST_COLUMNS:
            raise ValueError(f"bank: expected at most 2^31 rows to draw from, got {bank.shape[0]:,}")
    chosen = registry.resolve("sampled_dot", x.device, x.dtype, impl)
    if chosen == "reference":
        _check_ranges(bank, first, index)
        with torch.autocast(x.device.type, enabled=False):
            return reference.sampled_dot(x, bank, first, index, _draws(drawn, count or 0))
    scores: Tensor = apply(_SampledDot, x, bank, first, index, drawn, count or 0, chosen)
    return scores


def _check_rows(x: Tensor, bank: Tensor) -> None:
    checks.check_rows(x, "x")
    checks.check_rows(bank, "bank", like=x, called="x")
    if (x.dtype == torch.float64) != (bank.dtype == torch.float64):
        raise TypeError(f"bank: expected float64 exactly where x is, got {bank.dtype} and {x.dtype}")
    if x.shape[0] and not bank.shape[0]:
        raise ValueError("bank: expected at least one row, got none")


def check_columns(index: Tensor, x: Tensor, name: str) -> None:
    """Some integers a row, on the device of the rows."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected an integer tensor of shape (N, K), got {type(index).__name__}")
    if index.dtype not in checks.INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {index.dtype}")
    if index.dim() != 2 or index.shape[0] != x.shape[0] or index.shape[1] == 0:
        raise ValueError(f"{name}: expected shape ({x.shape[0]}, K) with K >= 1, got {tuple(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like the rows, got {index.device}")


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.dim() or seed.dtype != torch.int64:
            raise ValueError(f"seed: expected an integer or a 0-dim int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed: expected device {device} like the rows, got {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer or a 0-dim int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _check_ranges(bank: Tensor, first: Tensor | None, index: Tensor | None) -> None:
    for name, columns in (("first", first), ("index", index)):
        if columns is not None:
            checks.check_range(columns, bank.shape[0], name)


def _draws(seed: Tensor | None, count: int) -> Draws | None:
    return None if seed is None else Draws(count, seed)


def _forward(
    x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, seed: Tensor | None, count: int, impl: str
) -> Tensor:
    _check_ranges(bank, first, index)
    module = registry.IMPLEMENTATIONS[impl].module("sampled_dot")
    scores: Tensor = module.forward(x, bank, first, index, _draws(seed, count))
    return scores


def _forward_fake(
    x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, seed: Tensor | None, count: int, impl: str
) -> Tensor:
    width = (count if index is None else index.shape[1]) + (first is not None)
    return x.new_empty(x.shape[0], width, dtype=accumulation_dtype(x.dtype))


def _backward(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    first: Tensor | None,
    index: Tensor | None,
    seed: Tensor | None,
    count: int,
    need_x: bool,
    need_bank: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    module = registry.IMPLEMENTATIONS[impl].module("sampled_dot")
    dx, dbank = module.backward(grad, x, bank, first, index, _draws(seed, count), need_x=need_x, need_bank=need_bank)
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dbank is None else dbank


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    first: Tensor | None,
    index: Tensor | None,
    seed: Tensor | None,
    count: int,
    need_x: bool,
    need_bank: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape) if need_x else x.new_empty(0), bank.new_empty(bank.shape) if need_bank else x.new_empty(
        0
    )


define(
    "sampled_dot(Tensor x, Tensor bank, Tensor? first, Tensor? index, Tensor? seed, SymInt count, str impl) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "sampled_dot_backward(Tensor grad, Tensor x, Tensor bank, Tensor? first, Tensor? index, Tensor? seed, "
    "SymInt count, bool need_x, bool need_bank, str impl) -> (Tensor dx, Tensor dbank)",
    _backward,
    _backward_fake,
)

_forward_operator = torch.ops.fastret.sampled_dot.default
_backward_operator = torch.ops.fastret.sampled_dot_backward.default


class _SampledDot(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bank: Tensor, first: Tensor | None, index: Tensor | None, seed: Tensor | None, count: int, impl: str
    ) -> Tensor:
        scores: Tensor = _forward_operator(x, bank, first, index, seed, count, impl)
        return scores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.count, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bank = ctx.needs_input_grad[:2]
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        compute = _backward_operator if torch.compiler.is_compiling() else _SampledDotBackward.apply
        dx, dbank = compute(grad, *ctx.saved_tensors, ctx.count, need_x, need_bank, ctx.impl)
        return dx if need_x else None, dbank if need_bank else None, *[None] * 5


class _SampledDotBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = refuse("sampled_dot", "a second differentiation")
