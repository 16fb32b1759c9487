"""One iteration of training after another, with a state that can be saved between any two of them.

Batches and network as the loss wants them, AdamW, a cosine schedule. The loss's forward and its gradients, with respect
to the embeddings and its own parameters, run on detached copies of what the network gave, so that its share of the time
is measured on every step and not estimated.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastret.training.batches import ClassBatches, ViewBatches
from fastret.training.evaluation import BATCH
from fastret.training.losses import LossSettings, NetworkSettings, training_loss
from fastret.training.options import TrainOptions
from fastret.training.sources import RetrievalData

# Parts with a state_dict of their own; they make up a checkpoint together with the history and the counters.
PARTS = ("model", "loss", "optimizer", "schedule", "batches")

# What it has done so far, in plain values.
COUNTERS = ("iteration", "seconds", "loss_seconds", "initialise_seconds", "test_seconds")


@dataclass(frozen=True)
class Point:
    """What a test found after so many epochs, a share."""

    epoch: int
    share: float


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU's generator from ``seed``: equal weights on every device, the caller's state kept."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


class Trainer:
    """A network in training.

    Args:
        data: the images to train on, the views that suit them, and those that tests are made with.
        options: the recipe; batch_classes is cut to the classes there are.

    Attributes:
        data: the images it trains on.
        model, loss: the network and the loss.
        iteration: steps done.
        history: loss of each step.
        curve: what tests found.
        seconds, loss_seconds: time spent in steps, and of that in the loss's forward and backward.
        initialise_seconds, test_seconds: time spent in ``initialise`` and in ``test``.
    """

    def __init__(self, data: RetrievalData, options: TrainOptions) -> None:
        self.data = data.train
        self.retrieval = data
        self.options = options
        recipe = training_loss(options.loss)
        with _seeded(options.seed):
            channels, height, width = self.data.images.shape[1:]
            shape = NetworkSettings(
                channels,
                height,
                width,
                options.seed,
                options.filters,
                options.patch_size,
                options.mix,
                options.momentum,
            )
            self.model = recipe.network(shape).to(options.device)
            self.settings = LossSettings(
                options.temperature,
                options.samples_per_class,
                options.impl,
                self.data.train_classes if recipe.labelled else len(self.data.images),
                self.model.width,
                options.bits,
                options.num_noise,
                options.momentum,
                options.mix,
            )
            self.loss = recipe.build(self.settings).to(options.device)
        groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if options.proxy_lr is not None:
            # No decay: the loss normalises proxies, so their length only sets how far a step turns them, and words lie
            # where rows do. Fused: a quarter of the time over 20,902 x 128, but other last bits, which the network's
            # weights keep.
            proxies = list(self.loss.parameters())
            groups.append({"params": proxies, "lr": options.proxy_lr, "weight_decay": 0.0, "fused": True})
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, options.iterations)
        drawn = (self.data, options.batch_classes, options.samples_per_class, options.seed)
        self.batches = ClassBatches(*drawn) if recipe.labelled else ViewBatches(*drawn, data.views)
        if options.mix is not None and self.batches.classes < 2 * options.mix - 1:
            raise ValueError(
                f"mix: expected at most {(self.batches.classes + 1) // 2}, as a batch needs 2 mix - 1 images and the "
                f"data has {len(self.data.images)}, got {options.mix}"
            )
        self.iteration = 0
        self.history: list[float] = []
        self.curve: list[Point] = []
        self.seconds = 0.0
        self.loss_seconds = 0.0
        self.initialise_seconds = 0.0
        self.test_seconds = 0.0

    @property
    def batch_rows(self) -> int:
        return self.batches.classes * self.options.samples_per_class

    @property
    def test_due(self) -> bool:
        """Whether the last step ended an epoch after which there is a test."""
        every = self.options.test_every
        return every is not None and self._epoch(self.iteration) // every > self._epoch(self.iteration - 1) // every

    def test(self) -> Point:
        """Add to the curve what the judge finds now."""
        start = self._now()
        find = training_loss(self.options.loss).judge.after_epoch
        assert find is not None
        share = find(self.model, self.loss, self.retrieval, self.options.device)
        self.curve.append(Point(self._epoch(self.iteration), share))
        self.test_seconds += self._now() - start
        return self.curve[-1]

    def initialise(self) -> None:
        """Fit the loss to the untrained network, where it has such a step; once, before the first iteration."""
        initialise = training_loss(self.options.loss).initialise
        if initialise is None:
            return
        start = self._now()
        images, labels = self.data.images.split(BATCH), self.data.labels.split(BATCH)
        with _seeded(self.options.seed):
            initialise(self.loss, self.model, list(zip(images, labels, strict=True)))
        self.initialise_seconds = self._now() - start

    def step(self) -> float:
        """Train on one batch and return its loss.

        Raises:
            ValueError: the loss is no longer finite.
        """
        start = self._now()
        images, labels = (part.to(self.options.device) for part in next(self.batches))
        given = self.model.arguments(images, labels)
        detached = [part.detach().requires_grad_(part.requires_grad) for part in given]

        loss_start = self._now()
        loss = self.loss(*detached)
        loss.backward()
        self.loss_seconds += self._now() - loss_start

        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"lr: the loss is {value} after {self.iteration} iterations; try a lower learning rate")
        learning = [(part, copy.grad) for part, copy in zip(given, detached, strict=True) if part.requires_grad]
        torch.autograd.backward([part for part, _ in learning], [gradient for _, gradient in learning])
        self.optimizer.step()
        self.model.after_step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.iteration += 1
        self.history.append(value)
        self.seconds += self._now() - start
        return value

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened: tensors and plain values only."""
        return {
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "history": list(self.history),
            "curve": [asdict(point) for point in self.curve],
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the trainer that gave ``state`` stood; it must have had the same data and options."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.history = list(state["history"])
        self.curve = [Point(**point) for point in state["curve"]]
        for name in COUNTERS:
            setattr(self, name, state[name])

    def _epoch(self, iterations: int) -> int:
        """Passes over the training images that so many iterations complete."""
        return iterations * self.batches.images // len(self.data.images)

    def _now(self) -> float:
        if self.options.device == "cuda":
            torch.cuda.synchronize()  # else it would be the time to enqueue the work
        return time.perf_counter()
