"""topk in CUDA C++, run in the emulation, against the definition: strips, parts, ties, masks, what is no candidate."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.backends import choices, registry, workspace
from fastret.backends.cpu.array import array
from fastret.backends.cuda import topk as backend
from fastret.backends.pairs import PairMask
from fastret.ops import topk

F64 = torch.float64
METRICS = ("cosine", "dot", "l2")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Strips of ``rows`` rows and about so many columns, for rows of ``width`` features."""

    def shrink(rows: int, columns: int, width: int) -> None:
        monkeypatch.setattr(backend, "ROWS", rows)
        monkeypatch.setattr(workspace, "_workspace", str(4 * columns * (rows + width)))

    return shrink


def whole(rows: int, width: int, most: int = 4) -> Tensor:
    """Integers, whose products are exact: many scores are equal."""
    return torch.randint(-most, most + 1, (rows, width)).float()


def same_as_reference(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    scores, indices = topk(x, y, **options, impl="cuda")
    expected, places = topk(x.to(F64), y.to(F64), **options, impl="reference")
    assert scores.dtype == torch.float32
    assert torch.equal(scores.to(F64), expected)
    assert torch.equal(indices, places)
    return scores, indices


@pytest.mark.parametrize("bound", ["1KiB", "100KiB", "1MiB", "128MiB"])
@pytest.mark.parametrize("width", [1, 384, 40_000])
def test_strips_stay_within_the_workspace(monkeypatch: pytest.MonkeyPatch, bound: str, width: int) -> None:
    monkeypatch.setattr(workspace, "_workspace", bound)
    numbers = workspace.workspace() // 4
    for n, m in ((1, 1), (7, 10**6), (50_000, 1_280_000)):
        rows, columns = backend._strip(n, m, width)
        assert 1 <= rows <= min(n, backend.ROWS)
        assert columns % 4 == 0
        assert 4 <= columns < m + 4
        assert rows * columns <= numbers
        assert (rows + width) * columns <= numbers or columns == 4
    assert backend._strip(50_000, 1_280_000, 384)[0] == (4096 if bound == "128MiB" else min(4096, int(numbers**0.5)))


@pytest.mark.usefixtures("emulation")
def test_a_small_workspace_bounds_the_strips_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_workspace", "1KiB")
    strips = []
    multiply = backend._multiply
    monkeypatch.setattr(backend, "_multiply", lambda x, y, p: (strips.append(p.numel()), multiply(x, y, p))[1])
    same_as_reference(whole(37, 3), whole(90, 3), k=5, metric="l2")
    assert max(strips) <= 256
    monkeypatch.setattr(workspace, "_workspace", "many")
    with pytest.raises(ValueError, match="FASTRET_WORKSPACE: expected a positive number"):
        topk(whole(2, 3), k=1, impl="cuda")


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize(("n", "m", "k"), [(5, 300, 1), (3, 701, 256), (1, 900, 257), (2, 9, 20), (1, 1, 1)])
@pytest.mark.usefixtures("emulation")
def test_order_and_ties_over_strips(small: Callable[..., None], metric: str, n: int, m: int, k: int) -> None:
    """Strips with tails on both axes; most scores have equals, so that every place is a decision."""
    small(2, 236, 3)
    same_as_reference(whole(n, 3), whole(m, 3), k=k, metric=metric, first_column=7)


@pytest.mark.usefixtures("emulation")
def test_the_longest_list(small: Callable[..., None]) -> None:
    """More than two sorts of a block's fresh keys; all of them better than all before, and fewer columns than k."""
    small(2, 2000, 1)
    up = torch.arange(3301.0)[:, None]
    same_as_reference(torch.ones(1, 1), up, k=2048, metric="dot")
    same_as_reference(torch.tensor([[1.0], [-1.0]]), torch.arange(700.0)[:, None], k=2047, metric="dot")


@pytest.mark.usefixtures("emulation")
def test_a_warp_sorts_again_and_again(small: Callable[..., None]) -> None:
    small(2, 1000, 1)
    up = torch.arange(1500.0)
    for k in (1, 31, 256):
        same_as_reference(torch.tensor([[1.0], [-1.0], [0.0]]), up[:, None], k=k, metric="dot")
        same_as_reference(torch.ones(1, 1), (up - 750)[:, None], k=k, metric="l2")


@pytest.mark.parametrize("k", [40, 300])
@pytest.mark.usefixtures("emulation")
def test_parts_of_few_rows(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(backend, "COLUMNS", 100)
    monkeypatch.setattr(backend, "WARPS", 8 * 3)
    assert [backend._parts(rows, 1000, k) for rows in (1, 2, 30)] == ([10, 10, 1] if k == 40 else [3, 1, 1])
    y = whole(1003, 2)
    same_as_reference(whole(1, 2), y, k=k, metric="dot")
    same_as_reference(whole(1, 2), y[:3], k=k, metric="dot")
    monkeypatch.setattr(workspace, "_workspace", str(4 * 500 * 3))  # a state that goes from strip to strip in parts
    same_as_reference(whole(1, 2), y, k=k, metric="l2")


def labels(count: int, seed: int) -> Tensor:
    return torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))


