"""What is measured on a GPU beside what is measured everywhere: fastret's kernels there, and floors from arithmetic.

A floor is what an H100 needs for the operations and bytes that a task cannot do without, at 660 TFLOP/s of bfloat16
products (what the best published kernels of this shape reach) and 3.35 TB/s: counted, not measured. What fastret's own
plans should take stands beside it (predictions.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from benchmarks import predictions, registry
from benchmarks.conditions import gpu_missing
from benchmarks.registry import DTYPES, Inputs, Op, Size, Variant

KERNELS = ("triton", "cuda")
SMALL = {"m": 512, "k": 16, "c": 200}  # in place of 64


@dataclass(frozen=True)
class Floor:
    """A task and the milliseconds an H100 has to take for it.

    Attributes:
        op: as on the command line.
        size: all of its dimensions.
        dtype: of its rows.
        milliseconds: None: bound by launches, of which ``note`` says how many there may be.
        note: what was counted.
        slow: takes many seconds to set up and check, so that it is left out of a quick round.
    """

    op: str
    size: Size
    dtype: str
    milliseconds: float | None
    note: str
    slow: bool = False

    def load(self, size: Size | None = None) -> Op:
        """The op, of this dtype, with these dimensions or those of ``size``; its first axis is the one that varies."""
        op, size = registry.in_dtype(registry.load(self.op), DTYPES[self.dtype]), size or self.size
        fixed = {name: value for name, value in size.items() if name != op.axis}
        return replace(op, fixed=fixed, sizes=(size[op.axis],), warm_up=min(op.warm_up, size[op.axis]))

    def small(self) -> Size:
        """What a CPU does in no time: of all that is counted at most SMALL, but as many classes as the least one has
        rows, and searches more than they find."""
        return {name: min(value, SMALL.get(name, 64)) for name, value in self.size.items()}

    def predicted(self) -> str:
        """Milliseconds by each plan, as text."""
        found = predictions.predicted(self.op, self.size, self.dtype)
        return ", ".join(f"{plan} {time:.2g}" for plan, time in found.items())


FLOORS = (
    Floor(
        "soft_assign",
        {"n": 4096, "m": 8, "k": 256, "l": 16},
        "bfloat16",
        0.02,
        "11 products, 19 in bfloat16, 4 exponentials, and launches",
    ),
    Floor("smooth_ap", {"n": 4096, "g": 4, "d": 512}, "bfloat16", 0.3, "4 N^2 D and 2 N^2 G sigmoids"),
    Floor("proxy_nca_512", {"c": 20_000, "b": 256, "d": 512}, "bfloat16", None, "at most 3 kernels of fastret"),
    Floor("info_nce_768", {"n": 32_768, "d": 768}, "bfloat16", 10.0, "8 N^2 D flops"),
    Floor("clip", {"n": 32_768, "d": 768}, "bfloat16", 10.0, "8 to 10 N^2 D flops"),
    Floor("proxy_nca_512", {"c": 1_000_000, "b": 512, "d": 512}, "bfloat16", 4.0, "W, dW and O(N + C) bytes"),
    Floor("smooth_ap", {"n": 16_384, "g": 16, "d": 512}, "bfloat16", 4.0, "4 N^2 D and 2 N^2 G sigmoids"),
    Floor("topk", {"m": 1_280_000, "n": 50_000, "d": 384}, "bfloat16", 75.0, "2 N M D flops, and top-k", slow=True),
    Floor(
        "pq_topk",
        {"m": 1_000_000, "n": 10_000, "d": 64, "books": 16},
        "float32",
        21.0,
        "N M lookups in 16 tables of float32 in shared memory",
        slow=True,
    ),
    Floor(
        "pq_topk",
        {"m": 1_000_000, "n": 10_000, "d": 64, "books": 16},
        "float16",
        11.0,
        "N M lookups in 16 tables of float16 in shared memory",
        slow=True,
    ),
)


def gpu_variants(reduction: str, call: Callable[[Inputs, str], Tensor]) -> tuple[Variant, ...]:
    """``call(inputs, impl)`` by the implementations with kernels for GPUs."""
    return tuple(
        Variant(f"fastret-{impl}", partial(_by, call, impl), missing=gpu_missing(reduction, impl)) for impl in KERNELS
    )


def _by(call: Callable[[Inputs, str], Tensor], impl: str, inputs: Inputs) -> Tensor:
    return call(inputs, impl)


def over_floor(milliseconds: float, floor: Floor) -> str:
    """Measured over counted, as text."""
    return "-" if floor.milliseconds is None else f"{milliseconds / floor.milliseconds:.1f}x"
