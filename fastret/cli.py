"""The command line: ``fastret info``, ``fastret train``, ``fastret eval``, ``fastret tune``, ``fastret bench``."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

import fastret
from fastret.backends.registry import AUTO, IMPLEMENTATIONS
from fastret.ops.checks import check_count
from fastret.retrieval.evaluate import DEFAULT_KS, DEFAULT_METRICS, METRICS, evaluate, load_labels, load_rows
from fastret.training import TrainOptions, train
from fastret.training.checkpoint import load_checkpoint
from fastret.training.heap import keep_freed_memory
from fastret.training.losses import LOSSES, Recipe
from fastret.training.options import unlike_saved
from fastret.training.sources import SOURCES
from fastret.training.spq import BITS
from fastret.tune import DTYPES, KINDS, tune_here

USER_ERROR = 2
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended

DEFAULT = {field.name: field.default for field in fields(TrainOptions)}
BY_LOSS = {field.name for field in fields(Recipe)}


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as every other user error is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(message))


def _fail(message: object) -> int:
    print("fastret: error:", " ".join(str(message).split()), file=sys.stderr)
    return USER_ERROR


def _parser() -> _Parser:
    parser = _Parser(prog="fastret", description="Image-retrieval losses without their huge tensors.")
    parser.add_argument("--version", action="version", version=f"fastret {fastret.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | train | eval | tune | bench")
    commands.add_parser("info", help="print versions, devices and what serves each op")
    _add_train(commands.add_parser("train", help="train a small network and evaluate it on unseen classes"))
    _add_eval(commands.add_parser("eval", help="retrieval metrics of embeddings in .npy files"))
    _add_tune(commands.add_parser("tune", help="measure the Triton kernels on this GPU and keep what is fastest"))
    commands.add_parser("bench", help="run the benchmarks of a checkout; takes their options", add_help=False)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **settings: Any) -> None:
        # Left out of the result unless given, so that --resume knows what the user asked for.
        default = DEFAULT[name]
        if name in BY_LOSS:
            of = {loss: getattr(entry.recipe, name) for loss, entry in LOSSES.items()}
            usual = of.pop(TrainOptions.loss)
            others = ", ".join(f"{value} with {loss}" for loss, value in of.items() if value not in (None, usual))
            default = "; ".join(str(part) for part in (usual, others) if part)
        text = text if default is None else f"{text} (default: {default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **settings)

    named = ", ".join(SOURCES)
    add("data", f"{named}, a directory with one folder of images a class, or an .npz of scripts/render_glyphs.py")
    add("loss", "the loss", choices=LOSSES)
    add("output", "folder for checkpoint.pt, metrics.json and plot.png; an older run in it is replaced")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the output folder, with its options"
    )
    add("iterations", "batches to train on", type=int)
    add("batch_classes", "classes of a batch; all there are where the data has fewer; images without labels", type=int)
    add("samples_per_class", "images of each class in a batch; views of each image without labels", type=int)
    add("temperature", "temperature of the loss", type=float)
    add("filters", "channels of the network's first block, a quarter of the last one's", type=int)
    add("lr", "AdamW's learning rate at the start of a cosine schedule", type=float)
    add("proxy_lr", "the same of the loss's own parameters, its proxies or words", type=float)
    add("bits", "bits of an image's code", type=int, choices=BITS)
    add("num_noise", "images that each image is told from", type=int)
    add("momentum", "share of what was there before, in the memory of an image or the key network", type=float)
    add("mix", "images of which patches make a mixed one", type=int)
    add("patch_size", "side of a patch in pixels, a divisor of the image's sides", type=int)
    add("test_every", "epochs between two tests", type=int)
    add("seed", "seed of weights, batches and augmentation", type=int)
    add("checkpoint_every", "iterations between two checkpoints", type=int)
    add("threads", "CPU threads (default: as PyTorch has it)", type=int)
    add("impl", "implementation of the loss (default: the fastest)", choices=(AUTO, *IMPLEMENTATIONS))
    add("device", "device", choices=("cpu", "cuda"))


def _add_eval(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **settings: Any) -> None:
        parser.add_argument(name, help=text, **settings)

    add("embeddings", "rows, one a query: .npy of (N, D) float16, float32 or float64", type=Path)
    add("labels", ".npy of (N,) integers", type=Path)
    add("--gallery", "rows to search (default: the queries, each left out of its own result)", type=Path)
    add("--gallery-labels", "their labels", type=Path)
    add("--metrics", f"default: {' '.join(DEFAULT_METRICS)}", nargs="+", choices=METRICS, default=DEFAULT_METRICS)
    known = " ".join(map(str, DEFAULT_KS))
    add("--ks", f"recall at so many neighbours (default: {known}, as far as the gallery goes)", nargs="+", type=int)
    add("--output", "a .json to write the metrics to", type=Path)
    add("--threads", "CPU threads (default: as PyTorch has it)", type=int)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = "Takes many minutes: every configuration is compiled. Nothing but speed changes by it."
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of the rows (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="of kernels (default: all, and implementations)")


def _eval(arguments: argparse.Namespace) -> int:
    check_count(arguments.threads, "threads")
    if (arguments.gallery is None) != (arguments.gallery_labels is None):
        raise ValueError("gallery, gallery_labels: expected both or neither")
    if arguments.output is not None and (arguments.output.is_dir() or not arguments.output.parent.is_dir()):
        raise ValueError(f"output: expected a file in a directory that exists, got {arguments.output}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    own_gallery = arguments.gallery is not None
    found = evaluate(
        load_rows(arguments.embeddings, "embeddings"),
        load_labels(arguments.labels, "labels"),
        metrics=arguments.metrics,
        ks=arguments.ks,
        gallery=load_rows(arguments.gallery, "gallery") if own_gallery else None,
        gallery_labels=load_labels(arguments.gallery_labels, "gallery_labels") if own_gallery else None,
    )
    print(found)
    if arguments.output is not None:
        found.write(arguments.output)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULT}
    if arguments.resume:
        saved = load_checkpoint(Path(given.get("output", TrainOptions.output)))["options"]
        if given.get("loss", saved["loss"]) != saved["loss"]:
            # before the saved options, which the other loss may not have, are said not to fit it
            raise unlike_saved("loss", saved["loss"], given["loss"])
        given = {**saved, **given}
    options = TrainOptions(**given)
    keep_freed_memory()
    train(options, resume=arguments.resume)
    return 0


def _bench(options: Sequence[str]) -> int:
    for root in (Path.cwd(), Path(fastret.__file__).parents[1]):
        if (root / "benchmarks" / "__main__.py").is_file() and (root / "fastret" / "__init__.py").is_file():
            return subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=root, check=False).returncode
    return _fail("the benchmarks are not installed with fastret; run this in a checkout of its repository")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after a user error, 130 after Ctrl-C.

    Args:
        argv: the arguments; None: those of the process.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        if arguments.command == "train":
            return _train(arguments)
        if arguments.command == "eval":
            return _eval(arguments)
        if arguments.command == "tune":
            print(tune_here(arguments.dtypes, arguments.kinds))
            return 0
        if arguments.command == "bench":
            return _bench(rest)
        print(fastret.env_report())
        return 0
    # What fastret raises about arguments, data and files says what to change; a traceback would bury it.
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error)
    except KeyboardInterrupt as stopped:
        print(f"fastret: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
