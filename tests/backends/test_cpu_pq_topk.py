"""pq_topk in C++: every instruction set, type, group of queries and number of threads; its plan; what it refuses."""

from collections.abc import Iterator

import pytest
import torch

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.ops import pq_topk

assert cpu.missing() is None
F64 = torch.float64


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
@pytest.mark.parametrize(("books", "words"), [(1, 1), (10, 256), (65, 256), (65, 300), (2, 5000)])
def test_every_instruction_set(isa: str, dtype: torch.dtype, metric: str, books: int, words: int) -> None:
    """Tables that fit L2, and those that are looked up in slices of books."""
    _C.set_isa(isa)
    codebook = torch.randn(books, words, 3).to(dtype)
    codes = torch.randint(0, words, (2500, books)).to(torch.uint8 if words <= 256 else torch.uint16)
    for queries in (1, 3, 5, 31):  # groups of every width
        query = torch.randn(queries, books * 3).to(dtype)
        truth, _ = pq_topk(query.to(F64), codebook.to(F64), codes, k=2500, metric=metric, impl="reference")
        for k in (1, 60, 2500):
            scores, indices = pq_topk(query, codebook, codes, k=k, metric=metric, impl="cpu")
            tolerance = 1e-12 if dtype == F64 else 1e-5
            torch.testing.assert_close(scores.to(F64), truth[:, :k], rtol=tolerance, atol=tolerance * books)
            assert (indices.sort(1).values.diff(dim=1) > 0).all()  # each once
            assert (indices >= 0).all()


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_width_of_the_group_and_slices_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    _C.set_isa(isa)
    torch.set_num_threads(1)
    query, codebook = torch.randn(33, 130, dtype=dtype), torch.randn(65, 300, 2, dtype=dtype)
    codes = torch.randint(0, 300, (2100, 65)).to(torch.uint16)
    scores, indices = pq_topk(query, codebook, codes, k=2100)
    for one in (0, 17, 32):
        alone = pq_topk(query[one : one + 1], codebook, codes, k=2100)
        torch.testing.assert_close(alone, (scores[one : one + 1], indices[one : one + 1]), rtol=0, atol=0)
    sums = torch.zeros(33, 2100, dtype=dtype)
    for book in range(65):  # a book alone has its entry of the table
        part, place = pq_topk(query[:, 2 * book : 2 * book + 2], codebook[book : book + 1], codes[:, [book]], k=2100)
        sums += torch.empty_like(part).scatter_(1, place, part)
    assert torch.equal(sums.gather(1, indices), scores)


