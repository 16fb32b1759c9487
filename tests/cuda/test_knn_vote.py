"""The vote of nearest neighbours in CUDA C++, run in the emulation, against the definition in float64."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastret.backends.cpu.array import array
from fastret.ops import knn_vote, topk


def neighbours(queries: int, k: int, rows: int) -> tuple[Tensor, Tensor]:
    scores = torch.randn(queries, k).sort(1, descending=True).values
    return scores, torch.stack([torch.randperm(rows)[:k] for _ in range(queries)])


def compare(scores: Tensor, indices: Tensor, place: Tensor, classes: int, **options: float) -> None:
    winners, shares = knn_vote(scores, indices, place, classes, **options, impl="cuda")
    expected, truth = knn_vote(scores.double(), indices, place, classes, **options, impl="reference")
    torch.testing.assert_close(shares.double(), truth, rtol=1e-5, atol=1e-6)
    apart = (truth[:, :-1] - truth[:, 1:]).abs() > 1e-5  # closer shares may change places in float32
    clear = torch.nn.functional.pad(apart, (1, 0), value=True) & torch.nn.functional.pad(apart, (0, 1), value=True)
    assert torch.equal(winners[clear], expected[clear])


@pytest.mark.parametrize(("k", "classes", "top"), [(1, 3, 1), (31, 5, 7), (256, 40, 5), (300, 20, 3)])
@pytest.mark.usefixtures("emulation")
def test_votes_are_those_of_the_definition(k: int, classes: int, top: int) -> None:
    scores, indices = neighbours(2, k, 400)
    place = torch.randint(0, classes, (400,))
    for scale in (1 / 0.07, -2.0, 0.0):
        compare(scores if scale > 0 else scores.flip(1), indices, place, classes, scale=scale, top=top)


@pytest.mark.usefixtures("emulation")
def test_ties_missing_neighbours_and_classes() -> None:
    place = torch.tensor([9, 5, 9, 5, 0])
    flat, fill = torch.zeros(1, 4), -math.inf
    winners, shares = knn_vote(flat, torch.tensor([[0, 1, 2, 3]]), place, 10, top=3, impl="cuda")
    assert (winners.tolist(), shares.tolist()) == ([[5, 9, -1]], [[0.5, 0.5, 0.0]])  # the lower class of equals
    nobody = torch.tensor([[4, -1, -1, -1], [-1, -1, -1, -1]])
    scores = torch.tensor([[3.0, fill, fill, fill], [fill] * 4])
    for scale in (1.0, 0.0):
        winners, shares = knn_vote(scores, nobody, place, 10, scale=scale, top=300, impl="cuda")
        assert winners[0].tolist() == [0] + [-1] * 299
        assert shares.sum(1).tolist() == [1.0, 0.0]
        assert (winners[1] == -1).all()
    winners, shares = knn_vote(torch.full((1, 2), math.inf), nobody[:1, :2], place, 10, top=2, impl="cuda")
    assert winners.tolist() == [[-1, -1]]
    assert shares.isnan().all()


@pytest.mark.usefixtures("emulation")
def test_one_vote_of_nan_is_everybodys() -> None:
    """Of two classes: the one whose votes are numbers does not win."""
    scores, indices, place = torch.tensor([[1.0, math.nan, 0.5]]), torch.tensor([[0, 1, 2]]), torch.tensor([0, 1, 0])
    for impl in ("cuda", "reference"):
        winners, shares = knn_vote(scores, indices, place, 2, top=2, impl=impl)
        assert winners.tolist() == [[-1, -1]]
        assert shares.isnan().all()


@pytest.mark.usefixtures("emulation")
def test_strides_and_integers() -> None:
    scores, indices = neighbours(3, 20, 50)
    compare(scores[:, ::2], indices.to(torch.int32)[:, ::2], (torch.arange(50) % 4).to(torch.int16), 4, top=2)


@pytest.mark.usefixtures("emulation")
def test_of_what_topk_finds() -> None:
    x, labels = torch.randn(40, 6), torch.arange(40) % 7
    scores, indices = topk(x[:5], x, k=45, metric="l2")
    compare(scores, indices, labels, 7, scale=-0.5, top=4)


def test_results_do_not_depend_on_the_order_of_threads(emulation: ModuleType) -> None:
    scores, indices = neighbours(2, 200, 300)
    results = []
    for order in (0, 1, 9):
        emulation.set_order(order)
        results.append(knn_vote(scores, indices, torch.arange(300) % 11, 11, scale=3.0, top=11, impl="cuda"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


V, AT, P = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": V.double()}, "scores: unexpected dtype"),
        ({"scores": V[:, :0], "indices": AT[:, :0]}, "scores: expected 1 to 2048 neighbours"),
        ({"scores": torch.zeros(1, 2049), "indices": torch.zeros(1, 2049).long()}, "scores: expected 1 to 2048"),
        ({"indices": AT[:1]}, r"indices: expected shape \(2, 3\)"),
        ({"place": P.int().view(torch.float32)}, "place: unexpected dtype"),
        ({"classes": -1}, "classes: expected"),
        ({"winners": AT[:, :1]}, r"shares: expected shape \(2, 1\)"),
        ({"shares": V.double()}, "shares: unexpected dtype"),
    ],
)
def test_sizes_are_checked_before_memory_is_touched(
    emulation: ModuleType, arguments: dict[str, object], message: str
) -> None:
    def vote(scores=V, indices=AT, place=P, classes=1, winners=AT, shares=V) -> None:
        given = (array(scores), array(indices), array(place))
        emulation.knn_vote(*given, classes, 1.0, array(winners), array(shares), 0)

    with pytest.raises(ValueError, match=message):
        vote(**arguments)


def test_classes_and_indices_out_of_range_fail_on_the_device(emulation: ModuleType) -> None:
    out = torch.zeros_like(AT), torch.zeros_like(V)
    for indices, place, message in ((AT + 5, P, "reads element 5 of place, which has 5"), (AT, P + 1, "device_check")):
        with pytest.raises(RuntimeError, match=message):
            emulation.knn_vote(array(V), array(indices), array(place), 1, 1.0, *map(array, out), 0)
