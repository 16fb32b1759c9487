"""Training with class proxies: their start at the class means, their learning rate, one image a class; cached sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastret.data.glyphs import rendered_file
from fastret.training import TrainOptions, train
from fastret.training.evaluation import embed
from fastret.training.losses import LOSSES
from fastret.training.sources import RetrievalData, open_data
from fastret.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_memory_process")
Build = Callable[..., TrainOptions]


def _silent(line: str) -> None:
    pass


@pytest.fixture
def proxy_options(options: Build) -> Build:
    """Options of a short run with proxies."""

    def build(**changed: Any) -> TrainOptions:
        return options(**{"loss": "proxy-nca", "batch_classes": 40, **changed})

    return build


def _data(options: TrainOptions) -> RetrievalData:
    return open_data(options.data)


def test_options_left_out_are_the_recipe_of_the_loss() -> None:
    for name, loss in LOSSES.items():
        chosen = TrainOptions(loss=name)
        assert {key: getattr(chosen, key) for key in vars(loss.recipe)} == vars(loss.recipe)
        assert TrainOptions(loss=name, iterations=7, lr=0.5).iterations == 7
        assert TrainOptions(loss=name, iterations=7, lr=0.5).batch_classes == loss.recipe.batch_classes


def test_learns_to_retrieve_unseen_classes(proxy_options: Build) -> None:
    """From one image of each class a batch; the recipe is in metrics.json as the run had it."""
    chosen = proxy_options(iterations=40)
    lines: list[str] = []
    report = train(chosen, say=lines.append)
    assert report.after.map_at_r > report.before.map_at_r + 0.1
    assert report.after.recall_at_1 > report.before.recall_at_1 + 0.1
    assert report.history[-1] < report.history[0] / 2
    assert report.seconds.initialising > 0
    assert report.memory.official_bytes == round(6.4 * 4 * 80**2)
    metrics = json.loads((chosen.folder() / "metrics.json").read_text())
    recipe = LOSSES["proxy-nca"].recipe
    assert metrics["options"]["samples_per_class"] == recipe.samples_per_class == 1
    assert metrics["options"]["proxy_lr"] == recipe.proxy_lr
    assert "(B + C) x (B + C) matrices need 164 kB at B = 40, C = 40" in "\n".join(lines)


def test_class_means_beat_random_proxies(proxy_options: Build) -> None:
    chosen = proxy_options(iterations=10, filters=16, lr=2e-3, proxy_lr=2e-3)
    from_means, from_random = Trainer(_data(chosen), chosen), Trainer(_data(chosen), chosen)
    from_means.initialise()
    losses = [(from_means.step(), from_random.step()) for _ in range(chosen.iterations)]
    assert all(mean < random - 0.5 for mean, random in losses)


def test_proxies_start_at_the_class_means_of_the_untrained_network(proxy_options: Build) -> None:
    chosen = proxy_options()
    trainer = Trainer(_data(chosen), chosen)
    assert trainer.model.embed.in_features == 16 * 4 * LOSSES["proxy-nca"].recipe.filters
    state = torch.get_rng_state()
    trainer.initialise()
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
    embeddings = torch.nn.functional.normalize(embed(trainer.model, trainer.data.images, "cpu"))
    means = embeddings.view(40, 4, -1).mean(1) - embeddings.mean(0)
    torch.testing.assert_close(trainer.loss.proxies.detach(), torch.nn.functional.normalize(means))


def test_proxies_have_a_learning_rate_of_their_own(proxy_options: Build) -> None:
    slow, fast = (Trainer(_data(chosen), chosen) for chosen in (proxy_options(proxy_lr=lr) for lr in (1e-4, 1e-1)))
    moved = []
    for trainer in (slow, fast):
        before = trainer.loss.proxies.detach().clone()
        trainer.step()
        moved.append(float((trainer.loss.proxies.detach() - before).norm()))
    assert moved[1] > 100 * moved[0]
    assert all(map(torch.equal, slow.model.parameters(), fast.model.parameters()))


def test_proxies_do_not_decay(proxy_options: Build) -> None:
    chosen = proxy_options(proxy_lr=1e-1)
    trainer = Trainer(_data(chosen), chosen)
    before = trainer.loss.proxies.detach().clone()
    trainer.loss.proxies.grad = torch.zeros_like(before)
    trainer.optimizer.step()
    assert torch.equal(trainer.loss.proxies.detach(), before)


@pytest.mark.parametrize("samples", [1, 3])
def test_batches_are_cut_to_the_classes_there_are(samples: int, proxy_options: Build) -> None:
    report = train(proxy_options(batch_classes=128, samples_per_class=samples, iterations=1), say=_silent)
    assert report.batch_classes == 40


def test_rendered_sets_are_found_in_the_cache(
    glyph_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scripts/render_glyphs.py leaves them; without the file the message is a command."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, rendered in (("cjk", "l"), ("glyphs-s", "s")):
        with pytest.raises(ValueError, match=rf"data: {name} is not at .*python scripts/render_glyphs\.py {rendered} "):
            open_data(name)
        assert rendered_file(rendered) == tmp_path / "fastret" / f"glyphs_{rendered}.npz"
        rendered_file(rendered).parent.mkdir(exist_ok=True)
        rendered_file(rendered).write_bytes(glyph_file.read_bytes())
        assert open_data(name).train.train_classes == 40


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert rendered_file("l") == Path.home() / ".cache" / "fastret" / "glyphs_l.npz"
