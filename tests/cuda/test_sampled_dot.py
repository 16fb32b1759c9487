"""sampled_dot in CUDA C++, run in the emulation: types, widths of loads, pieces of columns; draws; bad arguments."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastret.backends.cpu.array import array
from fastret.ops import sampled_dot

F64 = torch.float64
ROWS = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("emulation")


def compare(x: Tensor, bank: Tensor, need_bank: bool = False, **given: object) -> None:
    """Scores and gradients against the definition in float64, of the same rows."""
    mine, truth = (
        [t.to(kind or t.dtype, copy=True).requires_grad_(g) for t, g in ((x, True), (bank, need_bank))]
        for kind in (None, F64)
    )
    scores = sampled_dot(*mine, **given, impl="cuda")
    expected = sampled_dot(*truth, **given, impl="reference")
    assert scores.dtype == torch.float32
    size = (x.abs().amax() * bank.abs().amax()).item() * x.shape[1] ** 0.5
    torch.testing.assert_close(scores.to(F64), expected, rtol=1e-5, atol=1e-6 * size)
    weight = torch.randn_like(expected)
    scores.backward(weight.float())
    expected.backward(weight.float().double())
    for a, b in zip(mine, truth, strict=True):
        if a.requires_grad:
            eps = 1e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.grad.to(F64), b.grad, rtol=eps, atol=1e-6 * size * scores.shape[1] ** 0.5)


@pytest.mark.parametrize("bank_dtype", ROWS)
@pytest.mark.parametrize("drawn", [True, False])
def test_types_and_widths(bank_dtype: torch.dtype, drawn: bool) -> None:
    """Rows of one load, of several a lane, of more than a slab of backward; with 16-byte loads and without."""
    for dtype, width in ((torch.float32, 16), (torch.bfloat16, 264), (torch.float16, 37), (bank_dtype, 1)):
        x, bank = torch.randn(2, width).to(dtype), torch.randn(61, width).to(bank_dtype)
        given = {"count": 9, "seed": 2**63 - 5} if drawn else {"index": torch.randint(0, 61, (2, 9))}
        compare(x, bank, first=torch.tensor([60, 0]), **given)


@pytest.mark.parametrize("first", [True, False])
def test_pieces_of_columns(first: bool) -> None:
    x, bank = torch.randn(2, 8), torch.randn(301, 8)
    own = {"first": torch.tensor([300, 4])} if first else {}
    for count in (1, 255, 256, 257, 515):  # columns are found 256 at a time, four by four
        compare(x, bank, count=count, seed=-3, **own)
    compare(x, bank, index=torch.randint(0, 301, (2, 300)).to(torch.int32), **own)


def parts_of(emulation: ModuleType, x: Tensor, bank: Tensor, count: int) -> int:
    seed = torch.zeros(1, dtype=torch.int64)
    parts: int = emulation.sampled_dot_parts((array(x), array(bank), None, None, array(seed), count))
    return parts


def test_parts_of_the_columns_of_few_rows(emulation: ModuleType) -> None:
    """The emulated device has room for 8 blocks: rows, slabs of 128 features, and as many parts as are left."""
    for rows, width, count, parts in (
        (1, 8, 256, 1),
        (1, 8, 257, 2),
        (1, 8, 5000, 7),  # 20 pieces, 3 a part
        (3, 8, 1500, 2),
        (2, 200, 1500, 2),
        (4, 129, 1500, 1),
        (5, 8, 1500, 1),
    ):
        x, bank = torch.randn(rows, width), torch.randn(301, width)
        assert parts_of(emulation, x, bank, count) == parts
        if parts > 1 and count < 2000:
            compare(x, bank, count=count, seed=5, first=torch.arange(rows))
            compare(x.bfloat16(), bank.half(), index=torch.randint(0, 301, (rows, count)))


def test_draws_are_those_of_every_implementation() -> None:
    """A bank of one feature that is the row's number gives the columns themselves, bit for bit."""
    bank = torch.arange(10_007.0)[:, None]
    for seed in (0, -1, 2**40 + 7):
        mine, truth = (sampled_dot(torch.ones(3, 1), bank, count=261, seed=seed, impl=i) for i in ("cuda", "reference"))
        assert torch.equal(mine, truth)


def test_strides_and_offsets() -> None:
    """Rows inside of wider ones; a start that no 16-byte load takes."""
    wide = torch.randn(40, 48)
    index = torch.randint(0, 40, (3, 10))[:, ::2]
    for begin, width in ((0, 16), (4, 24), (1, 16), (2, 13)):
        compare(wide[:3, begin : begin + width], wide[:, begin : begin + width], index=index)
    compare(wide.t()[:3], wide.t(), index=index.clamp_max(47))


