"""row_extrema by the kernel of kernels/triton/row_extrema.py, a launch for each extremum, in the tiles that masked_lse
takes for masks by threshold: the same scores, bit for bit. Nothing here waits for the device."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fastret.backends.pairs import PairMask
from fastret.backends.rows import accumulation_dtype, poison
from fastret.backends.triton.masked_lse import mask_arguments
from fastret.backends.triton.rows import pack_padded, padded
from fastret.kernels.triton import config
from fastret.kernels.triton import row_extrema as kernels


def forward(
    x: Tensor, y: Tensor | None, extrema: Sequence[tuple[str, PairMask]], *, normalize: bool, first_column: int
) -> list[tuple[Tensor, Tensor]]:
    """(value, index) of each extremum, as backends/reference defines them."""
    gallery = x if y is None else y
    with torch.cuda.device_of(x):
        nothing = poison(x, gallery)
        if not len(x) or not len(gallery):
            none = torch.zeros(len(x), dtype=nothing.dtype, device=x.device) + nothing
            worst = [none + (torch.inf if kind == "min" else -torch.inf) for kind, _ in extrema]
            return [(value, torch.full((len(x),), -1, device=x.device)) for value in worst]
        u = pack_padded(x, torch.arange(len(x), device=x.device), normalize).rows
        v = u if y is None else pack_padded(y, torch.arange(len(y), device=y.device), normalize).rows
        found = [_extremum(u, v, kind, mask, first_column) for kind, mask in extrema]
        return [(value.add_(nothing), index) for value, index in found]


def _extremum(u: Tensor, v: Tensor, kind: str, mask: PairMask, first_column: int) -> tuple[Tensor, Tensor]:
    n, m, width = len(u), len(v), padded(u.shape[1])
    options = config.lookup("lse heavy", u.device, u.dtype, width)
    blocks = triton.cdiv(n, options["BLOCK_M"])
    parts = config.parts(u.device, blocks, triton.cdiv(m, options["BLOCK_N"]))
    value = torch.empty(parts, n, dtype=accumulation_dtype(u.dtype), device=u.device)
    index = torch.empty(parts, n, dtype=torch.int64, device=u.device)
    kernels.row_extrema_kernel[blocks, parts](
        *(u, v, mask_arguments(mask), value, index, n, m, width, first_column),
        GREATEST=kind == "max",
        **{name: option for name, option in options.items() if name != "SLICE"},
    )
    if parts == 1:
        return value[0], index[0]
    part = (value.argmin(0) if kind == "min" else value.argmax(0))[None]  # the first of equals, as documented
    return value.gather(0, part)[0], index.gather(0, part)[0]
