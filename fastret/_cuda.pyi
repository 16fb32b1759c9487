from fastret.backends.cpu.array import ArrayTuple

# x, bank, first, index, seed, count
SampledTuple = tuple[ArrayTuple, ArrayTuple, ArrayTuple | None, ArrayTuple | None, ArrayTuple | None, int]

device_type: str

def device_error() -> str: ...
def sampled_dot_forward(problem: SampledTuple, scores: ArrayTuple, stream: int, /) -> None: ...
def sampled_dot_backward(problem: SampledTuple, grad: ArrayTuple, dx: ArrayTuple, stream: int, /) -> None: ...
def knn_vote(
    scores: ArrayTuple,
    indices: ArrayTuple,
    place: ArrayTuple,
    classes: int,
    scale: float,
    winners: ArrayTuple,
    shares: ArrayTuple,
    stream: int,
    /,
) -> None: ...
def pq_topk_plan(queries: int, codes: int, books: int, words: int, k: int, /) -> tuple[int, int, int]: ...
def pq_topk(
    query: ArrayTuple,
    codebook: ArrayTuple,
    codes: ArrayTuple,
    words: int,
    k: int,
    metric: int,
    first_index: int,
    lists: ArrayTuple | None,
    tables: ArrayTuple | None,
    scores: ArrayTuple,
    indices: ArrayTuple,
    stream: int,
    /,
) -> None: ...
