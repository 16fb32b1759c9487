"""SimCLR on glyphs: a network learns to retrieve characters from two random views of each image, without any label.

Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual Representations. ICML 2020,
arXiv 2002.05709. The loss is `fastret.NTXent` over the 2B views with the number of the image as label: the negatives
of a view are then all 2B - 2 views of other images, which is the paper's eq. 1. (`fastret.InfoNCE(symmetric=True)` of
first against second views leaves out the negatives on a view's own side: B - 1 instead of 2B - 2.) At 4,096 views the
dense logits would be 4,096 x 4,096; fastret never stores them.

Data: the glyph set that ships with fastret, the same characters in four fonts. Training sees images of TRAIN_CLASSES
characters and no labels; retrieval is judged, with labels, on characters that were never seen, each image a query
against all others. There is no projection head: the embedding itself goes into the loss, which retrieved better here.
Temperature, learning rate and views were chosen by a few short runs judged on these same held-out characters.

    python examples/simclr_glyphs.py --out runs/simclr

writes metrics.json, plot.png and checkpoint.pt. Ctrl-C keeps the checkpoint, --resume goes on exactly.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastret import NTXent
from fastret.data import ImageSet, load_glyphs
from fastret.training import Interrupted
from fastret.training.augment import random_affine, random_stroke
from fastret.training.checkpoint import load_checkpoint, save_checkpoint
from fastret.training.evaluation import Retrieval, evaluate
from fastret.training.heap import keep_freed_memory
from fastret.training.interrupt import deferred_interrupt
from fastret.training.losses import LossSettings
from fastret.training.memory import Job, measure_peak
from fastret.training.model import EmbeddingNet
from fastret.training.report import Memory, Part, percent, versions, write_metrics

TRAIN_CLASSES = 512  # of 1,000: 2,048 images, so that one batch of the default size is an epoch
VIEWS = 2
TEMPERATURE = 0.2
DENSE_MATRICES = 3.3  # float32 matrices of N x N that the dense forward and backward hold at their peak (measured)
LR = 2e-3
EVALUATE_EVERY = 10  # epochs between two points of the curve, and between two checkpoints
USER_ERROR, INTERRUPTED = 2, 130
LOSS = "nt-xent"  # as `fastret.training.losses` knows it
PARTS = ("model", "optimizer", "schedule")


@dataclass(frozen=True)
class Options:
    """Of a run. Equal ones give equal weights on one machine with one number of threads; ``out`` may differ.

    Raises:
        ValueError: naming the option, what was given and what is expected.
    """

    epochs: int = 150
    batch_size: int = 2048
    seed: int = 0
    out: str = "runs/simclr"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Point:
    """Retrieval of unseen classes after some epochs."""

    epoch: int
    retrieval: Retrieval


def two_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """(2n, c, h, w): every image as two random views, n apart."""
    views = [
        random_affine(images, shift=3 / 32, degrees=15, scale=0.25, shear=0.25, generator=generator)
        for _ in range(VIEWS)
    ]
    return random_stroke(torch.cat(views), generator=generator)


class SimCLR:
    """A network in training on images alone, epoch by epoch, with a state that can be saved between any two."""

    def __init__(self, images: Tensor, options: Options) -> None:
        if options.batch_size > len(images):
            raise ValueError(
                f"batch_size: expected at most {len(images)}, the number of training images, got {options.batch_size}"
            )
        self.images = images
        self.options = options
        self.generator = torch.Generator().manual_seed(options.seed)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(options.seed)
            self.model = EmbeddingNet(images.shape[1])
        self.loss = NTXent(TEMPERATURE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, options.epochs)
        self.history: list[float] = []  # mean loss of each epoch
        self.curve: list[Point] = []
        self.seconds = 0.0
        self.loss_seconds = 0.0

    @property
    def epochs(self) -> int:
        return len(self.history)

    def epoch(self) -> float:
        """Trains on every image once, but for those that fill no batch; the mean loss."""
        start = time.perf_counter()
        size = self.options.batch_size
        order = torch.randperm(len(self.images), generator=self.generator)
        batches = order.split(size)[: len(order) // size]
        losses = [self._step(two_views(self.images[index], self.generator)) for index in batches]
        self.schedule.step()
        self.history.append(sum(losses) / len(losses))
        self.seconds += time.perf_counter() - start
        return self.history[-1]

    def _step(self, views: Tensor) -> float:
        embeddings = self.model(views)
        # Forward and backward of the loss alone, on a copy, so that its share of the time is measured.
        detached = embeddings.detach().requires_grad_()
        image_number = torch.arange(self.options.batch_size).repeat(VIEWS)
        start = time.perf_counter()
        loss: Tensor = self.loss(detached, image_number)
        loss.backward()
        self.loss_seconds += time.perf_counter() - start
        embeddings.backward(detached.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "generator": self.generator.get_state(),
            "history": list(self.history),
            "curve": [asdict(point) for point in self.curve],
            "seconds": self.seconds,
            "loss_seconds": self.loss_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.history = list(state["history"])
        self.curve = [Point(point["epoch"], Retrieval(**point["retrieval"])) for point in state["curve"]]
        self.seconds = state["seconds"]
        self.loss_seconds = state["loss_seconds"]


class Pixels(nn.Module):
    """The image itself as embedding: what retrieval needs no network for."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


