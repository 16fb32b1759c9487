"""A module one of whose buffers ``half()``, ``double()`` and ``to(dtype)`` leave in float32."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn


class StaysFloat32(nn.Module):
    """The buffer ``stays`` follows the module's device but not its dtype: a float16 holds no Z of a large bank."""

    stays: ClassVar[str]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaysFloat32":
        before: Tensor = getattr(self, self.stays)
        super()._apply(fn, recurse)
        after: Tensor = getattr(self, self.stays)
        if after.dtype != before.dtype:
            setattr(self, self.stays, before.to(after.device))
        return self