@pytest.mark.parametrize("k", [1, 10, 700, 30000])
@pytest.mark.parametrize("queries", [1, 5, 16, 40, 130])
def test_threads_change_nothing(queries: int, k: int) -> None:
    """Few queries: threads own parts of the codes, whose results are merged."""
    query, codebook = torch.randn(queries, 8), torch.randn(4, 16, 2)
    codes = torch.randint(0, 16, (25000, 4), dtype=torch.uint8)
    codes[15000:17000] = codes[:2000]
    torch.set_num_threads(1)
    expected = pq_topk(query, codebook, codes, k=k)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        torch.testing.assert_close(pq_topk(query, codebook, codes, k=k), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("order", ["ascending", "descending", "organ pipe", "equal", "random"])
@pytest.mark.parametrize("k", [1, 2, 24, 300, 2499, 4999, 5000])
def test_selection_of_any_order(order: str, k: int, dtype: torch.dtype) -> None:
    """Candidates that all replace others, none, and runs of equals."""
    steps = torch.arange(5000)
    values = {
        "ascending": steps,
        "descending": 4999 - steps,
        "organ pipe": (steps - 2500).abs(),
        "equal": steps * 0,
        "random": torch.randint(0, 100, (5000,)),
    }[order]
    codebook = torch.arange(5000, dtype=dtype).view(1, -1, 1)
    query = torch.tensor([[1.0], [-1.0]], dtype=dtype)
    scores, indices = pq_topk(query, codebook, values[:, None], k=k, metric="dot")
    for row, sign in enumerate((1, -1)):
        expected = (sign * values).sort(descending=True, stable=True)
        assert torch.equal(scores[row], expected.values[:k].to(dtype))
        assert torch.equal(indices[row], expected.indices[:k])


@pytest.mark.parametrize("groups", [0, 1, 2, 7, 63, 10**6])
@pytest.mark.parametrize("n", [0, 1, 2047, 5000, 400_000, 10**9])
@pytest.mark.parametrize("words", [1, 256, 65536])
@pytest.mark.parametrize("k", [1, 200, 10**6])
@pytest.mark.parametrize("threads", [1, 2, 96])
def test_plan(groups: int, n: int, words: int, k: int, threads: int) -> None:
    k = min(k, n)
    parts, part_rows, capacity = _C.pq_topk_plan(groups, n, words, k, threads)
    assert parts * part_rows >= n
    assert (parts - 1) * part_rows < max(n, 1)
    assert 1 <= parts <= threads
    assert capacity > k
    assert capacity <= 2 * k + 65
    if parts > 1:
        assert part_rows >= 4 * words
        assert groups < 2 * threads
        assert groups * parts < 4 * threads  # merged lists stay few


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "position", "value", "message"),
    [
        ("query", 4, 2, "query: expected float32 or float64"),
        ("query", 4, 5, "query: expected float32 or float64"),
        ("query", 2, 7, "query: expected shape"),
        ("query", 5, 8, "query: reaches beyond its storage"),
        ("codebook", 4, 1, "codebook: unexpected dtype code 1"),
        ("codebook", 1, 47, "codebook: expected shape"),
        ("codebook", 2, 0, "codebook: expected at least one column"),
        ("codebook", 5, 100, "codebook: reaches beyond its storage"),
        ("codes", 4, 0, "codes: expected 8 or 16 bits each"),
        ("codes", 4, 4, "codes: expected 8 or 16 bits each"),
        ("codes", 4, 6, "codes: reaches beyond its storage"),
        ("codes", 2, 0, "codes: expected at least one book"),
        ("codes", 2, 3, "codebook: expected shape"),
        ("codes", 1, 51, "codes: reaches beyond its storage"),
        ("codes", 4, 7, "dtype: unknown code 7"),
        ("scores", 2, 4, "scores: expected shape"),
        ("scores", 4, 1, "scores: unexpected dtype code 1"),
        ("indices", 4, 0, "indices: unexpected dtype code 0"),
        ("indices", 0, 0, "indices: null pointer"),
    ],
)
def test_nothing_is_touched_through_a_wrong_description(what: str, position: int, value: int, message: str) -> None:
    tensors = {
        "query": torch.ones(40, 8),
        "codebook": torch.ones(4 * 12, 2),
        "codes": torch.ones(50, 4).byte(),
        "scores": torch.ones(40, 3),
        "indices": torch.ones(40, 3).long(),
    }
    a = {name: array(t) for name, t in tensors.items()}

    def run(a: dict[str, ArrayTuple], words: int = 12, k: int = 3, metric: int = 0, threads: int = 1) -> None:
        _C.pq_topk(
            a["query"], a["codebook"], a["codes"], words, k, metric, 0, False, threads, a["scores"], a["indices"]
        )

    run(a)
    with pytest.raises(ValueError, match=message):
        run({**a, what: _changed(a[what], position, value)})
    for words, match in (
        (0, "words: expected 1 to 256"),
        (257, "words: expected 1 to 256"),
        (11, "codebook: expected"),
    ):
        with pytest.raises(ValueError, match=match):
            run(a, words=words)
    with pytest.raises(ValueError, match="k: must be at least 1"):
        run(a, k=0)
    with pytest.raises(ValueError, match="metric: unknown kind"):
        run(a, metric=3)
    with pytest.raises(ValueError, match="threads: must be at least 1"):
        run(a, threads=0)