def test_gradient_of_the_bank() -> None:
    compare(torch.randn(4, 12), torch.randn(9, 12), need_bank=True, count=7, seed=1, first=torch.arange(4))


def test_values_that_are_not_finite_stay_in_their_scores() -> None:
    x, bank = torch.ones(2, 20), torch.ones(5, 20)
    bank[3, 2] = torch.inf
    scores = sampled_dot(x.requires_grad_(), bank, index=torch.tensor([[0, 3, 1], [0, 1, 2]]), impl="cuda")
    assert scores.isinf().tolist() == [[False, True, False], [False] * 3]
    scores[1].sum().backward()
    assert x.grad is not None
    assert x.grad[1].tolist() == [3.0] * 20


def test_results_do_not_depend_on_the_order_of_threads(emulation: ModuleType) -> None:
    x, bank = torch.randn(3, 50).requires_grad_(), torch.randn(99, 50)
    results = []
    for order in (0, 1, 5):
        emulation.set_order(order)
        scores = sampled_dot(x, bank, count=300, seed=4, impl="cuda")
        results.append((scores, *torch.autograd.grad(scores.sin().sum(), x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_rows() -> None:
    x = torch.randn(0, 4).requires_grad_()
    scores = sampled_dot(x, torch.randn(9, 4), count=3, seed=1, impl="cuda")
    assert scores.shape == (0, 3)
    scores.sum().backward()
    assert x.grad is not None


X, M, S = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(4, 5)
FIRST, INDEX, SEED = torch.arange(4), torch.zeros(4, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bank": M.double()}, "bank: expected float32, bfloat16 or float16"),
        ({"x": X.double()}, "x: expected float32, bfloat16 or float16"),
        ({"bank": M[:, :2]}, r"bank: expected shape \(6, 3\)"),
        ({"bank": M[:0]}, "bank: no rows"),
        ({"x": torch.zeros(4, 20_000), "bank": torch.zeros(1, 20_000)}, "x: expected at most 11264 columns"),
        ({"scores": S[:, :4]}, r"scores: expected shape \(4, 5\)"),
        ({"scores": S.double()}, "scores: unexpected dtype"),
        ({"count": 0}, "index, count: expected one of them"),
        ({"count": -1}, "count: must not be negative"),
        ({"index": INDEX}, "index, count: expected one of them"),
        ({"count": 0, "index": INDEX[:3]}, r"index: expected shape \(4, 5\)"),
        ({"count": 0, "index": INDEX.float()}, "index: unexpected dtype"),
        ({"count": 4, "first": FIRST[:3]}, "first: "),
        ({"seed": None}, "seed: "),
    ],
)
def test_sizes_are_checked_before_memory_is_touched(
    emulation: ModuleType, arguments: dict[str, object], message: str
) -> None:
    def forward(x=X, bank=M, first=None, index=None, seed=SEED, count=5, scores=S) -> None:
        columns = (None if t is None else array(t) for t in (first, index, seed))
        emulation.sampled_dot_forward((array(x), array(bank), *columns, count), array(scores), 0)

    with pytest.raises(ValueError, match=message):
        forward(**arguments)
    forward()
    forward(first=FIRST, count=4)
    forward(index=INDEX, count=0)


def test_sums_of_parts_are_checked(emulation: ModuleType) -> None:
    problem = (array(X[:1]), array(M), None, None, array(SEED), 600)
    grad, dx, right = torch.zeros(1, 600), torch.ones(1, 3), torch.zeros(3, 3)
    for partial in (None, right[:2], right.double(), torch.zeros(3, 4)[:, :3]):
        with pytest.raises(ValueError, match="partial: "):
            emulation.sampled_dot_backward(
                problem, array(grad), None if partial is None else array(partial), array(dx), 0
            )
    emulation.sampled_dot_backward(problem, array(grad), array(right), array(dx), 0)
    assert not dx.any()


def test_columns_out_of_range_fail_on_the_device(emulation: ModuleType) -> None:
    for column in (-1, 6):
        index = INDEX.clone()
        index[2, 1] = column
        with pytest.raises(RuntimeError, match=r"sampled_dot_forward, block \(2, 0, 0\), thread .*: device_check"):
            emulation.sampled_dot_forward((array(X), array(M), None, array(index), None, 0), array(S), 0)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="the CUDA kernels of sampled_dot take no float64"):
        sampled_dot(X.double(), M.double(), count=2, seed=1, impl="cuda")
