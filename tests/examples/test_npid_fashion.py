"""The NPID example on a few glyphs in the place of Fashion-MNIST."""

import npid_fashion as example
import pytest
import torch

from fastret.data import ImageSet


def test_learns_and_votes_after_every_epoch(
    few_glyphs: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "BATCH", 60)
    monkeypatch.setattr(example, "load_fashion_mnist", lambda: few_glyphs)
    example.main(["--epochs", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["untrained", "epoch 1", "epoch 2", "epoch 3"]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[1:]]
    assert losses[-1] < losses[0] - 0.3


def test_memory_votes(few_glyphs: tuple[ImageSet, ImageSet]) -> None:
    train, test = few_glyphs
    model = torch.nn.Sequential(torch.nn.Flatten())
    memory = example.embed(model, train.images)
    found = example.accuracy(model, memory, train, test)
    right = 0
    for row, label in zip(example.embed(model, test.images), test.labels, strict=True):
        cosines, place = (memory @ row).topk(180)  # fewer than 200: all vote
        votes = torch.zeros(60).index_add_(0, train.labels[place], (cosines / 0.07).exp())
        right += int(votes.argmax() == label)
    assert found == pytest.approx(right / 60)
