"""One iteration of training after another, with a state that can be saved between any two of them.

Recipe: class-balanced batches, each image shifted at random, AdamW, a cosine schedule. The loss's forward and its
gradient with respect to the embeddings run on a detached copy of them, so that its share of the time is measured on
every step and not estimated.
"""

import math
import time
from typing import Any

import torch

from fastret.data import ClassBalancedBatches, ImageSet
from fastret.training.augment import random_shift
from fastret.training.losses import LossSettings, training_loss
from fastret.training.model import EmbeddingNet
from fastret.training.options import TrainOptions

SHIFT = 2  # pixels

# Parts with a state_dict of their own; they make up a checkpoint together with the generator and the counters.
PARTS = ("model", "loss", "optimizer", "schedule", "batches")


class Trainer:
    """A network in training.

    Args:
        data: the images to train on.
        options: the recipe; batch_classes is cut to the classes of ``data``.

    Attributes:
        model, loss: the network and the loss.
        iteration: steps done.
        history: loss of each step.
        seconds, loss_seconds: time spent in steps, and of that in the loss's forward and backward.
    """

    def __init__(self, data: ImageSet, options: TrainOptions) -> None:
        self.data = data
        self.options = options
        self.settings = LossSettings(options.temperature, options.samples_per_class, options.impl)
        # Drawn on the CPU from a generator of its own: equal weights on every device, the caller's random state kept.
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(options.seed)
            self.model = EmbeddingNet(data.images.shape[1]).to(options.device)
            self.loss = training_loss(options.loss).build(self.settings).to(options.device)
        parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=options.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, options.iterations)
        self.batches = ClassBalancedBatches(
            data.labels,
            min(options.batch_classes, data.train_classes),
            options.samples_per_class,
            generator=torch.Generator().manual_seed(options.seed),
        )
        self.shifts = torch.Generator().manual_seed(options.seed)
        self.iteration = 0
        self.history: list[float] = []
        self.seconds = 0.0
        self.loss_seconds = 0.0

    @property
    def batch_rows(self) -> int:
        return self.batches.classes_per_batch * self.batches.samples_per_class

    def step(self) -> float:
        """Train on one batch and return its loss.

        Raises:
            ValueError: the loss is no longer finite.
        """
        start = self._now()
        index = next(self.batches)
        images = random_shift(self.data.images[index], SHIFT, generator=self.shifts).to(self.options.device)
        labels = self.data.labels[index].to(self.options.device)
        embeddings = self.model(images)
        detached = embeddings.detach().requires_grad_()

        loss_start = self._now()
        loss = self.loss(detached, labels)
        loss.backward()
        self.loss_seconds += self._now() - loss_start

        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"lr: the loss is {value} after {self.iteration} iterations; try a lower learning rate")
        embeddings.backward(detached.grad)
        self.optimizer.step()
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
            "shifts": self.shifts.get_state(),
            "iteration": self.iteration,
            "history": list(self.history),
            "seconds": self.seconds,
            "loss_seconds": self.loss_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the trainer that gave ``state`` stood; it must have had the same data and options."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.shifts.set_state(state["shifts"])
        self.iteration = state["iteration"]
        self.history = list(state["history"])
        self.seconds = state["seconds"]
        self.loss_seconds = state["loss_seconds"]

    def _now(self) -> float:
        if self.options.device == "cuda":
            torch.cuda.synchronize()  # else it would be the time to enqueue the work
        return time.perf_counter()
