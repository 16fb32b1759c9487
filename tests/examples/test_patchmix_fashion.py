"""The PatchMix example on a few glyphs in the place of Fashion-MNIST."""

import patchmix_fashion as example
import pytest

from fastret.data import ImageSet


def test_learns_and_votes_after_every_epoch(
    few_glyphs: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "BATCH", 60)
    monkeypatch.setattr(example, "load_fashion_mnist", lambda: few_glyphs)
    example.main(["--epochs", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["untrained", "epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[1:]]
    assert losses[-1] < losses[0] - 0.3
