"""rank_sums by the kernels of kernels/triton/rank_sums.py: sorts and normalises the rows, launches, unsorts; or by
blocks that are stored (``plans``).

Nothing here waits for the device: launch grids follow from shapes alone, and CUDA graphs can capture every call. Memory
beyond inputs and outputs: sorted rows in their own dtype, their gradients in the dtype of accumulation, four numbers a
positive pair; FASTRET_WORKSPACE where blocks are stored. Where sums are divided into parts, a copy of them for each: in
all at most BLOCK_M rows for a program that is resident.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastret.backends.rows import accumulation_dtype
from fastret.backends.segments import Segments
from fastret.backends.triton import plans, rank_sums_strips
from fastret.backends.triton.plans import Strips
from fastret.backends.triton.rows import PackedRows, nothing_yet, pack_padded, padded, total
from fastret.kernels.triton import config
from fastret.kernels.triton import rank_sums as kernels

# The scale up to which sigmoids are factored: 2 to half the score of unit rows, which rounding may lengthen, then stays
# within float32, inverse and all. Rows that are not normalised have no bound that the host knows.
_LARGEST = 240.0


@dataclass(frozen=True)
class _Problem:
    """Everything sorted by class, and the table of positive scores.

    Attributes:
        x, y: queries (N, D) and gallery (M, D), ``width`` apart; the same object where the gallery is the batch.
        width: D and its padding.
        nothing: 0, or NaN where there is any in the rows.
        segments: start, size and first pair of each sorted query, and where it is excluded its slot; (N,) int64 each.
        scale: log2(e) / temperature, 0-dim, in the dtype of accumulation: a kernel's float argument is float32.
        scores: (P,) scaled scores of the positive pairs; ``score_positives`` fills it.
        roots: (P,) square roots of 2^scores, filled likewise, where sigmoids are factored.
        factored: how they are, as the kernels' FACTORED; 0: they are not.
    """

    x: PackedRows
    y: PackedRows
    width: int
    nothing: Tensor
    segments: tuple[Tensor, Tensor, Tensor, Tensor | None]
    scale: Tensor
    scores: Tensor
    roots: Tensor | None
    factored: int

    def score_positives(self) -> None:
        """Fills ``scores``."""
        x, y = self.x.rows, self.y.rows
        options = config.lookup("scores", x.device, x.dtype)
        tables = self.scores, self.roots
        kernels.positive_scores_kernel[(triton.cdiv(len(x), options["BLOCK_M"]),)](
            *(x, y, *self.segments[:3], self.scale, *tables, len(x), len(y), self.width),
            PRECISION=config.precision(x.dtype),
            **{**options, "FACTORED": self.factored},
        )

    def pairs(self) -> rank_sums_strips.Pairs:
        return rank_sums_strips.Pairs(self.segments, self.scale, self.scores, self.roots, self.factored)

    def strips(self) -> Strips | None:
        """The blocks of scores to go through; None where they are not stored: by other plans, or as no strip fits."""
        strips = Strips(self.x.rows, self.y.rows, whole_rows=True)
        fits = plans.chosen() != "auto" or strips.fits()
        return strips if fits and self.plan() == "strip" else None

    def blocks(self) -> Strips | None:
        """The same for backward, where weights may be stored instead."""
        return Strips(self.x.rows, self.y.rows, stored=False) if self.plan() == "weights" else self.strips()

    def plan(self) -> str:
        return plans.plan_for(self.x.rows, "gradient")

    def sums(self, slopes: bool) -> list[Tensor]:
        """rank_all, rank_pos and, where they are wanted, slopes (P,)."""
        x, y, pairs = self.x.rows, self.y.rows, len(self.scores)
        options = config.lookup("sums", x.device, x.dtype)
        blocks = triton.cdiv(len(x), options["BLOCK_M"])
        parts = config.parts(x.device, blocks, triton.cdiv(len(y), options["BLOCK_N"]), rank_sums_strips.SHARING)
        tables = [self.scores.new_empty(parts, pairs) for _ in range(2 + slopes)]
        kernels.rank_sums_kernel[blocks, parts](
            *(x, y, *self.segments, self.scale, self.scores, self.roots, *tables, *[None] * (not slopes)),
            *(len(x), len(y), self.width, pairs),
            PRECISION=config.precision(x.dtype),
            FACTORED=self.factored,
            **options,
        )
        return [total(t) for t in tables]

    def gradients(
        self, upstream: rank_sums_strips.Upstream, *, of_x: bool, of_y: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the packed rows of x and of y; where they are the same, the sum of both in the first."""
        grad_scores = torch.empty_like(self.scores)
        self.pairs().add_positives(upstream, grad_scores, self.x.rows.dtype)
        grad_all, symmetric = upstream.grad_all, self.x is self.y
        du = self.gradient(grad_all, grad_scores, of_x=True, of_y=symmetric) if of_x else None
        dv = self.gradient(grad_all, grad_scores, of_x=False, of_y=True) if of_y and not symmetric else None
        return du, dv

    def gradient(self, grad_all: Tensor, grad_scores: Tensor, *, of_x: bool, of_y: bool) -> Tensor:
        """Gradient of the packed rows of x, of y, or of both where they are the same, in parts."""
        u, v = (self.x.rows, self.y.rows) if of_x else (self.y.rows, self.x.rows)
        n, m = len(u), len(v)
        options = config.lookup("gradient", u.device, u.dtype, self.width)
        blocks, slices = triton.cdiv(n, options["BLOCK_M"]), triton.cdiv(self.width, options["SLICE"])
        parts = config.parts(u.device, blocks * slices, triton.cdiv(m, options["BLOCK_N"]))
        du = self.scores.new_empty(parts, n, self.width)
        kernels.rank_gradient_kernel[blocks, slices, parts](
            *(u, v, *self.segments, self.scale, self.scores, self.roots, grad_all, grad_scores, du),
            *(n, m, self.width),
            ROWS=of_x,
            COLUMNS=of_y,
            PRECISION=config.precision(u.dtype),
            FACTORED=self.factored,
            **options,
        )
        return du[..., : u.shape[1]]


