from collections.abc import Sequence

from fastret.backends.cpu.array import ArrayTuple

_Relation = tuple[ArrayTuple, ArrayTuple] | None

# names for type checkers only: csrc/cpu/module.cpp says what each place holds
MaskTuple = tuple[_Relation, _Relation, _Relation, int | None, int, ArrayTuple | None, ArrayTuple | None]
TargetTuple = tuple[
    int,
    ArrayTuple | None,
    ArrayTuple | None,
    list[int],
    list[float],
    int,
    int,
    MaskTuple,
    ArrayTuple | None,
    ArrayTuple | None,
    float,
    float,
]
HeadTuple = tuple[float, bool, MaskTuple, TargetTuple, ArrayTuple | None, ArrayTuple | None, int]
ParameterTuple = tuple[ArrayTuple | None, ArrayTuple | None, ArrayTuple | None]
AssignTuple = tuple[ArrayTuple | None, ArrayTuple | None, ArrayTuple | None, ArrayTuple | None, ArrayTuple, int]
FourArrays = tuple[ArrayTuple | None, ArrayTuple | None, ArrayTuple | None, ArrayTuple | None]

def rank_sums_forward(
    x: ArrayTuple,
    y: ArrayTuple | None,
    order: ArrayTuple,
    start: ArrayTuple,
    count: ArrayTuple,
    exclude_self: bool,
    normalize: bool,
    temperature: float,
    threads: int,
    rank_all: ArrayTuple,
    rank_pos: ArrayTuple,
    /,
) -> None: ...
def rank_sums_backward(
    x: ArrayTuple,
    y: ArrayTuple | None,
    order: ArrayTuple,
    start: ArrayTuple,
    count: ArrayTuple,
    exclude_self: bool,
    normalize: bool,
    temperature: float,
    threads: int,
    grad_all: ArrayTuple,
    grad_pos: ArrayTuple,
    dx: ArrayTuple | None,
    dy: ArrayTuple | None,
    /,
) -> None: ...
def masked_lse_forward(
    x: ArrayTuple,
    y: ArrayTuple | None,
    heads: list[HeadTuple],
    levels: list[tuple[int, int]],
    normalize: bool,
    first_column: int,
    threads: int,
    results: list[tuple[ArrayTuple, ArrayTuple]],
    centers: tuple[int, float],
    /,
) -> None: ...
def masked_lse_backward(
    x: ArrayTuple,
    y: ArrayTuple | None,
    heads: list[HeadTuple],
    levels: list[tuple[int, int]],
    normalize: bool,
    first_column: int,
    threads: int,
    upstream: Sequence[tuple[ArrayTuple, ArrayTuple | None, ArrayTuple | None]],
    dx: ArrayTuple | None,
    dy: ArrayTuple | None,
    gradients: list[ParameterTuple],
    centers: tuple[int, float],
    /,
) -> None: ...
def masked_lse_sweep(
    x: ArrayTuple,
    y: ArrayTuple | None,
    head: HeadTuple,
    normalize: bool,
    first_column: int,
    threads: int,
    weight: ArrayTuple,
    lse: ArrayTuple,
    t: ArrayTuple,
    dx: ArrayTuple | None,
    dy: ArrayTuple | None,
    gradients: ParameterTuple,
    centers: tuple[int, float],
    /,
) -> None: ...
def row_extrema(
    x: ArrayTuple,
    y: ArrayTuple | None,
    extrema: list[tuple[bool, MaskTuple]],
    normalize: bool,
    first_column: int,
    threads: int,
    results: list[tuple[ArrayTuple, ArrayTuple]],
    /,
) -> None: ...
def pair_dot_forward(
    x: ArrayTuple,
    y: ArrayTuple | None,
    row: ArrayTuple,
    column: ArrayTuple,
    normalize: bool,
    threads: int,
    scores: ArrayTuple,
    /,
) -> None: ...
def pair_dot_backward(
    x: ArrayTuple,
    y: ArrayTuple | None,
    row: ArrayTuple,
    column: ArrayTuple,
    normalize: bool,
    threads: int,
    grad: ArrayTuple,
    dx: ArrayTuple | None,
    dy: ArrayTuple | None,
    /,
) -> None: ...
def segment_mean_forward(
    x: ArrayTuple,
    index: ArrayTuple,
    mean: bool,
    threads: int,
    result: ArrayTuple,
    counts: ArrayTuple,
    /,
) -> None: ...
def segment_mean_backward(
    grad: ArrayTuple,
    index: ArrayTuple,
    counts: ArrayTuple,
    mean: bool,
    threads: int,
    dx: ArrayTuple,
    /,
) -> None: ...
def topk(
    x: ArrayTuple,
    y: ArrayTuple,
    k: int,
    mask: MaskTuple,
    metric: int,
    first_column: int,
    threads: int,
    scores: ArrayTuple,
    indices: ArrayTuple,
    /,
) -> None: ...
def topk_plan(n: int, m: int, k: int, key_bytes: int, threads: int, /) -> tuple[int, int, int, int]: ...
def pq_topk(
    query: ArrayTuple,
    codebook: ArrayTuple,
    codes: ArrayTuple,
    words: int,
    k: int,
    metric: int,
    first_index: int,
    half_tables: bool,
    threads: int,
    scores: ArrayTuple,
    indices: ArrayTuple,
    /,
) -> None: ...
def pq_topk_plan(groups: int, n: int, words: int, k: int, threads: int, /) -> tuple[int, int, int]: ...
def sampled_dot_forward(
    x: ArrayTuple,
    bank: ArrayTuple,
    first: ArrayTuple | None,
    index: ArrayTuple | None,
    seed: int,
    count: int,
    threads: int,
    scores: ArrayTuple,
    /,
) -> None: ...
def sampled_dot_backward(
    x: ArrayTuple,
    bank: ArrayTuple,
    first: ArrayTuple | None,
    index: ArrayTuple | None,
    seed: int,
    count: int,
    threads: int,
    grad: ArrayTuple,
    dx: ArrayTuple | None,
    d_bank: ArrayTuple | None,
    /,
) -> None: ...
def patchmix(
    x: ArrayTuple, groups: ArrayTuple, sizes: tuple[int, int, int, int, int], threads: int, out: ArrayTuple, /
) -> None: ...
def soft_assign_forward(
    problem: AssignTuple,
    threads: int,
    codes: ArrayTuple,
    lse: ArrayTuple | None,
    soft: ArrayTuple | None,
    usage: ArrayTuple | None,
    purity: ArrayTuple | None,
    /,
) -> None: ...
def soft_assign_backward(
    problem: AssignTuple,
    threads: int,
    upstream: FourArrays,
    lse: ArrayTuple | None,
    codes: ArrayTuple,
    straight_through: bool,
    gradients: FourArrays,
    /,
) -> None: ...
def assign_plan(
    n: int, books: int, words: int, sum_bytes: int, item_bytes: int, threads: int, /
) -> tuple[int, int, int, bool, int]: ...
def sweep_plan(n: int, m: int, d: int, item_bytes: int, threads: int, centers: int, /) -> tuple[int, int, bool]: ...
def plan(n: int, m: int, symmetric: bool, threads: int, /) -> tuple[int, int]: ...
def window(n: int, m: int, d: int, item_bytes: int, threads: int, /) -> int: ...
def tournament(blocks: int, /) -> list[list[tuple[int, int]]]: ...
def supported_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def gemm() -> str: ...
def set_gemm(name: str, /) -> None: ...
def set_blas(sgemm: int, dgemm: int, set_threads: int, /) -> None: ...
def openmp() -> bool: ...
