"""What torch.compile is to know of a function, said without its tracer: importing that takes longer than the rest of
PyTorch, and most who import fastret compile nothing."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_result(function: _Function) -> _Function:
    """Marks a function that is called while it is traced, its result a constant of the graph: what
    ``torch.compiler.assume_constant_result`` does once it has imported the tracer."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