MASKS: dict[str, Callable[[int, int], PairMask]] = {
    "not self": lambda n, m: PairMask(offset=9),
    "other label, other camera": lambda n, m: PairMask(
        different=(labels(n, 1).int(), labels(m, 2).int()), distinct=(labels(n, 3), labels(2 * m, 4)[::2])
    ),
    "same label, wrapped offset": lambda n, m: PairMask(same=(labels(n, 5), labels(m, 6)), offset=-2, period=m + 9),
    "between": lambda n, m: PairMask(above=torch.full((n,), 2.0, dtype=F64), below=torch.arange(4.0, 4 + n)),
    "none": lambda n, m: PairMask(same=(torch.zeros(n).long(), torch.ones(m).long())),
}


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("emulation")
def test_masks(small: Callable[..., None], mask: str, metric: str) -> None:
    small(4, 72, 3)
    x, y = whole(7, 3), whole(150, 3)
    options = {"metric": metric, "mask": MASKS[mask](7, 150), "first_column": 9}
    same_as_reference(x, y, k=30, **options)
    same_as_reference(x[:2], y, k=290, **{**options, "mask": MASKS[mask](2, 150)})


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("emulation")
def test_scores_of_rows_of_any_type(small: Callable[..., None], metric: str, dtype: torch.dtype) -> None:
    small(2, 60, 24)
    x, y = torch.randn(3, 24).to(dtype), torch.randn(130, 24).to(dtype)
    for gallery in (y, y.to(torch.bfloat16)):
        scores, indices = topk(x, gallery, k=12, metric=metric, impl="cuda")
        every, places = topk(x.to(F64), gallery.to(F64), k=130, metric=metric, impl="reference")
        torch.testing.assert_close(scores.to(F64), every[:, :12], rtol=2e-6, atol=4e-6)
        of_index = torch.empty_like(every).scatter_(1, places, every)
        torch.testing.assert_close(of_index.gather(1, indices), every[:, :12], rtol=2e-6, atol=4e-6)


