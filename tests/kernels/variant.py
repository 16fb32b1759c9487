"""What the compile gate is told of a kernel that it compiles."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastret.kernels.triton import config

Choices = Callable[..., tuple[config.Options, ...]]
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


class Variant(NamedTuple):
    """A kernel with its compile-time arguments and launch options.

    Attributes:
        name: what tells it from others of the kernel.
        arguments: of the rest those, as types in any nesting of tuples, that their names do not tell. What is no string
            there is a constant, as it is at a launch: None or a tl.constexpr.
        rare: compiled with --all only.
    """

    kernel: Any
    options: dict[str, int]
    name: str = ""
    arguments: Mapping[str, Any] = {}
    rare: bool = False

    def __str__(self) -> str:
        constants = " ".join(f"{name}={int(value)}" for name, value in self.options.items() if name.isupper())
        return " ".join(filter(None, (self.kernel.__name__, self.name, constants)))


def accumulated(dtype: str) -> str:
    """Pointers to numbers in the dtype of accumulation."""
    return "*fp64" if dtype == "fp64" else "*fp32"


def tile(options: Mapping[str, int]) -> dict[str, int]:
    """What a kernel without a gradient takes."""
    return {name: value for name, value in options.items() if name != "SLICE"}
