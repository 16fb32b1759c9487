"""soft_assign in C++: every instruction set, type and number of threads, sizes at the edges of tiles; its plan; what it
refuses to touch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.ops import SoftAssign, soft_assign

assert cpu.missing() is None
F64 = torch.float64
EVERYTHING: dict[str, Any] = {"hard": "straight-through", "usage": True, "purity": True}
SOURCES = ("distances", "keys", "logits")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


def case(source: str, n: int, books: int, words: int, features: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of soft_assign whose scores spread by a few units, whatever the sizes."""

    def part(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64)

    arguments: dict[str, Any] = {"codebook": part(books, words, width)}
    if source == "distances":
        arguments |= {"x": part(n, books * width), "tau": 1 / math.sqrt(width)}
    elif source == "keys":
        scale = features**-0.25
        arguments |= {"x": scale * part(n, books * features), "keys": scale * part(books, words, features)}
        arguments["bias"] = part(books, words)
    else:
        arguments |= {"x": None, "logits": part(n, books * words)}
    return cast(arguments, dtype)


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Leaves of this type."""
    return {
        k: v.detach().to(dtype, copy=True).requires_grad_() if isinstance(v, Tensor) else v
        for k, v in arguments.items()
    }


def everything(
    arguments: dict[str, Any], impl: str, weights: list[Tensor], wanted: dict[str, Any] = EVERYTHING
) -> tuple[SoftAssign, tuple[Tensor, ...]]:
    """What soft_assign returns, and the gradients of the sum of its products with ``weights``."""
    result = soft_assign(**arguments, **wanted, impl=impl)
    values = zip(result[1:], weights, strict=True)
    total = sum((value.double() * weight).sum() for value, weight in values if value is not None)
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    return result, torch.autograd.grad(total, leaves)


def upstream(n: int, books: int, words: int, width: int) -> list[Tensor]:
    shapes = ((n, books * width), (n, books * width), (books, words), (n, books))
    return [torch.randn(s, dtype=F64) for s in shapes]


def assert_right(draw: Callable[[], dict[str, Any]], dtype: torch.dtype, weights: list[Tensor]) -> None:
    """In float64 as the definition; else no further from that than twice the definition computed in this type, in the
    mean over three draws: distances are products here and differences there, which lose digits of other rows."""
    if dtype == F64:
        given = cast(draw(), dtype)
        result, gradients = everything(given, "cpu", weights)
        expected, exact = everything(given, "reference", weights)
        torch.testing.assert_close((*result, *gradients), (*expected, *exact), rtol=1e-10, atol=1e-10)
        return
    found = torch.tensor([errors(cast(draw(), dtype), dtype, weights) for _ in range(3)])
    for size, theirs, ours in found.mean(0).tolist():
        assert ours <= 2 * theirs + 16 * torch.finfo(dtype).eps * size


def errors(given: dict[str, Any], dtype: torch.dtype, weights: list[Tensor]) -> list[tuple[float, float, float]]:
    """Of each result and gradient the largest element, and the largest errors of the definition and of C++."""
    smooth = {"usage": True, "purity": True}  # of two words that are as good, hard may be either
    exact, naive, mine = (
        everything(cast(given, d), impl, weights, smooth)
        for d, impl in ((F64, "reference"), (dtype, "reference"), (dtype, "cpu"))
    )
    right, theirs_right = ((r.codes == exact[0].codes).double().mean() for r, _ in (mine, naive))
    assert right >= theirs_right - 0.02
    return [
        tuple(float(t.detach().abs().max()) for t in (truth, other.double() - truth, own.double() - truth))
        for truth, other, own in zip(*((r[1], *r[3:], *g) for r, g in (exact, naive, mine)), strict=True)
    ]


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", SOURCES)
def test_every_instruction_set_and_type(isa: str, dtype: torch.dtype, source: str) -> None:
    _C.set_isa(isa)
    torch.set_num_threads(2)
    assert_right(lambda: case(source, 150, 3, 37, 11, 18, F64), dtype, upstream(150, 3, 37, 18))


# tiles of all words end at 1,024 (float32) and 512 (float64); blocks of rows at 64
@pytest.mark.parametrize(
    ("n", "books", "words", "features", "width"),
    [
        (1, 1, 1, 1, 1),
        (63, 2, 16, 16, 16),
        (64, 1, 17, 15, 17),
        (65, 2, 64, 33, 1),
        (129, 1, 256, 1, 33),
        (40, 2, 512, 4, 3),
        (70, 1, 513, 7, 16),
        (40, 1, 1024, 9, 5),
        (70, 2, 1025, 16, 4),
        (20, 1, 2500, 3, 31),
        (7, 3, 20, 300, 270),
    ],
)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("source", SOURCES)
def test_edges_of_tiles(
    n: int, books: int, words: int, features: int, width: int, dtype: torch.dtype, source: str
) -> None:
    torch.set_num_threads(2)
    assert_right(lambda: case(source, n, books, words, features, width, dtype), dtype, upstream(n, books, words, width))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("books", [1, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_threads_agree_and_runs_repeat(threads: int, books: int, source: str) -> None:
    arguments, weights = case(source, 600, books, 100, 8, 9, F64), upstream(600, books, 100, 9)
    torch.set_num_threads(1)
    expected = everything(arguments, "cpu", weights)
    torch.set_num_threads(threads)
    first = everything(arguments, "cpu", weights)
    for _ in range(3):
        result, gradients = everything(arguments, "cpu", weights)
        assert all(map(torch.equal, (*result, *gradients), (*first[0], *first[1])))
    for row_result in ("codes", "soft", "hard", "purity"):
        assert torch.equal(getattr(first[0], row_result), getattr(expected[0], row_result))
    torch.testing.assert_close(first[1], expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first[0].usage, expected[0].usage, rtol=1e-12, atol=0)


@pytest.mark.parametrize("source", ["keys", "logits"])
def test_sums_over_rows_by_words_where_ranges_would_take_too_much(source: str) -> None:
    """One large book and several threads: each has words, and walks all rows."""
    n, words, width = 140, 2000, 300
    sums = words * (width + (width + 1 if source != "logits" else 0))
    assert _C.assign_plan(n, 1, words, sums * 8, 8, 2)[3]
    arguments, weights = case(source, n, 1, words, width, width, F64), upstream(n, 1, words, width)
    expected, exact = everything(arguments, "reference", weights)
    torch.set_num_threads(2)
    result, gradients = everything(arguments, "cpu", weights)
    torch.testing.assert_close((*result, *gradients), (*expected, *exact), rtol=1e-10, atol=1e-10)
    codebook = arguments["codebook"]
    frozen = {k: v.detach() if isinstance(v, Tensor) and v is not codebook else v for k, v in arguments.items()}
    _, (alone,) = everything(frozen, "cpu", weights)  # the codebook's gradient comes first
    assert torch.equal(alone, gradients[0])


def test_the_largest_book_and_its_usage_by_words() -> None:
    n, words = 1088, 1 << 16
    assert _C.assign_plan(n, 1, words, words * 8, 8, 64)[3]
    x, codebook = torch.randn(n, 1, dtype=F64), torch.randn(1, words, 1, dtype=F64)
    torch.set_num_threads(64)
    result = soft_assign(x, codebook, 2.0, usage=True, purity=True, impl="cpu")
    torch.set_num_threads(2)
    expected = soft_assign(x, codebook, 2.0, usage=True, purity=True, impl="tiled")
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-9, atol=1e-12)
    assert result.usage is not None
    assert abs(float(result.usage.sum()) - 1) < 1e-12


@pytest.mark.parametrize("words", [5, 700, 1500])
def test_equal_words_anywhere_give_the_lowest(words: int) -> None:
    codebook = torch.randn(2, words, 16)
    last = codebook[:, -1:].clone()
    codebook[:, 2::3] = last
    codebook[:, -1:] = last
    x = torch.cat([last[0], last[1]], 1) + 0.01 * torch.randn(100, 32)
    assert (soft_assign(x, codebook, 1.0, soft=False, impl="cpu").codes == 2).all()
    assert (soft_assign(x, codebook, 1.0, impl="cpu").codes == 2).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_words_ruled_out_and_rows_spoilt(dtype: torch.dtype) -> None:
    """-inf scores of whole tiles first; a row without any word; +inf; NaN."""
    n, words, codebook = 70, 2100, torch.randn(1, 2100, 3, dtype=dtype)
    logits = torch.randn(n, words, dtype=dtype)
    logits[:50, :2000] = -torch.inf
    logits[51] = -torch.inf
    logits[52, 1700] = torch.nan
    logits[53, 5] = torch.inf
    result = soft_assign(None, codebook, logits=logits, usage=True, purity=True, impl="cpu")
    expected = soft_assign(None, codebook, logits=logits, usage=True, purity=True, impl="reference")
    assert result.soft is not None
    assert expected.soft is not None
    assert torch.equal(result.soft.isnan().any(1), expected.soft.isnan().any(1))
    assert result.soft[51:54].isnan().all()
    clean = [i for i in range(n) if i not in (51, 52, 53)]
    torch.testing.assert_close(result.soft[clean], expected.soft[clean])
    assert torch.equal(result.codes[clean], expected.codes[clean])
    assert ((result.codes >= 0) & (result.codes < words)).all()
    assert result.usage is not None
    assert result.usage.isnan().all()
    weights = torch.randn(len(clean), 3, dtype=dtype)
    leaf = logits[clean].clone().requires_grad_()
    mine, theirs = (
        torch.autograd.grad((soft_assign(None, codebook, logits=leaf, impl=i).soft * weights).sum(), leaf)[0]
        for i in ("cpu", "reference")
    )
    torch.testing.assert_close(mine, theirs)


def test_rows_that_lie_apart() -> None:
    """Views whose rows C++ reads where they are, and expanded or transposed ones, which it does not."""
    x, codebook = torch.randn(90, 64, dtype=F64), torch.randn(2, 9, 16, dtype=F64)
    for view in (x[::2, 8:40], x.T[:32].T, x[:1, :32].expand(70, 32)):
        leaf, plain = (view.detach().clone().requires_grad_() for _ in range(2))
        strided = torch.empty(len(view), 50, dtype=F64)[:, :32].copy_(view).requires_grad_()
        for given in (leaf, strided, plain):
            result = soft_assign(given, codebook.mT.contiguous().mT, 1.0, impl="cpu").soft
            result.sum().backward()  # an expanded gradient
        assert torch.equal(leaf.grad, plain.grad)
        assert torch.equal(strided.grad, plain.grad)
        assert torch.equal(soft_assign(view, codebook, 1.0, impl="cpu").soft, soft_assign(leaf, codebook, 1.0).soft)


@pytest.mark.parametrize("n", [0, 1, 64, 65, 4096, 10**6])
@pytest.mark.parametrize("books", [1, 3, 8])
@pytest.mark.parametrize("words", [1, 256, 1024, 1025, 1 << 16])
@pytest.mark.parametrize("width", [0, 1, 33, 1025])
@pytest.mark.parametrize("threads", [1, 2, 7, 96])
def test_plan(n: int, books: int, words: int, width: int, threads: int) -> None:
    sum_bytes = books * words * width * 4
    tile, ranges, range_rows, by_words, sum_words = _C.assign_plan(n, books, words, sum_bytes, 4, threads)
    assert 1 <= tile <= words
    assert tile * 64 * 4 <= 256 << 10
    assert tile == words or tile * 64 * 4 <= 128 << 10
    assert 1 <= ranges <= threads
    assert range_rows % 64 == 0
    assert range_rows * ranges >= n
    assert n == 0 or range_rows * (ranges - 1) < n
    assert 1 <= sum_words <= tile
    if not by_words:
        assert (ranges - 1) * sum_bytes <= 4 << 20
    else:
        assert sum_words <= math.ceil(words * books / threads)
    if threads == 1:
        assert (ranges, by_words) == (1, False)
    if n >= 64 * 96 and (width == 0 or by_words):  # few threads wait for the last task
        assert math.ceil(books * ranges / threads) * threads <= 1.3 * books * ranges


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


TENSORS = {
    "x": torch.ones(40, 6),
    "keys": torch.ones(10, 3),
    "bias": torch.ones(2, 5),
    "logits": torch.ones(40, 10),
    "codebook": torch.ones(10, 4),
    "codes": torch.zeros(40, 2).long(),
    "lse": torch.full((40, 2), 9.0),
    "soft": torch.ones(40, 8),
    "hard": torch.ones(40, 8),
    "usage": torch.ones(2, 5),
    "purity": torch.ones(40, 2),
    "dx": torch.ones(40, 6),
    "dkeys": torch.ones(10, 3),
    "dbias": torch.ones(2, 5),
    "dcodebook": torch.ones(10, 4),
}


def run(a: dict[str, Any], *, forward: bool, logits: bool = False, books: int = 2, threads: int = 1) -> None:
    scores = (None, None, None, a["logits"]) if logits else (a["x"], a["keys"], a["bias"], a["logits"])
    problem: _C.AssignTuple = (*scores, a["codebook"], books)
    if forward:
        _C.soft_assign_forward(problem, threads, a["codes"], a["lse"], a["soft"], a["usage"], a["purity"])
        return
    grads = (a["soft"], a["hard"], a["usage"], a["purity"])
    rows = (a["logits"], None, None) if logits else (a["dx"], a["dkeys"], a["dbias"])
    _C.soft_assign_backward(problem, threads, grads, a["lse"], a["codes"], True, (*rows, a["dcodebook"]))


@pytest.mark.parametrize(
    ("what", "position", "value", "message", "passes"),
    [
        ("x", 4, 4, "x: not a floating point type", "fb"),
        ("x", 2, 5, "x: expected shape", "fb"),
        ("x", 5, 8, "x: reaches beyond its storage", "fb"),
        ("keys", 1, 9, "keys: expected shape", "fb"),
        ("keys", 4, 1, "keys: unexpected dtype code 1", "fb"),
        ("keys", 3, 4, "keys: expected rows one after another|beyond", "fb"),
        ("bias", 2, 4, "bias: expected shape", "fb"),
        ("logits", 2, 9, "logits: expected shape", "l"),
        ("logits", 4, 4, "logits: not a floating point type", "l"),
        ("codebook", 1, 9, "codebook: expected words, as many in each book", "fbl"),
        ("codebook", 4, 1, "codebook: unexpected dtype code 1", "fbl"),
        ("codebook", 5, 8, "codebook: reaches beyond its storage", "fbl"),
        ("codes", 4, 0, "codes: unexpected dtype code 0", "fb"),
        ("codes", 0, 0, "codes: null pointer", "fb"),
        ("lse", 2, 3, "lse: expected shape", "fb"),
        ("lse", 0, 0, "lse: needed|gradients: those of the scores", "fb"),
        ("soft", 2, 7, "soft: expected shape", "fb"),
        ("soft", 4, 1, "soft: unexpected dtype code 1", "fb"),
        ("hard", 1, 41, "grad_hard: expected shape", "b"),
        ("usage", 1, 3, "usage: expected shape", "fb"),
        ("purity", 5, 8, "purity: reaches beyond its storage", "fb"),
        ("dx", 4, 2, "gradient of the rows: unexpected dtype code 2", "b"),
        ("dx", 0, 0, "gradients: those of the scores are computed together", "b"),
        ("dkeys", 1, 11, "dkeys: expected shape", "b"),
        ("dkeys", 0, 0, "gradients: those of the scores are computed together", "b"),
        ("dbias", 2, 6, "dbias: expected shape", "b"),
        ("dcodebook", 5, 100, "dcodebook: reaches beyond its storage", "b"),
    ],
)
def test_nothing_is_touched_through_a_wrong_description(
    what: str, position: int, value: int, message: str, passes: str
) -> None:
    right = {name: array(t) for name, t in TENSORS.items()}
    wrong = {**right, what: _changed(right[what], position, value)}
    for how in passes:
        run(right, forward=how != "b", logits=how == "l")
        with pytest.raises(ValueError, match=message):
            run(wrong, forward=how != "b", logits=how == "l")


def test_numbers_and_what_goes_together() -> None:
    right = {name: array(t) for name, t in TENSORS.items()}
    for forward in (True, False):
        with pytest.raises(ValueError, match="threads: must be at least 1"):
            run(right, forward=forward, threads=0)
        for books in (0, 3):
            with pytest.raises(ValueError, match="codebook: expected words, as many in each book"):
                run(right, forward=forward, books=books)
        with pytest.raises(ValueError, match="bias: needs keys"):
            run({**right, "keys": None}, forward=forward)
    many = torch.empty(1, 1).expand(1, 1)
    wide = (many.data_ptr(), 1 << 17, 1, 1, 0, 4 << 17)
    with pytest.raises(ValueError, match="codebook: expected at most 65,536 words"):
        run({**right, "codebook": wide}, forward=True, books=1)


def test_codes_out_of_range_choose_no_word() -> None:
    """Codes come back through autograd; a wrong one must not write anywhere."""
    tensors = {**TENSORS, "codes": torch.tensor([[0, 5]] * 20 + [[-1, 2**40]] * 20), "dcodebook": torch.empty(10, 4)}
    a: dict[str, Any] = {name: array(t) for name, t in tensors.items()}
    for name in ("soft", "usage", "purity"):
        a[name] = None
    problem: _C.AssignTuple = (a["x"], a["keys"], a["bias"], None, a["codebook"], 2)
    nothing = (None, a["hard"], None, None)
    _C.soft_assign_backward(problem, 1, nothing, None, a["codes"], False, (None, None, None, a["dcodebook"]))
    expected = torch.zeros(10, 4)
    expected[0] = 20
    assert torch.equal(tensors["dcodebook"], expected)