@pytest.mark.usefixtures("emulation")
def test_cosines_of_rows_far_from_one(emulation: ModuleType) -> None:
    """Rows whose products overflow or vanish; zero rows have cosine 0."""
    x, y = torch.randn(2, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    expected = topk(x, y, k=30, impl="cuda")
    for size in (2.0**100, 2.0**-30):
        torch.testing.assert_close(topk(x * size, y * size, k=30, impl="cuda"), expected, rtol=0, atol=0)
    torch.testing.assert_close(topk(x.float() * 1e25, y.float() * 1e25, k=30, impl="cuda")[0], expected[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores, indices = topk(torch.zeros(1, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype), k=3, impl="cuda")
        assert (scores.tolist(), indices.tolist()) == ([[0.0] * 3], [[0, 1, 2]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("emulation")
def test_nan_and_the_worst_score_are_no_candidates(metric: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.ones(2, 2, dtype=dtype), torch.ones(9, 2, dtype=dtype)
        y[3], y[5], x[1] = math.nan, torch.tensor([math.inf, -math.inf]), math.nan
        scores, indices = topk(x, y, k=9, metric=metric, impl="cuda")
        assert indices.tolist() == [[0, 1, 2, 4, 6, 7, 8, -1, -1], [-1] * 9]
        assert scores[0, :7].isfinite().all()
        assert torch.cat([scores[0, 7:], scores[1]]).tolist() == [math.inf if metric == "l2" else -math.inf] * 11


@pytest.mark.usefixtures("emulation")
def test_infinities_and_zeros() -> None:
    x, y = torch.full((1, 2), 3e38), torch.tensor([[1.0, 1.0], [2.0, 2.0], [-2.0, -2.0], [-1.0, 0.5]])
    scores, indices = topk(x, y, k=4, metric="dot", impl="cuda")
    assert indices.tolist() == [[0, 1, 3, -1]]
    assert scores[0, :2].tolist() == [math.inf] * 2
    scores, indices = topk(torch.ones(1, 1), torch.tensor([[-0.0], [0.0], [-0.0]]), k=3, metric="dot", impl="cuda")
    assert (indices.tolist(), scores.tolist()) == ([[0, 1, 2]], [[0.0] * 3])
    for n, m in ((0, 4), (2, 0)):
        scores, indices = topk(torch.randn(n, 3), torch.randn(m, 3), k=2, metric="l2", impl="cuda")
        assert (scores.tolist(), indices.tolist()) == ([[math.inf] * 2] * n, [[-1] * 2] * n)


@pytest.mark.parametrize("k", [6, 400])
def test_results_do_not_depend_on_the_order_of_threads(emulation: ModuleType, k: int) -> None:
    x, y = whole(2, 2), whole(1500, 2)
    found = []
    for order in (0, 1, 9):
        emulation.set_order(order)
        found.append(topk(x, y, k=k, metric="dot", impl="cuda"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("emulation")
def test_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2)
    with pytest.raises(NotImplementedError, match=r"impl='cuda' cannot serve .* finds at most 2048 a row"):
        topk(x, k=2049, impl="cuda")
    with pytest.raises(ValueError, match="the CUDA kernel of topk takes no float64"):
        topk(x.double(), k=1, impl="cuda")
    assert registry.resolve("topk", "cpu", torch.float32, None) == "cpu"
    monkeypatch.setattr(registry.Implementation, "missing", lambda self: None)
    monkeypatch.setattr("fastret.backends.cuda.unsupported", lambda call: None)
    assert registry.resolve("topk", "cuda", torch.float32, None) == "tiled"  # nothing is measured
    monkeypatch.setattr(choices, "measured_here", lambda op, index=None: ("cuda",))
    assert registry.resolve("topk", "cuda", torch.float32, None) == "cuda"
    assert registry.resolve("topk", "cuda", torch.float32, None, ("long",)) == "tiled"
    assert registry.resolve("topk", "cuda", F64, None) == "tiled"
    assert registry.resolve("topk", "cpu", torch.float32, None) == "cpu"


P, S, V, AT = torch.zeros(2, 8), torch.zeros(2, 513).long(), torch.zeros(2, 3), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k: expected 1 to 2048 on CUDA"),
        ({"k": 2049}, "k: expected 1 to 2048 on CUDA"),
        ({"rows": 1}, "first_row: rows reach beyond x"),
        ({"first_row": -1}, "first_row: rows reach beyond x"),
        ({"first_col": 4}, "first_col: columns reach beyond y"),
        ({"products": P.double()}, "products: unexpected dtype"),
        ({"products": torch.zeros(2, 7)}, "products: expected rows at multiples of 16 bytes"),
        ({"row": torch.zeros(3)}, r"row: expected shape \(1, 2\)"),
        ({"col": torch.zeros(9)[1:]}, "col: expected a multiple of 16 bytes"),
        ({"score": 3}, "score: unknown kind"),
        ({"same": (AT[0, :2], AT[0])}, r"mask.same\[1\]: expected shape \(1, 8\)"),
        ({"above": torch.zeros(2, dtype=F64)}, "mask.above: unexpected dtype"),
        ({"parts": 0}, "parts: must be at least 1"),
        ({"parts": 2}, r"state: expected shape \(4, 513\)"),
        ({"state": torch.zeros(2, 513)}, "state: unexpected dtype"),
        ({"scores": V.double()}, "scores: unexpected dtype"),
        ({"indices": AT[:, :2]}, r"indices: expected shape \(2, 3\)"),
    ],
)
def test_sizes_are_checked_before_memory_is_touched(emulation: ModuleType, given: dict[str, Any], message: str) -> None:
    def search(
        rows=2, cols=8, k=3, same=None, above=None, products=P, row=P[0, :2], col=P[0], first_row=0, first_col=0,
        score=1, parts=1, state=S, scores=V, indices=AT,
    ) -> None:  # fmt: skip
        relation = None if same is None else tuple(map(array, same))
        mask = (relation, None, None, None, 0, None if above is None else array(above), None)
        strip = (array(products), array(row.contiguous()), array(col), first_row, first_col, score)
        emulation.topk_select((rows, cols, k, mask, 0), strip, parts, True, array(state), 0)
        emulation.topk_finish((rows, cols, k, mask, 0), False, parts, array(state), array(scores), array(indices), 0)

    search()
    with pytest.raises(ValueError, match=message):
        search(**given)
