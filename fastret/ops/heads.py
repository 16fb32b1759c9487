"""Heads of masked_lse on their way through a registered operator, whose arguments are tensors, numbers and a string.

``spec`` holds the structure: heads apart by "|", fields by " ", each "path=kind:places", for example

    scale=scale:0 mask=@PairMask mask.offset=number:0 axis='row

with places in one of the flat lists. Numbers are not part of the text, so that a batch of another size, or another
temperature, is no other program to torch.compile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import Tensor

from fastret.backends import phi
from fastret.backends.pairs import Circulant, Dense, Head, Indexed, Listed, Masked, PairMask, Shifted, Target
from fastret.ops import checks

_TYPES = {t.__name__: t for t in (PairMask, Indexed, Shifted, Masked, Circulant, Dense, Listed)}
_FIELDS = {t: tuple(f.name for f in fields(t)) for t in (*_TYPES.values(), Head)}
_LEARNED = ("scale", "row_bias", "column_bias")  # Head fields that receive gradients


@dataclass
class FlatHeads:
    """Heads as flat lists and the text that says where everything is.

    Attributes:
        scale: (K,) those scales that are tensors. row_bias, column_bias: (K', N), (K'', M). None where there is none.
        tensors: labels, ids, indices, thresholds, weights: no gradients. One that several heads refer to comes once.
        given: the same as the heads have them.
    """

    spec: str
    scale: Tensor | None
    row_bias: Tensor | None
    column_bias: Tensor | None
    tensors: list[Tensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)


def flatten(heads: Sequence[Head], dtype: torch.dtype) -> FlatHeads:
    """Tensors of real numbers are brought to ``dtype``, integers to int64."""
    flat = FlatHeads("", None, None, None)
    learned: dict[str, list[Tensor]] = {name: [] for name in _LEARNED}
    specs = []
    for head in heads:
        words: list[str] = []
        for name in _FIELDS[Head]:
            value = getattr(head, name)
            if name in _LEARNED and isinstance(value, Tensor):
                words.append(f"{name}={name}:{len(learned[name])}")
                learned[name].append(value.to(dtype))
            elif value is not None:
                _put(value, name, dtype, flat, words)
        specs.append(" ".join(words))
    flat.spec = "|".join(specs)
    flat.scale, flat.row_bias, flat.column_bias = (_stacked(learned[name]) for name in _LEARNED)
    return flat


def _stacked(values: list[Tensor]) -> Tensor | None:
    if len(values) == 1:
        return values[0][None]
    return torch.stack(values) if values else None


def _put(value: Any, path: str, dtype: torch.dtype, flat: FlatHeads, words: list[str]) -> None:
    if isinstance(value, str):
        words.append(f"{path}='{value}")
    elif type(value) in _FIELDS:
        words.append(f"{path}=@{type(value).__name__}")
        for name in _FIELDS[type(value)]:
            part = getattr(value, name)
            if part is not None:
                _put(part, f"{path}.{name}", dtype, flat, words)
    elif isinstance(value, tuple):
        words.append(f"{path}=({len(value)}")
        for k, part in enumerate(value):
            _put(part, f"{path}.{k}", dtype, flat, words)
    elif isinstance(value, Tensor):
        words.append(f"{path}=tensor:{_place(value, dtype, flat)}")
    elif isinstance(value, (int, torch.SymInt)):
        words.append(f"{path}=number:{len(flat.numbers)}")
        flat.numbers.append(value)  # type: ignore[arg-type]  # a traced size counts as one
    else:
        words.append(f"{path}=factor:{len(flat.factors)}")
        flat.factors.append(value)


def _place(value: Tensor, dtype: torch.dtype, flat: FlatHeads) -> int:
    """Where the tensor is among the flat ones; it joins them if it is new."""
    for k, known in enumerate(flat.given):
        if known is value:
            return k
    wide = value.detach().to(dtype if value.is_floating_point() else torch.int64)
    flat.given.append(value)
    flat.tensors.append(wide.contiguous())  # here already: forward and backward share the copy
    return len(flat.tensors) - 1


def restore(
    spec: str,
    scale: Tensor | None,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    factors: Sequence[float],
) -> list[Head]:
    """The heads that ``flatten`` took apart, every tensor contiguous: vmap and compilers bring other strides too."""
    lists = {
        "scale": scale,
        "row_bias": None if row_bias is None else row_bias.contiguous(),
        "column_bias": None if column_bias is None else column_bias.contiguous(),
        "tensor": [t.contiguous() for t in tensors],
        "number": numbers,
        "factor": factors,
    }
    return [Head(**{name: _build(node, lists) for name, node in tree.items()}) for tree in _parse(spec)]


@lru_cache(maxsize=256)
def _parse(spec: str) -> list[dict[str, Any]]:
    """A tree a head: a node is its word, or (word, children)."""
    trees: list[dict[str, Any]] = []
    for text in spec.split("|"):
        tree: dict[str, Any] = {}
        for word in text.split(" "):
            path, _, what = word.partition("=")
            *parents, name = path.split(".")
            level = tree
            for parent in parents:
                level = level[parent][1]
            level[name] = (what, {})
        trees.append(tree)
    return trees


def _build(node: tuple[str, dict[str, Any]], lists: dict[str, Any]) -> Any:
    what, children = node
    if what[0] == "'":
        return what[1:]
    if what[0] == "(":
        return tuple(_build(child, lists) for child in children.values())
    if what[0] == "@":
        return _TYPES[what[1:]](**{name: _build(child, lists) for name, child in children.items()})
    kind, _, place = what.partition(":")
    return lists[kind][int(place)]


@lru_cache(maxsize=256)
def axes(spec: str) -> tuple[str, ...]:
    """The axis of each head, without the tensors."""
    return tuple(tree["axis"][0][1:] for tree in _parse(spec))


def check_heads(heads: Sequence[Head], x: Tensor, columns: int) -> None:
    """Shapes, dtypes and devices of everything the heads refer to, for rows x and so many columns.

    Raises:
        TypeError, ValueError: naming the head's field, what was given and what is expected.
    """
    if not heads or not all(isinstance(head, Head) for head in heads):
        raise ValueError(f"heads: expected at least one Head, got {heads!r}")
    n, m = x.shape[0], columns
    for k, head in enumerate(heads):
        where = f"heads[{k}]"
        if head.axis not in ("row", "column"):
            raise ValueError(f"{where}.axis: expected 'row' or 'column', got {head.axis!r}")
        if head.width is not None:
            checks.check_integer(head.width, f"{where}.width")
            if not 1 <= head.width <= x.shape[1]:
                raise ValueError(f"{where}.width: expected 1 to {x.shape[1]}, the width of x, got {head.width}")
        if head.reduce not in ("lse", *phi.NAMES):
            raise ValueError(f"{where}.reduce: expected 'lse' or one of {', '.join(phi.NAMES)}, got {head.reduce!r}")
        if not 0 <= head.smoothing <= 1:
            raise ValueError(f"{where}.smoothing: expected a number from 0 to 1, got {head.smoothing}")
        if isinstance(head.scale, Tensor):
            _check(head.scale, f"{where}.scale", (), False, x)
        for bias, name, size in ((head.row_bias, "row_bias", n), (head.column_bias, "column_bias", m)):
            if bias is not None:
                _check(bias, f"{where}.{name}", (size,), False, x)
        _check_mask(head.mask, f"{where}.mask", x, n, m)
        if head.target is not None:
            _check_target(head.target, f"{where}.target", x, n, m)


def _check_target(target: Target, where: str, x: Tensor, n: int, m: int) -> None:
    match target:
        case Indexed():
            _check(target.index, f"{where}.index", (n,), True, x)
        case Shifted():
            checks.check_integer(target.offset, f"{where}.offset")
            checks.check_count(target.period, f"{where}.period")
        case Masked():
            _check_mask(target.mask, f"{where}.mask", x, n, m)
            _check(target.weight, f"{where}.weight", (n,), False, x)
        case Circulant():
            checks.check_integer(target.period, f"{where}.period", 1)
            checks.check_integer(target.offset, f"{where}.offset")
            if len(target.shifts) != len(target.weights):
                raise ValueError(f"{where}: expected a weight for each shift, got {target.shifts}, {target.weights}")
        case Dense():
            _check(target.weights, f"{where}.weights", (n, m), False, x)
        case Listed():
            entries = (target.index.numel(),) if isinstance(target.index, Tensor) else ()
            _check(target.offsets, f"{where}.offsets", (n + 1,), True, x)
            _check(target.index, f"{where}.index", entries, True, x)
            _check(target.weight, f"{where}.weight", entries, False, x)
        case _:
            kinds = ", ".join(kind.__name__ for kind in get_args(Target))
            raise TypeError(f"{where}: expected None or one of {kinds}, got {type(target).__name__}")


def _check_mask(mask: PairMask, where: str, x: Tensor, n: int, m: int) -> None:
    for name in ("same", "different", "distinct"):
        labels = getattr(mask, name)
        if labels is not None:
            _check(labels[0], f"{where}.{name}[0]", (n,), True, x)
            _check(labels[1], f"{where}.{name}[1]", (m,), True, x)
    for name in ("above", "below"):
        bound = getattr(mask, name)
        if bound is not None:
            _check(bound, f"{where}.{name}", (n,), False, x)
    if mask.offset is not None:
        checks.check_integer(mask.offset, f"{where}.offset")
    if mask.period is not None and (mask.offset is None or mask.period < 1):
        raise ValueError(f"{where}.period: expected a positive number beside an offset, got {mask.period}")


def _check(t: Tensor, name: str, shape: tuple[int, ...], integers: bool, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {type(t).__name__}")
    kinds_differ = t.is_floating_point() or t.dtype == torch.bool if integers else not t.is_floating_point()
    if kinds_differ or t.is_complex():
        raise TypeError(f"{name}: expected {'an integer' if integers else 'a floating point'} dtype, got {t.dtype}")
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like the rows, got {t.device}")
