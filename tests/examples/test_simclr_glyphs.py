"""The SimCLR example, at a size of seconds: what it learns, writes, refuses, and how it is stopped and resumed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import simclr_glyphs as example
import torch

from fastret.training.checkpoint import load_checkpoint
from fastret.training.memory import Peak


@pytest.fixture(autouse=True)
def no_memory_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a run the process that measures memory: seconds of importing torch."""
    monkeypatch.setattr(example, "measure_peak", lambda job: Peak(12_345))


@pytest.fixture
def small_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 images of 16 characters to train on, as many held out."""
    split = example.split

    def few() -> tuple[torch.Tensor, Any]:
        images, held_out = split()
        chosen = held_out.labels < 16
        few_held_out = type(held_out)(held_out.images[chosen], held_out.labels[chosen], held_out.class_names[:16], 0)
        return images[:64], few_held_out

    monkeypatch.setattr(example, "split", few)


def _options(folder: Path, **changed: Any) -> Any:
    return example.Options(**{"epochs": 6, "batch_size": 32, "out": str(folder), **changed})


def _trained(folder: Path) -> dict[str, Any]:
    state = load_checkpoint(folder)["trainer"]
    return {name: value for name, value in state.items() if not name.endswith("seconds")}


def test_training_and_held_out_classes_are_those_it_names() -> None:
    images, held_out = example.split()
    assert len(images) == 4 * example.TRAIN_CLASSES == example.Options().batch_size
    assert (len(held_out.images), len(held_out.class_names)) == (1952, 488)


def test_two_epochs_learn_and_write_what_they_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--epochs", "2", "--batch-size", "128", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["history"][-1] < metrics["history"][0] - 0.5
    assert metrics["trained"]["recall_at_1"] > metrics["untrained"]["recall_at_1"] + 0.1
    assert metrics["pixels"]["recall_at_1"] == pytest.approx(0.528, abs=0.005)
    assert [point["epoch"] for point in metrics["curve"]] == [0, 2]
    assert metrics["memory"]["loss"]["bytes"] == 12_345
    assert metrics["memory"]["official_bytes"] > 3 * 4 * 256**2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for part in ("without labels", "raw pixels", "MAP@R", "loss memory", "checkpoint.pt, metrics.json, plot.png"):
        assert part in out


@pytest.mark.usefixtures("small_set")
def test_stopped_and_resumed_is_as_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "EVALUATE_EVERY", 2)
    example.run(_options(tmp_path / "whole"))
    epoch = example.SimCLR.epoch

    def interrupted(self: Any) -> float:
        if self.epochs == 2:
            os.kill(os.getpid(), signal.SIGINT)
        loss: float = epoch(self)
        return loss

    folder = tmp_path / "parts"
    command = ["--epochs", "6", "--batch-size", "32", "--out", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(example.SimCLR, "epoch", interrupted)
        assert example.main(command) == 130
    stopped = capsys.readouterr().err.splitlines()[-1]
    assert "stopped after 3 of 6 epochs; go on with: python" in stopped
    assert stopped.endswith("--epochs 6 --batch-size 32 --seed 0 --out " + str(folder) + " --resume")
    assert not (folder / "metrics.json").exists()

    assert example.main([*command, "--resume"]) == 0
    whole, parts = _trained(tmp_path / "whole"), _trained(folder)
    assert whole["history"] == parts["history"]
    assert whole["curve"] == parts["curve"]
    assert all(torch.equal(whole["model"][name], tensor) for name, tensor in parts["model"].items())


@pytest.mark.usefixtures("small_set")
def test_a_seed_decides_everything(tmp_path: Path) -> None:
    histories = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # the caller's random state must not matter
        histories.append(example.run(_options(tmp_path / name, epochs=2, seed=seed))["history"])
    assert histories[0] == histories[1] != histories[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "2049"], "batch_size: expected at most 2048, the number of training images, got 2049"),
        (["--batch-size", "1"], "batch_size: expected at least 2, got 1"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--resume"], "no checkpoint.pt to resume from"),
    ],
)
def test_wrong_calls_say_what_is_expected(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert example.main([*arguments, "--out", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.usefixtures("small_set")
def test_other_options_are_not_resumed(tmp_path: Path) -> None:
    example.run(_options(tmp_path, epochs=1))
    with pytest.raises(ValueError, match="options: expected those of the run to be resumed"):
        example.run(_options(tmp_path, epochs=2), resume=True)


def test_views_of_an_image_are_of_that_image() -> None:
    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    images[1] = 0
    views = example.two_views(images, torch.Generator().manual_seed(0))
    assert views.shape == (6, 1, 32, 32)
    assert [bool(view.any()) for view in views] == [True, False, True] * 2
    assert not torch.equal(views[0], views[3])
