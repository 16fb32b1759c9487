"""The registered operators (``torch.ops.fastret.*``) and how they are defined.

An operator carries no autograd formula of its own: an ``autograd.Function`` above it does, because that form alone
passes gradcheck, opcheck, compile(fullgraph), torch.func and refuses forward-mode AD instead of returning zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastret.backends.tracing import constant_result

_library = torch.library.Library("fastret", "DEF")

_DEVICES = ("CPU", "CUDA", "MPS", "XPU")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an operator for every device (the implementation dispatches further) and its shape function."""
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.partition("(")[0]

    def in_full_precision(*arguments: Any) -> Any:
        with torch._C._DisableAutocast():  # rows come in the dtype they are to be worked in
            return implementation(*arguments)

    for device in _DEVICES:
        _library.impl(name, in_full_precision, device)
    torch.library.register_fake(f"fastret::{name}", fake, lib=_library)


def apply(function: Any, *arguments: Any) -> Any:
    """``function.apply(*arguments)``, differentiated also where torch.compile traces torch.func.grad.

    Dynamo notes whether a tensor requires a gradient when it first meets it, and does not look again when
    torch.func.grad starts to differentiate it. It would take the arguments for constants, inline the forward without
    its backward, and the gradient would be zero; what is computed from a tensor is looked at anew, even a view.

    Raises:
        NotImplementedError: torch.compile traces several transforms of torch.func, or forward mode: with fullgraph=True
            inside of Dynamo's own error, otherwise Dynamo runs the code eagerly.
    """
    if torch.compiler.is_compiling():
        if not _compiles():  # its stand-in for a Function knows one level of differentiation, and none forward
            raise NotImplementedError(
                f"{function.__name__}: under torch.compile one torch.func.grad, vjp or jacrev, not several or jvp"
            )
        arguments = tuple(a.view_as(a) if isinstance(a, Tensor) else a for a in arguments)
    return function.apply(*arguments)


@constant_result  # Dynamo guards the stack, and traces no look at it
def _compiles() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return len(stack) <= 1 and all(level.key() != torch._C._functorch.TransformType.Jvp for level in stack)


def loop_under_vmap(name: str) -> None:
    """vmap of an operator with lists of tensors, for which PyTorch has no fallback: one call per item of the batch."""
    operator = getattr(torch.ops.fastret, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[list[Tensor], list[int]]:
        results = [
            operator(*(_item(a, d, k) for a, d in zip(arguments, in_dims, strict=True))) for k in range(info.batch_size)
        ]
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return stacked, [0] * len(stacked)

    torch.library.register_vmap(f"fastret::{name}", rule, lib=_library)


def _item(argument: Any, dim: Any, k: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_item(a, d, k) for a, d in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, k)


def refuse(op: str, what: str) -> "staticmethod[..., Any]":
    """A method of an ``autograd.Function`` for what the kernels do not compute: an error that names the way out."""

    def method(*_: Any) -> Any:
        raise NotImplementedError(f"{op}: the fused kernels do not support {what}; impl='reference' does")

    return staticmethod(method)
