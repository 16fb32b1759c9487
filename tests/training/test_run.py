"""Whole runs on a small set: what they learn, write, repeat and resume."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastret.training import Interrupted, TrainOptions, checkpoint, train
from fastret.training.checkpoint import load_checkpoint, save_checkpoint
from fastret.training.interrupt import deferred_interrupt
from fastret.training.losses import LOSSES
from fastret.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_memory_process")
Build = Callable[..., TrainOptions]
PNG = b"\x89PNG\r\n\x1a\n"


def _silent(line: str) -> None:
    pass


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for key in a for d in _differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list):
        assert len(a) == len(b)
        return [d for i in range(len(a)) for d in _differences(a[i], b[i], f"{where}/{i}")]
    return [] if a == b else [where]


def _trained(folder: str) -> dict[str, Any]:
    """The trainer's last state without its times: network, proxies, optimizer and what draws the next batch."""
    state = load_checkpoint(Path(folder))["trainer"]
    return {name: value for name, value in state.items() if not name.endswith("seconds")}


def _data_for(loss: str) -> dict[str, str]:
    """A book of words needs more images than the small set has; few patches are fast."""
    recipe = LOSSES[loss].recipe
    return {
        **({} if recipe.bits is None else {"data": "glyphs"}),
        **({} if recipe.patch_size is None else {"patch_size": 8}),
    }


def _with_tests(loss: str) -> dict[str, Any]:
    """An epoch of three steps where a loss is tested after it."""
    return {**_data_for(loss), **({} if LOSSES[loss].recipe.test_every is None else {"batch_classes": 64})}


