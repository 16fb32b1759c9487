"""The vote of the nearest neighbours against one query after another, and when a run asks for it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastret.data import ImageSet, load_glyphs
from fastret.training import TrainOptions, neighbours, run, train
from fastret.training.evaluation import embed
from fastret.training.neighbours import evaluate_neighbours
from fastret.training.sources import RetrievalData, open_data
from fastret.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_memory_process")
Build = Callable[..., TrainOptions]
K = 7


@pytest.fixture(autouse=True)
def few_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "NEIGHBOURS", K)


def _same_classes() -> RetrievalData:
    """Three images of each character to train on and to vote, the fourth to be found: as Fashion-MNIST is used."""
    whole = load_glyphs()
    query = torch.arange(120) % 4 == 3
    train_set, queries = (
        ImageSet(whole.images[:120][rows], whole.labels[:120][rows], whole.class_names[:30], 30)
        for rows in (~query, query)
    )
    return RetrievalData(train_set, queries, train_set, open_data("glyphs").views)


def _by_loop(queries: Tensor, voters: Tensor, labels: Tensor, voters_labels: Tensor, own: bool) -> float:
    """Accuracy of the vote in float64; ``own``: the voters are the queries."""
    queries, voters = normalize(queries.double()), normalize(voters.double())
    hits = 0
    for i, query in enumerate(queries):
        scores = [(float(query @ row), j) for j, row in enumerate(voters) if not (own and i == j)]
        votes: dict[int, float] = {}
        for cosine, j in sorted(scores, reverse=True)[:K]:
            label = int(voters_labels[j])
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / 0.07)
        hits += max(votes, key=lambda label: votes[label]) == int(labels[i])
    return hits / len(queries)


@pytest.mark.parametrize("loss", ["npid", "patchmix"])
@pytest.mark.parametrize("own", [False, True])
def test_an_epoch_ends_with_the_vote(loss: str, own: bool, options: Build) -> None:
    """Of the memory, or of features of the training images; or of the others that are held out."""
    large_patches = {} if loss == "npid" else {"patch_size": 8}
    chosen = options(loss=loss, batch_classes=36, iterations=9, test_every=2, **large_patches)
    data = open_data(chosen.data) if own else _same_classes()
    trainer = Trainer(data, chosen)
    trainer.initialise()
    images, due = len(data.train.images), []
    for _ in range(9):
        trainer.step()
        if trainer.test_due:
            due.append(trainer.iteration)
            trainer.test()
    assert due == [math.ceil(2 * epochs * images / 36) for epochs in range(1, 9 * 36 // (2 * images) + 1)]
    assert [point.epoch for point in trainer.curve] == [2 * (i + 1) for i in range(len(due))]
    queries = embed(trainer.model, data.queries.images, "cpu")
    if own:
        voters = queries
    elif loss == "npid":
        voters = trainer.loss.bank.memory
    else:
        voters = embed(trainer.model, data.train.images, "cpu")
    voters_labels = data.queries.labels if own else data.train.labels
    expected = _by_loop(queries, voters, data.queries.labels, voters_labels, own)
    assert trainer.test().share == pytest.approx(expected, abs=1e-9)
    found = evaluate_neighbours(trainer.model, trainer.loss, data, "cpu")
    assert found.knn == trainer.curve[-1].share
    assert 0 < found.recall_at_1 <= found.recall_at_10 <= 1


def test_of_few_images_only_the_nearest_tenth_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 200)
    asked: list[int] = []

    def knn(queries: Tensor, *_: Any, k: int, **__: Any) -> tuple[Tensor, None]:
        asked.append(k)
        return queries.new_zeros(len(queries), 1), None

    monkeypatch.setattr(neighbours, "knn_classify", knn)
    data = _same_classes()
    neighbours._accuracy(torch.zeros(30, 4), torch.zeros(90, 4), data)
    neighbours._accuracy(torch.zeros(30, 4), None, replace(data, gallery=None))  # 29 others
    whole = replace(open_data("glyphs"), gallery=None)
    neighbours._accuracy(torch.zeros(2000, 4), None, whole)
    assert asked == [9, 3, 200]


def test_a_run_reports_its_curve(options: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_data", lambda name: _same_classes())
    lines: list[str] = []
    chosen = options(loss="npid", batch_classes=30, iterations=6)
    report = train(chosen, say=lines.append)
    assert [point.epoch for point in report.curve] == [0, 1, 2]
    assert (report.curve[0].share, report.curve[-1].share) == (report.before.first(), report.after.first())
    metrics: dict[str, Any] = json.loads((chosen.folder() / "metrics.json").read_text())
    assert metrics["curve"] == [{"epoch": point.epoch, "share": point.share} for point in report.curve]
    assert metrics["seconds"]["testing"] > 0
    said = "\n".join(lines)
    for part in (f"epoch 1: loss {report.history[2]:.4f}, kNN top-1 {report.curve[1].share:.1%}", "(30 x 1 view)"):
        assert part in said
    assert "B = 30, K = 4,096, D = 128" in said
    assert "tests 0." in said
    assert Path(chosen.folder() / "plot.png").is_file()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"samples_per_class": 2}, ValueError, "samples_per_class: expected at most 1, got 2"),
        ({"num_noise": 0}, ValueError, "num_noise: expected at least 1, got 0"),
        ({"momentum": 1.5}, ValueError, "momentum: expected a number from 0 to 1, got 1.5"),
        ({"momentum": "half"}, TypeError, "momentum: expected a number, got str"),
        ({"test_every": 0}, ValueError, "test_every: expected at least 1, got 0"),
        ({"mix": 2}, ValueError, "mix: expected none, as npid has no mixed images, got 2"),
        ({"loss": "smooth-ap", "test_every": 1}, ValueError, "test_every: expected none, as smooth-ap has no test"),
        ({"loss": "patchmix", "num_noise": 9}, ValueError, "num_noise: expected none, as patchmix has no noise, got 9"),
        ({"loss": "patchmix", "filters": 16}, ValueError, "filters: expected none, as patchmix has no convolutions"),
        ({"loss": "patchmix", "mix": 9}, ValueError, "batch_classes: expected at least 2 mix - 1 = 17, got 16"),
        ({"loss": "patchmix", "patch_size": 1.5}, TypeError, "patch_size: expected an integer, got float"),
        ({"loss": "patchmix", "samples_per_class": 1}, ValueError, "samples_per_class: expected at least 2, got 1"),
    ],
)
def test_bad_options_are_named(changed: dict[str, Any], error: type, message: str, options: Build) -> None:
    with pytest.raises(error, match=message):
        options(**{"loss": "npid", **changed})
