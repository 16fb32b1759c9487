"""The vote of nearest neighbours against loops; what it refuses. Its CUDA kernel: tests/cuda/test_knn_vote.py."""

import math

import pytest
import torch

from fastret.ops import knn_vote

F64 = torch.float64


@pytest.mark.parametrize("impl", ["reference", "tiled", None])
@pytest.mark.parametrize("scale", [1 / 0.07, -0.5, 0.0])
@pytest.mark.parametrize("classes", [1, 6])
def test_votes_are_those_of_loops(impl: str | None, scale: float, classes: int) -> None:
    scores = torch.randn(5, 12, dtype=F64).sort(1, descending=scale > 0).values
    indices = torch.stack([torch.randperm(30)[:12] for _ in range(5)])
    indices[2, 7:], indices[3] = -1, -1
    place = torch.randint(0, classes, (30,))
    winners, shares = knn_vote(scores, indices, place, classes, scale=scale, top=4, impl=impl)
    for q in range(5):
        votes: dict[int, float] = {}
        for s, j in zip(scores[q].tolist(), indices[q].tolist(), strict=True):
            if j >= 0:
                votes[int(place[j])] = votes.get(int(place[j]), 0) + math.exp((s - scores[q, 0].item()) * scale)
        ranked = sorted((-v / sum(votes.values()), c) for c, v in votes.items())[:4] + [(0.0, -1)] * 4
        assert winners[q].tolist() == [c for _, c in ranked[:4]]
        assert shares[q].tolist() == pytest.approx([-v for v, _ in ranked[:4]], abs=1e-12)


S, AT, P = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": S[0]}, ValueError, "scores: expected shape"),
        ({"scores": S.half()}, TypeError, "scores: expected float32 or float64, got torch.float16"),
        ({"indices": AT[:1]}, ValueError, r"indices: expected integers of shape \(2, 3\)"),
        ({"indices": S}, ValueError, "indices: expected integers"),
        ({"indices": AT + 5}, ValueError, "indices: expected numbers from 0 to 4, got 5"),
        ({"place": AT}, ValueError, "place: expected a vector of integers"),
        ({"place": P + 1}, ValueError, "place: expected numbers from 0 to 0, got 1"),
        ({"classes": -1}, ValueError, "classes: expected at least 0"),
        ({"top": 0}, ValueError, "top: expected at least 1"),
        ({"impl": "cpu"}, ValueError, "cpu has no knn_vote"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"scores": S, "indices": AT, "place": P, "classes": 1, **arguments}
    with pytest.raises(error, match=message):
        knn_vote(**given)
