from fastret.backends.cpu.array import ArrayTuple

# x, bank, first, index, seed, count
SampledTuple = tuple[ArrayTuple, ArrayTuple, ArrayTuple | None, ArrayTuple | None, ArrayTuple | None, int]
Relation = tuple[ArrayTuple, ArrayTuple] | None
# same, different, distinct, offset, period, above, below
MaskTuple = tuple[Relation, Relation, Relation, int | None, int, ArrayTuple | None, ArrayTuple | None]
# rows, columns, k, mask, first column
SearchTuple = tuple[int, int, int, MaskTuple, int]
# products, row, column, first row, first column, score
StripTuple = tuple[ArrayTuple, ArrayTuple | None, ArrayTuple | None, int, int, int]

device_type: str
topk_most: int

def device_error() -> str: ...
def sampled_dot_forward(problem: SampledTuple, scores: ArrayTuple, stream: int, /) -> None: ...
def sampled_dot_backward(
    problem: SampledTuple, grad: ArrayTuple, partial: ArrayTuple | None, dx: ArrayTuple, stream: int, /
) -> None: ...
def sampled_dot_parts(problem: SampledTuple, /) -> int: ...
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
def topk_state(k: int, /) -> int: ...
def topk_select(
    search: SearchTuple, strip: StripTuple, parts: int, begins: bool, state: ArrayTuple, stream: int, /
) -> None: ...
def topk_finish(
    search: SearchTuple,
    distances: bool,
    parts: int,
    state: ArrayTuple,
    scores: ArrayTuple,
    indices: ArrayTuple,
    stream: int,
    /,
) -> None: ...
def pq_topk_plan(
    queries: int, codes: int, books: int, words: int, k: int, half_tables: bool, /
) -> tuple[int, int, int]: ...
def pq_topk(
    query: ArrayTuple,
    codebook: ArrayTuple,
    codes: ArrayTuple,
    words: int,
    k: int,
    metric: int,
    first_index: int,
    half_tables: bool,
    lists: ArrayTuple | None,
    tables: ArrayTuple | None,
    scores: ArrayTuple,
    indices: ArrayTuple,
    stream: int,
    /,
) -> None: ...
