"""What is measured: an op with its inputs, variants, definition and floor. A new op is a new module in ``ops/``."""

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import ops

Size = dict[str, int]
Inputs = dict[str, Tensor]
Figures = dict[str, float | str]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF_TOLERANCE = 0.05


class Result(NamedTuple):
    """What one forward and backward returns: the loss, and the gradient of each input that is asked for.

    Of an op without gradients, what its forward returns, of any shape, stands in the place of the loss.
    """

    loss: Tensor
    gradients: Inputs


def _as_given(inputs: Inputs) -> Inputs:
    return inputs


def _everywhere(device: str) -> str | None:
    return None


def _any_size(size: Size) -> str | None:
    return None


def _itself(inputs: Inputs, result: Tensor) -> Tensor:
    return result


def _none(inputs: Inputs) -> Figures:
    return {}


@dataclass(frozen=True)
class Variant:
    """One way to compute an op.

    Attributes:
        name: as in tables and in the history.
        forward: the loss (a 0-dim tensor) of prepared inputs, of which the harness runs backward; or what an op
            without gradients returns.
        prepare: turns the op's inputs into this variant's, once, outside of what is measured.
        missing: why it cannot run here on a device type (a package, an extension), or None.
        unfit: why it is not run at a size, or None.
        expected: the inputs whose loss it computes, where that is not the loss of the inputs it is given.
        setting: a context it runs in.
        note: what a reader of its figures must know.
    """

    name: str
    forward: Callable[[Inputs], Tensor]
    prepare: Callable[[Inputs], Inputs] = _as_given
    missing: Callable[[str], str | None] = _everywhere
    unfit: Callable[[Size], str | None] = _any_size
    expected: Callable[[Inputs], Inputs] = _as_given
    setting: Callable[[], AbstractContextManager[None]] = nullcontext
    note: str = ""

    def refusal(self, size: Size, device: str) -> str | None:
        """Why it is not run at this size on this device type, or None. Sizes are unfit for a CPU; a GPU shows
        itself what does not fit."""
        return self.missing(device) or (self.unfit(size) if device == "cpu" else None)


@dataclass(frozen=True)
class Op:
    """An op of fastret and everything that is needed to measure it.

    Attributes:
        name: as on the command line.
        module: where ``OP`` is, for the processes that measure memory.
        axis: the dimension that is varied ("n"), over ``sizes``; ``fixed`` holds the others.
        setup: inputs (CPU) of a size and a seed.
        gradients: inputs that receive a gradient, where present; none: an op that has no backward.
        variants: ways to compute it.
        oracle: the loss by definition, of float64 inputs.
        probe: inputs of the correctness check, derived from those that are timed: where the definition is too big for
            all of them, with something in them that restricts it to a part.
        loss_tolerance: largest error of the loss, or of any number of what is judged in its place.
        gradient_tolerance: largest error of a gradient, relative to its norm.
        floor: from inputs, a call that does the least work any implementation could do.
        floor_name: what that is.
        warm_up: value of the axis that loads code and starts threads before memory is measured.
        judged: of float64 inputs and a result, what is compared with the same of the definition's result; for results
            that may differ and be as good, such as indices.
        figures: what else there is to know of the inputs or of the results that all variants share, such as recall.
        dtype: of floating inputs.
    """

    name: str
    module: str
    axis: str
    sizes: tuple[int, ...]
    fixed: Size
    setup: Callable[[Size, int], Inputs]
    gradients: tuple[str, ...]
    variants: tuple[Variant, ...]
    oracle: Callable[[Inputs], Tensor]
    probe: Callable[[Inputs], Inputs]
    loss_tolerance: float
    gradient_tolerance: float
    floor: Callable[[Inputs], Callable[[], None]]
    floor_name: str
    warm_up: int
    judged: Callable[[Inputs, Tensor], Tensor] = _itself
    figures: Callable[[Inputs], Figures] = _none
    dtype: torch.dtype = torch.float32

    @property
    def passes(self) -> str:
        """What is timed."""
        return "forward + backward" if self.gradients else "forward"

    def size(self, value: int) -> Size:
        """The size with this value on the axis."""
        return {**self.fixed, self.axis: value}

    def inputs(self, size: Size, seed: int, device: str) -> Inputs:
        given = self.setup(size, seed)
        return {name: t.to(device, self.dtype if t.is_floating_point() else t.dtype) for name, t in given.items()}

    def variant(self, name: str) -> Variant:
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise ValueError(f"variant: expected one of {', '.join(v.name for v in self.variants)}, got {name!r}")

    def step(self, forward: Callable[[Inputs], Tensor], inputs: Inputs) -> Result:
        """One forward and backward."""
        if not self.gradients:
            return Result(forward(inputs), {})
        leaves = {name: inputs[name].detach().requires_grad_() for name in self.gradients if name in inputs}
        loss = forward({**inputs, **leaves})
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return Result(loss.detach(), dict(zip(leaves, gradients, strict=True)))

    def run(self, variant: Variant, inputs: Inputs) -> Result:
        """One forward and backward of a variant on inputs prepared for it, in its setting."""
        with variant.setting():
            return self.step(variant.forward, inputs)


def in_dtype(op: Op, dtype: torch.dtype) -> Op:
    """The op with inputs of another dtype: an op of its own in tables and in the history. Dense forms in half precision
    have scores of as few digits, which their losses show: errors up to HALF_TOLERANCE are no mistake there."""
    if dtype == op.dtype:
        return op
    half = HALF_TOLERANCE if dtype.itemsize == 2 else 0.0
    return replace(
        op,
        name=f"{op.name} {str(dtype).removeprefix('torch.')}",
        dtype=dtype,
        loss_tolerance=max(op.loss_tolerance, half),
        gradient_tolerance=max(op.gradient_tolerance, half),
    )


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__))


def load(name: str) -> Op:
    """The op of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in names():
        raise ValueError(f"op: expected one of {', '.join(names())}, got {name!r}")
    return load_module(f"{ops.__name__}.{name}")


def load_module(module: str) -> Op:
    """The ``OP`` of a module."""
    op = importlib.import_module(module).OP
    if not isinstance(op, Op):
        raise TypeError(f"{module}.OP: expected an Op, got {type(op).__name__}")
    return op
