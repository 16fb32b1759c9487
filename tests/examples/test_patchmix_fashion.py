"""The PatchMix example on a few glyphs in the place of Fashion-MNIST."""

import patchmix_fashion as example
import pytest
import torch

from fastret.data import ImageSet, load_glyphs


def _few() -> tuple[ImageSet, ImageSet]:
    """Three fonts of 60 characters to train on, the fourth to be found."""
    whole = load_glyphs()
    test = torch.arange(240) % 4 == 3
    return tuple(
        ImageSet(whole.images[:240][rows], whole.labels[:240][rows], whole.class_names[:60], 60)
        for rows in (~test, test)
    )


def test_learns_and_votes_after_every_epoch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "BATCH", 60)
    monkeypatch.setattr(example, "load_fashion_mnist", _few)
    example.main(["--epochs", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["untrained", "epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[1:]]
    assert losses[-1] < losses[0] - 0.3
