"""Heads as the kernels take them, of all rows and columns or of a block of them."""

from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from fastret.backends.pairs import Block, Circulant, Dense, Head, Indexed, Listed, Masked, PairMask, Shifted, Target
from fastret.kernels.triton import pairs

Upstream = tuple[Tensor, Tensor, Tensor]  # lse and the gradients of lse and of the target score


def arguments(
    head: Head, like: Tensor, columns: int, upstream: Upstream | None = None, norms: Tensor | None = None
) -> pairs.Head:
    """A head as the kernels take it; ``like`` has the dtype of accumulation, ``columns`` are the whole matrix's, norms
    those of columns that are not divided by them."""
    lse, grad_lse, grad_target = upstream or (None, None, None)
    return pairs.Head(
        head.scale if isinstance(head.scale, Tensor) else _number(head.scale, like),
        head.row_bias,
        head.column_bias,
        mask_arguments(head.mask),
        _target(head.target, like),
        _number(1 - head.smoothing, like) if head.smoothing else None,
        _number(head.smoothing / columns, like) if head.smoothing else None,
        tl.constexpr(head.target is not None or head.smoothing > 0),
        tl.constexpr(head.axis),
        tl.constexpr(head.reduce),
        lse,
        grad_lse,
        grad_target,
        norms,
    )


def _number(value: float, like: Tensor) -> Tensor:
    """A kernel's float argument would be float32."""
    return torch.full_like(like, value)


def mask_arguments(m: PairMask) -> pairs.Mask:
    """A mask as the kernels take it."""
    offset = m.offset if m.offset is None or m.period is None else m.offset % m.period
    return pairs.Mask(m.same, m.different, m.distinct, offset, m.period, m.above, m.below)


def _target(target: Target | None, like: Tensor) -> pairs.Target:
    match target:
        case None:
            return pairs.Target()
        case Indexed():
            return pairs.Target(index=target.index)
        case Masked():
            return pairs.Target(mask=mask_arguments(target.mask), weight=target.weight)
        case Dense():
            return pairs.Target(dense=target.weights, columns=target.weights.stride(0))
        case Listed():
            return pairs.Target(offsets=target.offsets, entries=(target.index, target.weight))
        case Shifted():
            shift = target.offset if target.period is None else target.offset % target.period
            return pairs.Target(shifts=(shift,), period=target.period)
        case Circulant():
            return pairs.Target(
                shifts=tuple(shift % target.period for shift in target.shifts),
                shift_weights=tuple(_number(weight, like) for weight in target.weights),
                base=target.offset,
                period=target.period,
            )


def by_threshold(head: Head) -> bool:
    masks = [head.mask, *([head.target.mask] if isinstance(head.target, Masked) else [])]
    return any(mask.above is not None or mask.below is not None for mask in masks)


def conditions(head: Head) -> int:
    """About how many numbers a row, and a column, a program has to hold for a head."""
    target = head.target
    held = [*vars(head.mask).values(), head.row_bias, head.column_bias, target, head.smoothing or None]
    held.append(head.reduce if head.reduce != "lse" else None)
    if isinstance(target, Masked):
        held.extend(vars(target.mask).values())
    shifts = len(target.shifts) if isinstance(target, Circulant) else 0
    return 1 + sum(value is not None for value in held) + shifts


def side(axis: str, b: Block) -> slice:
    """Where the results of a head over this axis lie for a block."""
    return slice(b.first_row, b.first_row + b.rows) if axis == "row" else _columns(b)


def _columns(b: Block) -> slice:
    return slice(b.first_column, b.first_column + b.columns)


def part(head: Head, b: Block) -> Head:
    """The head of a block: rows count from 0 there, and columns from its first, which the kernels are told."""
    rows = side("row", b)
    return replace(
        head,
        mask=mask_part(head.mask, b),
        target=_target_part(head.target, b),
        row_bias=None if head.row_bias is None else head.row_bias[rows],
        column_bias=None if head.column_bias is None else head.column_bias[_columns(b)],
    )


def mask_part(mask: PairMask, b: Block) -> PairMask:
    """The mask of a block, likewise."""

    def cut(relation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return None if relation is None else (relation[0], relation[1][_columns(b)])

    mask = replace(mask, same=cut(mask.same), different=cut(mask.different), distinct=cut(mask.distinct))
    return mask.of_rows(b.first_row, b.first_row + b.rows)


def _target_part(target: Target | None, b: Block) -> Target | None:
    rows = side("row", b)
    match target:
        case Indexed():
            return Indexed(target.index[rows])
        case Masked():
            return Masked(mask_part(target.mask, b), target.weight[rows])
        case Dense():
            return Dense(target.weights[rows, _columns(b)])
        case Listed():  # entries stay where they are: offsets are places among all
            return replace(target, offsets=target.offsets[rows.start : rows.stop + 1])
        case Shifted():
            return replace(target, offset=target.offset + b.first_row)
        case Circulant():
            return replace(target, shifts=tuple(shift + b.first_row for shift in target.shifts))
    return None
