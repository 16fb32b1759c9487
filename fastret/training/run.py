"""A whole training run: data, iterations with checkpoints, evaluation on unseen images, files and summary."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from fastret.training.checkpoint import load_checkpoint, save_checkpoint
from fastret.training.evaluation import Scores
from fastret.training.interrupt import Interrupted, deferred_interrupt
from fastret.training.losses import training_loss
from fastret.training.memory import Job, measure_peak
from fastret.training.options import TrainOptions
from fastret.training.plot import write_plot
from fastret.training.report import Memory, Part, Report, Seconds, percent
from fastret.training.sources import open_data
from fastret.training.trainer import Point, Trainer


def train(options: TrainOptions, *, resume: bool = False, say: Callable[[str], None] = print) -> Report:
    """Train a network, evaluate it on images it never saw, and write checkpoint.pt, metrics.json and plot.png.

    The same options give the same weights, bit for bit, on the CPU of one machine with the same number of threads,
    whether or not the run was interrupted and resumed.

    Args:
        options: the recipe and where to write; an older run in that folder is replaced.
        resume: go on with the run in that folder instead.
        say: is given the lines to print.

    Raises:
        Interrupted: by Ctrl-C; the state is in checkpoint.pt.
        FileNotFoundError: nothing to resume.
        TypeError, ValueError, ImportError: as the options, the data and the loss raise them.
    """
    folder = options.folder()
    state = load_checkpoint(folder) if resume else None
    if state is not None:
        options.check_continues(state["options"])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data, loss = open_data(options.data), training_loss(options.loss)
    folder.mkdir(parents=True, exist_ok=True)  # now, lest it fail after minutes of training
    trainer = Trainer(data, options)
    gallery = None if data.gallery is None else Part.of(data.gallery)
    searched = "" if gallery is None else f", searched among {gallery}"
    say(f"{options.data}: training on {Part.of(trainer.data)}; held out {Part.of(data.queries)}{searched}")
    yardsticks = loss.judge.yardsticks(data, options.bits)
    if state is None:
        trainer.initialise()
        before = loss.judge.evaluate(trainer.model, trainer.loss, data, options.device)
    else:
        before = loss.judge.scores(**state["before"])
        trainer.load_state_dict(state["trainer"])
        say(f"resumed after {trainer.iteration} of {options.iterations} iterations")
    say(f"untrained: {', '.join(f'{name} {percent(share)}' for name, share in before.named().items())}")

    _iterate(trainer, before, say)

    rows, settings = trainer.batch_rows, trainer.settings
    job = Job(options.loss, settings, rows, options.device, torch.get_num_threads())
    official_bytes = loss.official_bytes(rows, settings)
    report = Report(
        options=options,
        train=Part.of(trainer.data),
        held_out=Part.of(data.queries),
        gallery=gallery,
        batch_classes=trainer.batches.classes,
        yardsticks=yardsticks,
        before=before,
        after=loss.judge.evaluate(trainer.model, trainer.loss, data, options.device),
        history=trainer.history,
        curve=[Point(0, before.first()), *trainer.curve] if trainer.curve else [],
        width=settings.width,
        seconds=Seconds(trainer.seconds, trainer.loss_seconds, trainer.initialise_seconds, trainer.test_seconds),
        memory=Memory(measure_peak(job), official_bytes),
    )
    say(f"\n{report.table()}\n")
    report.write(folder)
    try:
        write_plot(report, folder)
        say(f"written to {folder}: checkpoint.pt, metrics.json, plot.png")
    except ImportError as error:
        say(f"written to {folder}: checkpoint.pt, metrics.json; no plot.png: {error}")
    return report


def _iterate(trainer: Trainer, before: Scores, say: Callable[[str], None]) -> None:
    """The iterations that are left, with a progress bar, tests and checkpoints."""
    options = trainer.options

    def save() -> None:
        state: dict[str, Any] = {"options": asdict(options), "before": asdict(before), "trainer": trainer.state_dict()}
        save_checkpoint(options.folder(), state)

    from tqdm import tqdm

    # A log is spared the many redraws of a terminal.
    bar = tqdm(
        total=options.iterations,
        initial=trainer.iteration,
        desc="training",
        unit="batch",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    with bar, deferred_interrupt() as stop:
        while trainer.iteration < options.iterations:
            loss = trainer.step()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            if trainer.test_due:
                point = trainer.test()
                with bar.external_write_mode():
                    say(f"epoch {point.epoch:,}: loss {loss:.4f}, {next(iter(before.named()))} {percent(point.share)}")
            if stop.is_set():
                save()
                raise Interrupted(
                    f"stopped after {trainer.iteration} of {options.iterations} iterations; "
                    f"go on with: fastret train --output {shlex.quote(options.output)} --resume"
                )
            if trainer.iteration % options.checkpoint_every == 0 or trainer.iteration == options.iterations:
                save()