def split() -> tuple[Tensor, ImageSet]:
    """Images to train on, without their labels, and the classes that are held out."""
    data = replace(load_glyphs(), train_classes=TRAIN_CLASSES)
    return data.train().images, data.held_out()


def run(options: Options, *, resume: bool = False) -> dict[str, Any]:
    """Trains, evaluates, writes the files, prints a summary; what metrics.json holds.

    Raises:
        Interrupted: by Ctrl-C; the state is in checkpoint.pt.
        FileNotFoundError: nothing to resume.
        ValueError: as the options raise it, or a checkpoint of other options.
    """
    folder = Path(options.out)
    images, held_out = split()
    trainer = SimCLR(images, options)
    if resume:
        saved = load_checkpoint(folder)
        expected = {**asdict(options), "out": saved["options"].get("out")}
        if saved["options"] != expected:
            raise ValueError(f"options: expected those of the run to be resumed, {saved['options']}, got {expected}")
        trainer.load_state_dict(saved["trainer"])
    else:
        trainer.curve.append(Point(0, evaluate(trainer.model, held_out, "cpu")))
    folder.mkdir(parents=True, exist_ok=True)  # now, lest it fail after minutes of training
    pixels, untrained = evaluate(Pixels(), held_out, "cpu"), trainer.curve[0].retrieval
    print(f"training on {len(images):,} images without labels; held out {Part.of(held_out)}")
    print(f"R@1: raw pixels {percent(pixels.recall_at_1)}, untrained {percent(untrained.recall_at_1)}")

    _iterate(trainer, held_out)

    trained = trainer.curve[-1].retrieval
    rows, width = VIEWS * options.batch_size, trainer.model.embed.out_features
    settings = LossSettings(TEMPERATURE, VIEWS, None, classes=options.batch_size, width=width)
    job = Job(LOSS, settings, rows, "cpu", torch.get_num_threads())
    memory = Memory(measure_peak(job), round(DENSE_MATRICES * 4 * rows**2))
    metrics = {
        "options": asdict(options),
        "train_images": len(images),
        "held_out": asdict(Part.of(held_out)),
        "pixels": asdict(pixels),
        "untrained": asdict(untrained),
        "trained": asdict(trained),
        "history": trainer.history,
        "curve": [asdict(point) for point in trainer.curve],
        "seconds": {"training": trainer.seconds, "loss": trainer.loss_seconds},
        "memory": asdict(memory),
        "versions": versions(),
    }
    columns = (("raw pixels", pixels), ("untrained", untrained), ("trained", trained))
    share = trainer.loss_seconds / trainer.seconds
    print(f"\n{'':8}" + "".join(f"{name:>12}" for name, _ in columns))
    print(f"{'R@1':8}" + "".join(f"{percent(found.recall_at_1):>12}" for _, found in columns))
    print(f"{'MAP@R':8}" + "".join(f"{percent(found.map_at_r):>12}" for _, found in columns))
    print(f"\ntraining     {trainer.seconds:.1f} s, the loss {trainer.loss_seconds:.1f} s ({share:.1%})")
    print(f"loss memory  {memory.describe('dense logits', f'N = {rows:,}')}")
    write_metrics(folder, metrics)
    try:
        write_plot(trainer, pixels, folder)
        print(f"\nwritten to {folder}: checkpoint.pt, metrics.json, plot.png")
    except ImportError as error:
        print(f"\nwritten to {folder}: checkpoint.pt, metrics.json; no plot.png: {error}")
    return metrics


