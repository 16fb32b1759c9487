"""row_extrema by the kernel of kernels/triton/row_extrema.py, a launch for each extremum, in the tiles or the strips
(``plans``) that masked_lse takes for masks by threshold: the same scores, bit for bit. Nothing here waits for the
device."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fastret.backends.pairs import PairMask
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton.heads import mask_arguments, mask_part
from fastret.backends.triton.plans import Strips, plan_for
from fastret.backends.triton.rows import look, nothing_yet, pack_padded, padded
from fastret.kernels.triton import config
from fastret.kernels.triton import row_extrema as kernels

_Found = tuple[Tensor, Tensor]  # value and index


def forward(
    x: Tensor, y: Tensor | None, extrema: Sequence[tuple[str, PairMask]], *, normalize: bool, first_column: int
) -> list[tuple[Tensor, Tensor]]:
    """(value, index) of each extremum, as backends/reference defines them."""
    gallery = x if y is None else y
    with torch.cuda.device_of(x):
        nothing = nothing_yet(x)
        if not len(x) or not len(gallery):
            look(x, nothing)
            look(gallery, nothing)
            none = torch.zeros(len(x), dtype=nothing.dtype, device=x.device) + nothing
            worst = [none + (torch.inf if kind == "min" else -torch.inf) for kind, _ in extrema]
            return [(value, torch.full((len(x),), -1, device=x.device)) for value in worst]
        u = pack_padded(x, None, normalize, nothing).rows
        v = u if y is None else pack_padded(y, None, normalize, nothing).rows
        plan = plan_for(u, "lse heavy")
        if plan == "strip":
            found = _by_strips(Strips(u, v), extrema, first_column)
        else:
            options = config.lookup("lse weights heavy" if plan == "weights" else "lse heavy", u.device, u.dtype)
            tile = {name: option for name, option in options.items() if name not in ("SLICE", "PIECES")}
            found = [_extremum(u, v, kind, mask, padded(x.shape[1]), first_column, tile) for kind, mask in extrema]
        return [(value.add_(nothing), index) for value, index in found]


def _by_strips(strips: Strips, extrema: Sequence[tuple[str, PairMask]], first_column: int) -> list[_Found]:
    """Blocks come in ascending columns, so of equals the earlier stays."""
    u = strips.u
    found: list[list[_Found]] = [[] for _ in extrema]
    options = {**config.lookup("strip", u.device, u.dtype), "BLOCK_K": 0}  # nothing is multiplied
    for b, scores in strips.blocks():
        for table, (kind, mask) in zip(found, extrema, strict=True):
            here = _extremum(
                scores, None, kind, mask_part(mask, b), scores.stride(0), first_column + b.first_column, options
            )
            if b.first_column:
                value, index = table.pop()
                better = here[0] < value if kind == "min" else here[0] > value
                here = torch.where(better, here[0], value), torch.where(better, here[1], index)
            table.append(here)
    return [(torch.cat([v for v, _ in table]), torch.cat([i for _, i in table])) for table in found]


def _extremum(
    u: Tensor, v: Tensor | None, kind: str, mask: PairMask, width: int, first_column: int, options: config.Options
) -> _Found:
    """Of rows u and v, or of scores u."""
    n, m = len(u), u.shape[1] if v is None else len(v)
    blocks = triton.cdiv(n, options["BLOCK_M"])
    parts = config.parts(u.device, blocks, triton.cdiv(m, options["BLOCK_N"]))
    value = torch.empty(parts, n, dtype=accumulation_dtype(u.dtype), device=u.device)
    index = torch.empty(parts, n, dtype=torch.int64, device=u.device)
    kernels.row_extrema_kernel[blocks, parts](
        *(u, v, mask_arguments(mask), value, index, n, m, width, first_column),
        GREATEST=kind == "max",
        PRECISION=config.precision(u.dtype),
        **options,
    )
    if parts == 1:
        return value[0], index[0]
    part = (value.argmin(0) if kind == "min" else value.argmax(0))[None]  # the first of equals, as documented
    return value.gather(0, part)[0], index.gather(0, part)[0]
