"""eager_only: an error under torch.compile that no graph break leads around.

Where a Python exception is raised under tracing, plain torch.compile breaks the graph and runs the code eagerly, as if
it had asked for nothing. An operator that raises does so while it is traced, and where it is called behind a break.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.ops.library import define


def eager_only(x: Tensor, message: str) -> Tensor:
    """x.

    Raises:
        NotImplementedError: ``message``, under torch.compile; with fullgraph=True inside of Dynamo's own error.
    """
    return torch.ops.fastret.eager_only.default(x, message) if torch.compiler.is_compiling() else x


def _refuse(x: Tensor, message: str) -> Any:
    raise NotImplementedError(message)


define("eager_only(Tensor x, str message) -> Tensor", _refuse, _refuse)