def _interrupt_after(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives within a step."""
    step = Trainer.step

    def interrupted(self: Trainer) -> float:
        if self.iteration == iterations - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_learns_to_retrieve_unseen_classes(options: Build) -> None:
    report = train(options(iterations=12, batch_classes=40), say=_silent)
    assert report.held_out.classes == 40
    assert report.after.map_at_r > report.before.map_at_r + 0.2
    assert report.after.recall_at_1 > report.before.recall_at_1 + 0.1
    assert report.history[-1] < report.history[0] / 2


def test_learns_with_nt_xent(options: Build) -> None:
    report = train(options(loss="nt-xent", iterations=12, batch_classes=40), say=_silent)
    assert report.after.map_at_r > report.before.map_at_r + 0.2
    assert report.history[-1] < report.history[0] - 1
    assert "tables of positive x negative pairs need" in report.table()


def test_equal_options_give_equal_bits(options: Build, tmp_path: Path) -> None:
    first, second, other = (
        options(output=str(tmp_path / name), seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    for chosen in (first, second, other):
        torch.rand(3)  # the caller's random state must not matter
        train(chosen, say=_silent)
    assert _differences(_trained(first.output), _trained(second.output)) == []
    assert _trained(first.output)["history"] != _trained(other.output)["history"]


def test_random_state_of_the_caller_is_kept(options: Build) -> None:
    before = torch.get_rng_state()
    train(options(), say=_silent)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("loss", "stop"),
    [
        *((loss, stop) for loss in ("smooth-ap", "proxy-nca") for stop in (1, 3, 5)),
        *((loss, 3) for loss in ("spq", "npid", "patchmix")),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(
    loss: str, stop: int, options: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (
        options(**_with_tests(loss), loss=loss, output=str(tmp_path / name), iterations=6, checkpoint_every=4)
        for name in ("whole", "parts")
    )
    expected = train(whole, say=_silent)
    with monkeypatch.context() as patch:
        _interrupt_after(stop, patch)
        with pytest.raises(
            Interrupted, match=f"stopped after {stop} of 6 iterations; go on with: fastret train --output"
        ):
            train(parts, say=_silent)
    assert load_checkpoint(parts.folder())["trainer"]["iteration"] == stop
    assert not (parts.folder() / "metrics.json").exists()
    report = train(parts, resume=True, say=_silent)
    assert _differences(_trained(whole.output), _trained(parts.output)) == []
    assert (report.before, report.after, report.curve) == (expected.before, expected.after, expected.curve)
    assert len(report.curve) == (0 if LOSSES[loss].recipe.test_every is None else 3)


def test_ctrl_c_goes_back_to_the_handler_before(options: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    _interrupt_after(2, monkeypatch)
    with pytest.raises(Interrupted):
        train(options(), say=_silent)
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_interrupts_at_once() -> None:
    with deferred_interrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_metrics_and_plot_are_written(options: Build) -> None:
    lines: list[str] = []
    chosen = options(threads=torch.get_num_threads())
    report = train(chosen, say=lines.append)
    metrics = json.loads((chosen.folder() / "metrics.json").read_text())
    assert metrics["options"]["lr"] == 4e-3
    assert metrics["train"] == metrics["held_out"] == {"classes": 40, "images": 160}
    assert metrics["batch_classes"] == 16
    assert metrics["history"] == report.history
    assert len(report.history) == 4
    before = metrics["before"]
    assert 0 <= before["map_at_r"] <= before["recall_at_1"] <= before["recall_at_10"] <= 1
    assert metrics["seconds"]["initialising"] == metrics["seconds"]["testing"] == 0
    assert metrics["curve"] == []
    assert 0 < metrics["seconds"]["loss"] < metrics["seconds"]["training"]
    assert metrics["memory"] == {"loss": {"bytes": 12_345, "problem": None}, "official_bytes": round(9.1 * 4 * 64**3)}
    assert {"fastret", "torch", "threads"} < metrics["versions"].keys()
    assert (chosen.folder() / "plot.png").read_bytes().startswith(PNG)
    assert sorted(file.name for file in chosen.folder().iterdir()) == ["checkpoint.pt", "metrics.json", "plot.png"]
    said = "\n".join(lines)
    for part in ("40 classes, 160 images", "R@1", "R@10", f"{report.after.map_at_r:.1%}", "12.3 kB", "9.54 MB"):
        assert part in said


def test_without_matplotlib_the_run_succeeds(options: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError
    lines: list[str] = []
    chosen = options(iterations=1)
    train(chosen, say=lines.append)
    assert "no plot.png: the plot needs matplotlib: pip install 'fastret[plot]'" in lines[-1]
    assert (chosen.folder() / "metrics.json").is_file()


def test_batch_is_cut_to_the_classes_there_are(options: Build) -> None:
    assert train(options(batch_classes=256, iterations=1), say=_silent).batch_classes == 40


def test_folder_of_images_trains(tmp_path: Path, options: Build) -> None:
    """Colour images of unequal sizes and class counts; a class is a hue, an image a brightness."""
    image = pytest.importorskip("PIL.Image")
    for c in range(8):
        (tmp_path / "images" / f"class{c}").mkdir(parents=True)
        for i in range(3 + c % 2):
            color = tuple(80 + 20 * i + 60 * (c >> bit & 1) for bit in range(3))
            image.new("RGB", (20 + i, 24), color).save(tmp_path / "images" / f"class{c}" / f"{i}.png")
    report = train(options(data=str(tmp_path / "images"), iterations=2), say=_silent)
    assert (report.train.classes, report.held_out.classes, report.batch_classes) == (4, 4, 4)
    assert report.train.images + report.held_out.images == 28


def test_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {"options": {}, "before": {}, "trainer": {"x": torch.arange(3)}}
    save_checkpoint(tmp_path, state)

    def full_disk(state: Any, path: Path) -> None:
        path.write_bytes(b"half a checkp")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, {})
    assert _differences(load_checkpoint(tmp_path), state) == []
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint.pt to resume from in .*"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged or no checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is no checkpoint of fastret train"):
        load_checkpoint(tmp_path)


def test_resuming_with_other_options_is_refused(options: Build) -> None:
    train(options(iterations=1), say=_silent)
    with pytest.raises(ValueError, match=r"lr: expected 0.004 as in the run to be resumed, got 0.1"):
        train(options(iterations=1, lr=0.1), resume=True, say=_silent)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name: str, options: Build) -> None:
    lines: list[str] = []
    report = train(options(**_data_for(name), loss=name, iterations=30), say=lines.append)
    assert sum(report.history[-5:]) < sum(report.history[:5])
    assert LOSSES[name].official in "\n".join(lines)


def test_diverging_loss_is_reported(options: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Any, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return embeddings.sum() * float("nan")

    monkeypatch.setattr("fastret.SmoothAP.forward", poisoned)
    with pytest.raises(ValueError, match="the loss is nan after 0 iterations; try a lower learning rate"):
        train(options(), say=_silent)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"loss": "triplet"}, ValueError, "loss: expected one of smooth-ap, .*, got 'triplet'"),
        ({"iterations": 0}, ValueError, "iterations: expected at least 1, got 0"),
        ({"iterations": 1.5}, TypeError, "iterations: expected an integer, got float"),
        ({"batch_classes": 1}, ValueError, "batch_classes: expected at least 2, got 1"),
        ({"samples_per_class": 1}, ValueError, "samples_per_class: expected at least 2, got 1"),
        ({"filters": 0}, ValueError, "filters: expected at least 1, got 0"),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
        ({"lr": -1.0}, ValueError, "lr: expected a positive"),
        (
            {"loss": "multi-similarity", "temperature": 0.1},
            ValueError,
            "temperature: expected none, as multi-similarity has no temperature, got 0.1",
        ),
        ({"proxy_lr": 1.0}, ValueError, "proxy_lr: expected none, as smooth-ap has no proxies, got 1.0"),
        ({"loss": "proxy-nca", "proxy_lr": 0.0}, ValueError, "proxy_lr: expected a positive"),
        ({"loss": "proxy-nca", "samples_per_class": 0}, ValueError, "samples_per_class: expected at least 1, got 0"),
        ({"device": "tpu"}, ValueError, "device: expected cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_are_named(changed: dict[str, Any], error: type, message: str, options: Build) -> None:
    with pytest.raises(error, match=message):
        options(**changed)