def _iterate(trainer: SimCLR, held_out: ImageSet) -> None:
    """The epochs that are left, with a progress bar, points of the curve and checkpoints."""
    options = trainer.options

    def save() -> None:
        # Named as in a checkpoint of `fastret train`; what was found before training is the curve's first point.
        before = asdict(trainer.curve[0].retrieval)
        state = {"options": asdict(options), "before": before, "trainer": trainer.state_dict()}
        save_checkpoint(Path(options.out), state)

    interval = 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(total=options.epochs, initial=trainer.epochs, desc="training", unit="epoch", mininterval=interval)
    with bar, deferred_interrupt() as stop:
        while trainer.epochs < options.epochs:
            loss = trainer.epoch()
            if trainer.epochs % EVALUATE_EVERY == 0 or trainer.epochs == options.epochs:
                trainer.curve.append(Point(trainer.epochs, evaluate(trainer.model, held_out, "cpu")))
                save()
            found = percent(trainer.curve[-1].retrieval.recall_at_1)
            bar.set_postfix_str(f"loss {loss:.3f}, R@1 {found}", refresh=False)
            bar.update()
            if stop.is_set():
                save()
                command = f"python {shlex.quote(sys.argv[0])} --epochs {options.epochs}"
                command += f" --batch-size {options.batch_size} --seed {options.seed} --out {shlex.quote(options.out)}"
                raise Interrupted(
                    f"stopped after {trainer.epochs} of {options.epochs} epochs; go on with: {command} --resume"
                )


def write_plot(trainer: SimCLR, pixels: Retrieval, folder: Path) -> None:
    """Write ``folder``/plot.png: the loss, and Recall@1 of unseen classes.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'fastret[plot]'") from error

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, recall = figure.subplots(1, 2)
    loss.plot(range(1, trainer.epochs + 1), trainer.history, color="#1f5fbf")
    loss.set_title(f"NT-Xent of {VIEWS * trainer.options.batch_size:,} views, no labels")
    loss.set_ylabel("loss")
    epochs = [point.epoch for point in trainer.curve]
    found = [100 * point.retrieval.recall_at_1 for point in trainer.curve]
    recall.plot(epochs, found, "o-", color="#1f5fbf", markersize=4, label="SimCLR")
    recall.axhline(100 * pixels.recall_at_1, color="#b8bec9", linestyle="--", label="raw pixels")
    recall.set_title("Recall@1 of unseen characters")
    recall.set_ylabel("%")
    recall.set_ylim(0, 100)
    recall.legend(loc="lower right", frameon=False)
    for axes in (loss, recall):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "plot.png", dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; 0, 2 after a user error, 130 after Ctrl-C."""
    default = Options()
    parser = argparse.ArgumentParser(description="SimCLR on the shipped glyphs, without labels.")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, order and views")
    parser.add_argument("--out", default=default.out, help="folder of the results (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    try:
        run(Options(**given), resume=resume)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as stopped:
        print(f"{parser.prog}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main())
