"""pq_topk in CUDA C++, run in the emulation: every way to cut the work, against the definition and against C++."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastret.backends import choices, registry
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.backends.registry import Call
from fastret.ops import pq_topk

F64 = torch.float64


def random(queries: int, books: int, words: int, width: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, codebook, and codes of which none stands twice where there are enough."""
    codes = torch.randint(0, words, (count, books)).to(torch.uint8 if words <= 256 else torch.uint16)
    return torch.randn(queries, books * width), torch.randn(books, words, width), codes


def integers(queries: int, books: int, words: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squares, products and their sums are exact, and most of them tie."""
    query, codebook, codes = random(queries, books, words, 2, count)
    return query.round(), codebook.round(), codes


def compare(query: Tensor, codebook: Tensor, codes: Tensor, **options: object) -> None:
    """With the definition in float64, and with C++, which adds in the same order, bit for bit."""
    scores, indices = pq_topk(query, codebook, codes, **options, impl="cuda")  # type: ignore[arg-type]
    exact = query.double(), codebook.double()
    expected, truth = pq_topk(*exact, codes, **options, impl="reference")  # type: ignore[arg-type]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, truth)


PLANS = [  # queries, books, words, codes, k; queries of a block, parts, tables in global memory; the same of float16
    ((1, 1, 16, 70, 1), (1, 1, 0), (1, 1, 0)),
    ((1, 16, 16, 2500, 3), (1, 2, 0), (1, 2, 0)),
    ((2, 8, 16, 4200, 20), (4, 4, 0), (8, 4, 0)),
    ((3, 17, 1000, 40, 60), (1, 1, 0), (1, 1, 0)),
    ((7, 4, 256, 300, 9), (4, 1, 0), (8, 1, 0)),
    ((9, 3, 300, 530, 70), (12, 1, 0), (16, 1, 0)),
    ((17, 8, 16, 600, 5), (12, 1, 0), (16, 1, 0)),
    ((2, 2, 60000, 90, 4), (1, 1, 2), (1, 1, 2)),
]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("size", "plan", "plan_of_half"), PLANS, ids=lambda v: "-".join(map(str, v)))
def test_small_integers_are_ranked_as_in_the_definition(
    emulation: ModuleType, size: tuple[int, ...], plan: tuple[int, ...], plan_of_half: tuple[int, ...], half: bool
) -> None:
    """Exact scores: order and ties are the definition's, whoever owns which queries and codes."""
    queries, books, words, count, k = size
    assert emulation.pq_topk_plan(queries, count, books, words, k, half) == (plan_of_half if half else plan)
    given = integers(queries, books, words, count)
    options = {"k": k, "first_index": 2**40, "table_dtype": torch.float16 if half else torch.float32}
    for metric in ("l2", "dot"):
        found = pq_topk(*given, **options, metric=metric, impl="cuda")  # type: ignore[arg-type]
        expected = pq_topk(*given, **options, metric=metric, impl="reference")  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
@pytest.mark.parametrize(("queries", "books", "words"), [(1, 16, 30), (6, 8, 300), (17, 16, 20), (2, 5, 9)])
@pytest.mark.usefixtures("emulation")
def test_tables_of_float16_are_those_of_the_definition(queries: int, books: int, words: int, metric: str) -> None:
    """Rounded entries of eighths, and the bits of their sums in C++; scaled queries, whose scores scale alike."""
    query, codebook, codes = random(queries, books, words, 2, 90)
    query, codebook = (query * 4096).round() / 512, (codebook * 4096).round() / 512
    for size in (1.0, 2.0**50, 2.0**-60):
        given = query * size, codebook * size, codes
        options = {"k": 90, "metric": metric, "table_dtype": torch.float16}
        found = pq_topk(*given, **options, impl="cuda")  # type: ignore[arg-type]
        expected = pq_topk(*given, **options, impl="cpu")  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not torch.equal(found[0], pq_topk(*given, k=90, metric=metric, impl="cuda")[0])
    query = query[: queries - 1] if queries > 2 else query
    zero = pq_topk(query * 0, codebook * 0, codes, k=3, metric=metric, table_dtype=torch.float16, impl="cuda")
    assert zero[1].tolist() == [[0, 1, 2]] * len(query)
    assert not zero[0].any()


@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
@pytest.mark.parametrize(
    ("books", "dtype"),
    [(1, torch.uint8), (8, torch.uint8), (13, torch.uint8), (16, torch.uint8), (8, torch.uint16), (48, torch.int64)],
)
@pytest.mark.usefixtures("emulation")
def test_is_the_definition(books: int, dtype: torch.dtype, metric: str) -> None:
    """Every width of a load: codes of 16 bytes, of 8, and one at a time."""
    query, codebook, _ = random(2, books, 50, 2, 0)
    codes = torch.randint(0, 50, (290, books)).unique(dim=0)
    compare(query, codebook, codes.to(dtype), k=290, metric=metric, first_index=3)


@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
@pytest.mark.parametrize("queries", [1, 6, 12])
@pytest.mark.usefixtures("emulation")
def test_sums_have_the_bits_of_cpp(queries: int, metric: str) -> None:
    """Tables of eighths are exact but for roots; parts are added in the same order."""
    query, codebook, codes = random(queries, 24, 30, 2, 100)
    query, codebook = (query * 8).round() / 8, (codebook * 8).round() / 8
    found, expected = (pq_topk(query, codebook, codes, k=100, metric=metric, impl=i) for i in ("cuda", "cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("emulation")
def test_a_query_has_the_same_bits_in_any_company_and_copies_tie() -> None:
    query, codebook, distinct = random(13, 8, 16, 3, 41)
    codes = distinct.repeat(30, 1)
    scores, indices = pq_topk(query, codebook, codes, k=60, impl="cuda")
    _, order = pq_topk(query, codebook, distinct, k=2, impl="cuda")
    assert torch.equal(indices, (order[:, :, None] + 41 * torch.arange(30)).flatten(1))
    for rows in (slice(3, 4), slice(5, 9)):
        few = pq_topk(query[rows], codebook, codes, k=60, impl="cuda")
        torch.testing.assert_close(few, (scores[rows], indices[rows]), rtol=0, atol=0)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "random"])
@pytest.mark.parametrize("k", [1, 64, 700])
@pytest.mark.usefixtures("emulation")
def test_selection_of_any_order(order: str, k: int) -> None:
    """Candidates that all replace others, none, and runs of equals; queues that overflow in every turn."""
    steps = torch.arange(900)
    values = {
        "ascending": steps,
        "descending": 899 - steps,
        "equal": steps * 0,
        "random": torch.randint(0, 100, (900,)),
    }
    codes = values[order][:, None].to(torch.uint16)
    codebook = torch.arange(900.0).view(1, -1, 1)
    scores, indices = pq_topk(torch.ones(1, 1), codebook, codes, k=k, metric="dot", impl="cuda")
    expected = values[order].sort(descending=True, stable=True)
    assert torch.equal(scores[0], expected.values[:k].float())
    assert torch.equal(indices[0], expected.indices[:k])


@pytest.mark.usefixtures("emulation")
def test_equals_that_come_late() -> None:
    """Warps run ahead of others: of equal scores, lower columns are met after higher ones have raised the bound."""
    values = (torch.rand(3000) < 0.1).int()
    codes, codebook = values[:, None].to(torch.uint8), torch.arange(2.0).view(1, -1, 1)
    _, indices = pq_topk(torch.ones(1, 1), codebook, codes, k=60, metric="dot", impl="cuda")
    assert torch.equal(indices[0], values.nonzero().flatten()[:60])


@pytest.mark.usefixtures("emulation")
def test_the_most_and_fewer_than_k() -> None:
    given = integers(1, 4, 16, 2300)
    for count, metric in ((2300, "l2"), (30, "dot")):
        query, codebook, codes = *given[:2], given[2][:count]
        found = pq_topk(query, codebook, codes, k=2048, metric=metric, impl="cuda")
        expected = pq_topk(query, codebook, codes, k=2048, metric=metric, impl="reference")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("emulation")
def test_nothing() -> None:
    query, codebook, codes = random(5, 3, 4, 2, 6)
    for q, c in ((query[:0], codes), (query, codes[:0])):
        scores, indices = pq_topk(q, codebook, c, k=3, impl="cuda")
        assert scores.shape == indices.shape == (len(q), 3)
        assert (scores == math.inf).all()
        assert (indices == -1).all()


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("queries", [1, 10])
@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
@pytest.mark.usefixtures("emulation")
def test_nan_scores_are_no_candidates_and_spoil_no_other(queries: int, metric: str, table_dtype: torch.dtype) -> None:
    """Of a word, whose codes stand among those of others in a lane's stream; of a query."""
    query, codebook, codes = random(queries, 8, 8, 2, 400)
    codebook[1, 5, 0] = math.nan
    codebook[2, 4, 0] = math.inf
    if queries > 3:
        query[3, 5] = math.nan
    options = {"k": 400, "metric": metric, "table_dtype": table_dtype}
    found = pq_topk(query, codebook, codes, **options, impl="cuda")  # type: ignore[arg-type]
    expected = pq_topk(query, codebook, codes, **options, impl="cpu")  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    assert ((found[1] < 0).sum(1) > 30).all()


@pytest.mark.usefixtures("emulation")
def test_infinite_scores() -> None:
    """Of the good sign they are scores, of the other no candidates."""
    codebook = torch.tensor([[[3e38], [1.0], [-3e38]]])
    codes = torch.tensor([[1], [0], [2], [0]], dtype=torch.uint8)
    scores, indices = pq_topk(torch.tensor([[10.0]]), codebook, codes, k=4, metric="dot", impl="cuda")
    assert indices.tolist() == [[1, 3, 0, -1]]
    assert scores.tolist() == [[math.inf, math.inf, 10, -math.inf]]
    scores, indices = pq_topk(torch.tensor([[10.0]]), codebook, codes, k=4, impl="cuda")
    assert indices.tolist() == [[0, -1, -1, -1]]
    assert scores.tolist() == [[81, math.inf, math.inf, math.inf]]


@pytest.mark.usefixtures("emulation")
def test_strides_and_addresses() -> None:
    """Rows apart, and codes that 16 bytes at a time would misread."""
    query, codebook, codes = random(3, 16, 9, 2, 100)
    expected = pq_topk(query, codebook, codes, k=6, impl="cuda")
    spaced, wide = torch.zeros(6, 40), torch.zeros(100, 48, dtype=torch.uint8)
    spaced[::2, 3:35] = query
    for first in (0, 3, 8):  # 16 bytes, 1, 8
        wide[:, first : first + 16] = codes
        found = pq_topk(spaced[::2, 3:35], codebook, wide[:, first : first + 16], k=6, impl="cuda")
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("queries", [1, 12])
def test_results_do_not_depend_on_the_order_of_threads(emulation: ModuleType, queries: int) -> None:
    given = random(queries, 8, 16, 2, 2500)
    results = []
    for order in (0, 1, 9):
        emulation.set_order(order)
        results.append(pq_topk(*given, k=30, impl="cuda"))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.usefixtures("emulation")
def test_what_it_does_not_serve() -> None:
    query, codebook, codes = random(2, 3, 4, 2, 9)
    with pytest.raises(NotImplementedError, match="finds at most 2,048"):
        pq_topk(query, codebook, codes, k=2049, impl="cuda")
    for wide in ((query.double(), codebook), (query, codebook.double())):
        with pytest.raises(ValueError, match="takes no float64"):
            pq_topk(*wide, codes, k=1, impl="cuda")
    assert pq_topk(query, codebook, codes, k=2049)[0].shape == (2, 2049)


def test_auto_takes_it_on_cuda_where_it_is_measured(emulation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str, dtype: torch.dtype = torch.float32, options: tuple[str, ...] = ()) -> str:
        return registry.resolve("pq_topk", device, dtype, None, options)

    assert chosen("cuda") == "tiled"  # what is in its place here serves the CPU
    monkeypatch.setattr(emulation, "device_type", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("cuda") == "tiled"  # nothing is measured
    monkeypatch.setattr(choices, "measured_here", lambda op, index=None: ("cuda",))
    assert chosen("cuda") == "cuda"
    assert chosen("cpu") == "cpu"
    assert chosen("cuda", F64) == chosen("cuda", options=("long",)) == "tiled"
    assert registry.IMPLEMENTATIONS["cuda"] not in registry.candidates(Call("pq_topk", "cpu", torch.float32))


@pytest.mark.parametrize("words", [1, 16, 256, 1000, 65536])
@pytest.mark.parametrize("books", [1, 8, 17, 64])
@pytest.mark.parametrize("k", [1, 100, 2048])
@pytest.mark.parametrize("half", [False, True])
def test_plan(emulation: ModuleType, words: int, books: int, k: int, half: bool) -> None:
    size = 2 if half else 4
    for queries in (0, 1, 5, 9, 10_000):
        for count in (0, 1, 5000, 10**6, 10**9):
            block, parts, table_rows = emulation.pq_topk_plan(queries, count, books, words, k, half)
            assert block in ((1, 8, 16) if half else (1, 4, 12))
            assert 1 <= parts <= 4
            assert parts == 1 or (count // parts >= max(16 * k, 4 * words) and -(-queries // block) * parts <= 4)
            assert block * books * words * size <= 227 << 10 or table_rows > 0
            assert table_rows % parts == 0
            assert table_rows * books * words * size <= max(64 << 20, books * words * size)


def changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "position", "value", "message"),
    [
        ("query", 4, 1, "query: unexpected dtype code 1"),
        ("query", 2, 7, "query: expected shape"),
        ("query", 5, 8, "query: reaches beyond its storage"),
        ("codebook", 4, 1, "codebook: unexpected dtype code 1"),
        ("codebook", 1, 47, "codebook: expected shape"),
        ("codebook", 2, 0, "codebook: expected at least one column"),
        ("codes", 4, 4, "codes: expected 8 or 16 bits each"),
        ("codes", 4, 6, "codes: reaches beyond its storage"),
        ("codes", 2, 0, "codes: expected at least one book"),
        ("codes", 2, 3, "codebook: expected shape"),
        ("scores", 2, 4, "scores: expected shape"),
        ("indices", 4, 0, "indices: unexpected dtype code 0"),
        ("indices", 0, 0, "indices: null pointer"),
    ],
)
def test_sizes_are_checked_before_memory_is_touched(
    emulation: ModuleType, what: str, position: int, value: int, message: str
) -> None:
    tensors = {
        "query": torch.ones(40, 8),
        "codebook": torch.ones(4 * 12, 2),
        "codes": torch.ones(50, 4).byte(),
        "scores": torch.ones(40, 3),
        "indices": torch.ones(40, 3).long(),
    }
    a = {name: array(t) for name, t in tensors.items()}

    def run(a: dict[str, ArrayTuple], words: int = 12, k: int = 3, metric: int = 0) -> None:
        out = (None, None, a["scores"], a["indices"])
        emulation.pq_topk(a["query"], a["codebook"], a["codes"], words, k, metric, 0, False, *out, 0)

    with pytest.raises(ValueError, match=message):
        run({**a, what: changed(a[what], position, value)})
    for options, match in (
        ({"words": 257}, "words: expected 1 to 256"),
        ({"words": 11}, "codebook: expected"),
        ({"k": 0}, "k: expected 1 to 2048"),
        ({"k": 2049}, "k: expected 1 to 2048"),
        ({"metric": 3}, "metric: unknown kind"),
    ):
        with pytest.raises(ValueError, match=match):
            run(a, **options)


def test_what_lies_between_two_launches_is_checked(emulation: ModuleType) -> None:
    """Lists of parts, and tables in global memory."""
    scores, indices = torch.ones(1, 3), torch.ones(1, 3).long()
    for books, words, count, half, name in (
        (1, 4, 5000, False, "lists"),
        (2, 40000, 10, False, "tables"),
        (2, 65536, 10, True, "tables"),
    ):
        codes = torch.zeros(count, books, dtype=torch.uint16)
        given = torch.zeros(1, books), torch.zeros(books * words, 1), codes
        with pytest.raises(ValueError, match=f"{name}: "):
            emulation.pq_topk(*map(array, given), words, 3, 0, 0, half, None, None, array(scores), array(indices), 0)
