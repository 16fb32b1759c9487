"""The contract of ClassBalancedBatches: layout, fairness, resuming, bad input."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from fastret.data import ClassBalancedBatches

# Class sizes 5, 1, 4, 2, 7, 3, 6 under values that are neither sorted nor consecutive, rows in a random order.
VALUES = (9, -3, 40, 0, 7, 1000, 5)
SIZES = (5, 1, 4, 2, 7, 3, 6)
LABELS = torch.tensor([v for v, n in zip(VALUES, SIZES, strict=True) for _ in range(n)])
LABELS = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(3))]


def sampler(p: int, k: int, seed: int = 0, labels: torch.Tensor = LABELS) -> ClassBalancedBatches:
    return ClassBalancedBatches(labels, p, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("p", [1, 3, 5, 7])
def test_batches_are_blocks_of_distinct_classes(p: int, k: int) -> None:
    for batch in islice(sampler(p, k), 20):
        assert batch.dtype == torch.int64
        assert batch.shape == (p * k,)
        blocks = LABELS[batch].view(p, k)
        assert (blocks == blocks[:, :1]).all()
        assert len(torch.unique(blocks[:, 0])) == p


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_samples_repeat_only_where_a_class_has_too_few(k: int) -> None:
    sizes = dict(zip(VALUES, SIZES, strict=True))
    for batch in islice(sampler(7, k), 20):
        for block in batch.view(7, k):
            size = sizes[int(LABELS[block[0]])]
            uses = Counter(block.tolist())
            assert len(uses) == min(k, size)
            assert max(uses.values()) == -(-k // size)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 6, 7])
def test_classes_are_drawn_without_replacement(p: int) -> None:
    draws = torch.cat([LABELS[batch] for batch in islice(sampler(p, 1), 7 * 12)]).tolist()
    assert set(Counter(draws).values()) == {12 * p}
    # At no time has a class been drawn more than one round ahead of another, give or take the batch being filled.
    for stop in range(p, len(draws), p):
        uses = Counter(draws[:stop])
        assert max(uses.values()) - min(uses[v] for v in VALUES) <= 1


def test_every_sample_is_reached() -> None:
    seen = torch.unique(torch.cat(list(islice(sampler(3, 2), 200))))
    assert seen.tolist() == list(range(len(LABELS)))


def test_the_seed_decides() -> None:
    first, again, other = (torch.stack(list(islice(sampler(3, 2, seed), 10))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("done", [0, 1, 4])
def test_resuming_goes_on_with_the_next_batch(done: int) -> None:
    original = sampler(3, 2)
    list(islice(original, done))
    state = original.state_dict()
    expected = list(islice(original, 10))
    resumed = sampler(3, 2, seed=99)
    next(resumed)
    resumed.load_state_dict(state)
    for ours, theirs in zip(islice(resumed, 10), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_saved_state_survives_a_file(tmp_path: Path) -> None:
    original = sampler(3, 2)
    next(original)
    torch.save(original.state_dict(), tmp_path / "state.pt")
    resumed = sampler(3, 2, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(next(resumed), next(original))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    labels = torch.tensor([3, 1, 3, 1], dtype=dtype)
    assert sorted(next(sampler(2, 2, labels=labels)).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "labels", [torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3)]
)
def test_labels_must_be_a_vector_of_integers(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="labels must be"):
        sampler(1, 1, labels=labels)


@pytest.mark.parametrize(
    ("p", "k", "message"), [(0, 1, "classes_per_batch"), (8, 1, r"\[1, 7\].*got 8"), (1, 0, "samples_per_class")]
)
def test_batch_shape_out_of_range(p: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(p, k)


def test_foreign_states_are_refused() -> None:
    other = sampler(1, 1, labels=torch.arange(50))
    next(other)
    with pytest.raises(ValueError, match="other labels"):
        sampler(3, 2).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="keys deck and generator"):
        sampler(3, 2).load_state_dict({"deck": torch.zeros(0, dtype=torch.int64)})
