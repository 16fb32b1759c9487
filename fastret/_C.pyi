from fastret.backends.cpu.array import ArrayTuple

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
def plan(n: int, m: int, symmetric: bool, threads: int, /) -> tuple[int, int]: ...
def tournament(blocks: int, /) -> list[list[tuple[int, int]]]: ...
def supported_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def gemm() -> str: ...
def set_gemm(name: str, /) -> None: ...
def set_blas(sgemm: int, dgemm: int, set_threads: int, /) -> None: ...
def openmp() -> bool: ...