def _prepare(
    x: Tensor, y: Tensor | None, s: Segments, pairs: int, temperature: float, exclude_self: bool, normalize: bool
) -> _Problem:
    # by where their positives begin, and by where those end: kernels take a block's stretch from its first and last row
    order = s.order if y is None else torch.argsort(2 * s.start + s.count, stable=True)
    width = padded(x.shape[1])
    nothing = nothing_yet(x)
    queries = pack_padded(x, order, normalize, nothing)
    gallery = queries if y is None else pack_padded(y, s.order, normalize, nothing)
    dtype = accumulation_dtype(x.dtype)
    start = s.start[order]
    slot = torch.arange(len(x), device=x.device) - start if exclude_self else None
    scale = math.log2(math.e) / temperature
    factored = config.lookup("scores", x.device, x.dtype)["FACTORED"] if normalize and scale <= _LARGEST else 0
    return _Problem(
        queries,
        gallery,
        width,
        nothing,
        (start, s.count[order], s.first_pair()[order], slot),
        torch.full((), scale, dtype=dtype, device=x.device),
        torch.empty(pairs, dtype=dtype, device=x.device),
        torch.empty(pairs, dtype=dtype, device=x.device) if factored else None,
        factored,
    )


# forward sums the slopes of the negatives too where it is asked to, and backward takes them (ops/rank_sums.py)
SUMS_SLOPES = True


def forward(
    x: Tensor,
    y: Tensor | None,
    segments: Segments,
    pairs: int,
    *,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    slopes: bool,
) -> tuple[Tensor, ...]:
    """rank_all, rank_pos (P,) as backends/reference defines them; and, where they are wanted, the sums over negatives
    of sigmoid', in units of temperature."""
    if pairs == 0:
        return tuple(x.new_empty(0, dtype=accumulation_dtype(x.dtype)) for _ in range(2 + slopes))
    with torch.cuda.device_of(x):
        problem = _prepare(x, y, segments, pairs, temperature, exclude_self, normalize)
        if (strips := problem.strips()) is not None:
            rank_all, rank_pos, *rest = rank_sums_strips.sums(strips, problem.pairs(), slopes)
        else:
            problem.score_positives()
            rank_all, rank_pos, *rest = problem.sums(slopes)
        return rank_all.add_(problem.nothing), rank_pos.add_(problem.nothing), *rest


def backward(
    grad_all: Tensor,
    grad_pos: Tensor,
    x: Tensor,
    y: Tensor | None,
    segments: Segments,
    *,
    slopes: Tensor,
    temperature: float,
    exclude_self: bool,
    normalize: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and y from those of rank_all and rank_pos (P,)."""
    pairs = grad_all.numel()
    if pairs == 0:
        return x.new_zeros(x.shape) if need_x else None, y.new_zeros(y.shape) if y is not None and need_y else None
    with torch.cuda.device_of(x):
        upstream = rank_sums_strips.Upstream(grad_all.contiguous(), grad_pos.contiguous(), slopes)
        problem = _prepare(x, y, segments, pairs, temperature, exclude_self, normalize)
        blocks = problem.blocks()
        if blocks is None or not blocks.stored:
            problem.score_positives()
        if blocks is not None:
            du, dv = rank_sums_strips.gradients(blocks, problem.pairs(), upstream, of_x=need_x, of_y=need_y)
        else:
            du, dv = problem.gradients(upstream, of_x=need_x, of_y=need_y)
        dx = None if du is None else problem.x.gradient(du, x.dtype)
        return dx, None if y is None or dv is None else problem.y.gradient(dv, y.dtype)
