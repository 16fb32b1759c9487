"""What the operators of masked_lse and masked_lse_sum take, in one place: rows, heads as flat lists, settings."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.centers import Centers
from fastret.backends.pairs import Gradients, Head, Indexed, Listed
from fastret.backends.rows import accumulation_dtype
from fastret.ops import checks
from fastret.ops.heads import flatten, restore

SCHEMA = (
    "Tensor x, Tensor? y, Tensor? scale, Tensor? row_bias, Tensor? column_bias, Tensor[] tensors, SymInt[] numbers, "
    "float[] factors, str spec, bool normalize, SymInt first_column, SymInt columns, SymInt centers, "
    "float? center_temperature, str impl"
)
LEARNED: Final = 5


class Problem(NamedTuple):
    """Arguments in the order of ``SCHEMA``; the first ``LEARNED`` of them receive gradients."""

    x: Tensor
    y: Tensor | None
    scale: Tensor | None
    row_bias: Tensor | None
    column_bias: Tensor | None
    tensors: list[Tensor]
    numbers: list[int]
    factors: list[float]
    spec: str
    normalize: bool
    first_column: int
    columns: int
    centers: int
    center_temperature: float | None
    impl: str

    def heads(self) -> list[Head]:
        """Heads as implementations get them."""
        return restore(self.spec, *self[2:8])

    def checked_heads(self) -> list[Head]:
        """Heads, the values of their indices and offsets checked."""
        heads = self.heads()
        for k, head in enumerate(heads):
            if isinstance(head.target, (Indexed, Listed)):
                checks.check_range(head.target.index, self.columns, f"heads[{k}].target.index")
            if isinstance(head.target, Listed):
                checks.check_offsets(head.target.offsets, head.target.index.shape[0], f"heads[{k}].target.offsets")
        return heads

    def module(self) -> ModuleType:
        return registry.IMPLEMENTATIONS[self.impl].module("masked_lse")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of implementations; one without sub-centres is given none."""
        options = {"centers": Centers(self.centers, self.center_temperature)} if self.centers > 1 else {}
        return {"normalize": self.normalize, "first_column": self.first_column, "columns": self.columns, **options}

    def empty_gradients(self, need: Sequence[bool], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Shapes of ``flat_gradients``, for a shape function."""
        return [
            self.x.new_empty(0, dtype=dtype) if t is None or not wanted else t.new_empty(t.shape, dtype=dtype)
            for t, wanted in zip(self[:LEARNED], need, strict=True)
        ]


def pack(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    *,
    normalize: bool,
    first_column: int,
    columns: int,
    centers: int = 1,
    center_temperature: float | None = None,
    impl: str,
) -> Problem:
    """Heads taken apart, their tensors in the accumulation dtype of the rows."""
    flat = flatten(heads, accumulation_dtype(x.dtype))
    learned = (flat.scale, flat.row_bias, flat.column_bias)
    lists = (flat.tensors, flat.numbers, flat.factors)
    sizes = (first_column, columns, centers)
    return Problem(x, y, *learned, *lists, flat.spec, normalize, *sizes, center_temperature, impl)


def flat_gradients(gradients: Gradients, x: Tensor) -> list[Tensor]:
    """Gradients of x, y, scale (K,), row_bias (K', N), column_bias (K'', M); an empty tensor where not wanted."""

    def stacked(values: list[Tensor | None]) -> Tensor:
        given = [v for v in values if v is not None]
        return torch.stack(given) if given else x.new_empty(0)

    sides = [x.new_empty(0) if side is None else side for side in gradients[:2]]
    return [*sides, stacked(gradients.scale), stacked(gradients.row_bias), stacked(gradients.column_bias)]
