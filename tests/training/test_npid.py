"""NPID in training: where its memory starts, and which rows of it a step moves."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch.nn.functional import normalize

from fastret.losses import NPID
from fastret.training import TrainOptions
from fastret.training.evaluation import embed
from fastret.training.sources import open_data
from fastret.training.trainer import Trainer

Build = Callable[..., TrainOptions]


def _started(options: TrainOptions) -> tuple[Trainer, NPID]:
    trainer = Trainer(open_data(options.data), options)
    trainer.initialise()
    assert isinstance(trainer.loss, NPID)
    return trainer, trainer.loss


def test_memory_starts_at_the_untrained_networks_embeddings(options: Build) -> None:
    trainer, loss = _started(options(loss="npid", num_noise=50))
    images = trainer.data.images
    assert loss.bank.memory.shape == (160, 128)
    torch.testing.assert_close(loss.bank.memory, normalize(embed(trainer.model, images, "cpu")))
    # The BatchNorms knew the images by then: embeddings point in all directions.
    assert loss.bank.memory.mean(0).norm() < 0.2
    assert trainer.model.training
    assert (loss.num_noise, loss.temperature, loss.bank.momentum) == (50, 0.1, 0.5)


def test_a_step_moves_the_rows_of_its_images(options: Build) -> None:
    trainer, loss = _started(options(loss="npid", momentum=0.7))
    state = deepcopy(trainer.batches.state_dict())
    images, index = next(trainer.batches)
    trainer.batches.load_state_dict(state)
    before = loss.bank.memory.clone()
    x = normalize(deepcopy(trainer.model)(images).detach())
    assert torch.isnan(loss.Z)
    trainer.step()
    first_z = loss.Z
    torch.testing.assert_close(loss.bank.memory[index], normalize(0.7 * before[index] + 0.3 * x))
    others = torch.ones(160, dtype=torch.bool).index_fill_(0, index, False)
    assert torch.equal(loss.bank.memory[others], before[others])
    trainer.step()
    assert torch.equal(loss.Z, first_z)


def test_seeds_draw_other_noise(options: Build) -> None:
    draws = {int(_started(options(loss="npid", seed=seed))[1].draws) for seed in (0, 0, 1)}
    assert len(draws) == 2
