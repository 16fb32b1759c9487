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
