"""Command line: ``python -m benchmarks list | run OP | table OP | plot OP | compare OP | floors | kernels``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import history, kernels, registry, report
from benchmarks.conditions import NOT_TIMED
from benchmarks.gpu import FLOORS, Floor, over_floor
from benchmarks.plot import plot
from benchmarks.registry import Op
from benchmarks.run import Options, Run, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory of fastret's ops.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="ops, sizes and variants")
    running = commands.add_parser("run", help="measure an op, save and print the figures")
    running.add_argument("--sizes", type=int, nargs="+", help="default: all of the op")
    running.add_argument("--variants", nargs="+", help="default: all of the op")
    running.add_argument("--budget", type=float, default=2.0, help="seconds of timing a variant and size (default 2)")
    running.add_argument("--no-memory", action="store_true", help="time only")
    running.add_argument("--no-save", action="store_true", help="print only")
    running.add_argument("--threads", type=int, help="default: torch's")
    running.add_argument("--output", type=Path, help="folder for the figures, in place of benchmarks/")
    running.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    for name, text in (
        ("table", "the latest run as a markdown table"),
        ("plot", "the latest run as a PNG"),
        ("compare", "the latest run against the commit before it"),
    ):
        commands.add_parser(name, help=text)
    for name, command in commands.choices.items():
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        if name != "list":
            command.add_argument("op", choices=registry.names())
            command.add_argument("--dtype", choices=registry.DTYPES, default="float32", help="of the inputs")
    floors = commands.add_parser("floors", help="on a GPU: tasks whose least time was counted, and what they take")
    floors.add_argument("--budget", type=float, default=0.5, help="seconds of timing a variant (default 0.5)")
    floors.add_argument("--slow", action="store_true", help="those instead that take many seconds to set up and check")
    by_kernel = commands.add_parser("kernels", help="on a GPU: the time of each kernel of those tasks")
    for command in (floors, by_kernel):
        command.add_argument("--output", type=Path, help="folder for a JSON of the figures")
    return parser


def _op(arguments: argparse.Namespace) -> Op:
    return registry.in_dtype(registry.load(arguments.op), registry.DTYPES[arguments.dtype])


def _run(arguments: argparse.Namespace) -> int:
    op = _op(arguments)
    _check_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    names = arguments.variants or [v.name for v in op.variants if v.missing(arguments.device) != NOT_TIMED]
    done = run(
        op,
        Options(
            sizes=tuple(arguments.sizes or op.sizes),
            variants=tuple(op.variant(name).name for name in names),
            budget=arguments.budget,
            memory=not arguments.no_memory,
            device=arguments.device,
            seed=arguments.seed,
        ),
    )
    if done.measurements:
        print(report.table(op, done.records()))
        if done.figures:
            print(f"\n{report.figures_text(done.figures)}")
        if arguments.output is not None:
            print(f"\nsaved: {_save(done, arguments.output)}", file=sys.stderr)
        elif not arguments.no_save:
            print(f"\nsaved: {history.HISTORY.name}, {history.RESULTS.name}/{done.save().name}", file=sys.stderr)
    return _print_refusals(done)


def _save(done: Run, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return done.save(folder / history.HISTORY.name, folder)


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no CUDA device here")


def _floors(arguments: argparse.Namespace) -> int:
    """Every task, from the quickest on: a line for each variant as soon as it is measured. FASTRET_GPU_TESTS=cpu tries
    this without a GPU: PyTorch's tiles, on small sizes beside the floors of the real ones."""
    small = not torch.cuda.is_available() and os.environ.get("FASTRET_GPU_TESTS") == "cpu"
    device = "cpu" if small else "cuda"
    _check_device(device)
    print("| task | variant | ms | counted floor | predicted, ms | measured / floor | peak MiB |")
    print("|---|---|---:|---:|---|---:|---:|")
    wrong = False
    for floor in FLOORS:
        if floor.slow != arguments.slow:
            continue
        op = floor.load(floor.small() if small else None)
        names = tuple(variant.name for variant in op.variants if not small or variant.name == "fastret-tiled")
        done = run(op, Options(op.sizes, names, budget=arguments.budget, device=device, memory=not small))
        print("\n".join(floor_lines(floor, done)), flush=True)
        if arguments.output is not None:
            _save(done, arguments.output)
        wrong |= bool(_print_refusals(done))
    return int(wrong)


def floor_lines(floor: Floor, done: Run) -> list[str]:
    """Of a table: a task's variants."""
    task = f"{done.op} {history.size_text(floor.size)}"
    counted = floor.note if floor.milliseconds is None else f"{floor.milliseconds:g} ms"
    return [
        f"| {task} | {m.variant} | {report.number(m.timing.median)} | {counted} | {floor.predicted()} "
        f"| {over_floor(m.timing.median, floor)} | {'-' if m.memory is None else report.mebibytes(m.memory.extra)} |"
        for m in done.measurements
    ]


def _kernels(arguments: argparse.Namespace) -> int:
    _check_device("cuda")
    found = [kernels.profile(floor) for floor in FLOORS if not floor.slow]
    print("\n".join(line for task in found for line in task.lines()))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "kernels.json").write_text(json.dumps([asdict(task) for task in found], indent=1) + "\n")
    return 0


def _print_refusals(done: Run) -> int:
    """Prints why figures are missing; 1 where a variant is wrong."""
    for refusal in done.refusals:
        where = f"{refusal.variant} at {history.size_text(refusal.size)}"
        print(f"not measured: {where}: {refusal.reason}", file=sys.stderr)
    return int(any(refusal.wrong for refusal in done.refusals))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0, 1 where a variant disagrees with the definition, 2 where the command cannot be run."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "list":
            print(report.listing(map(registry.load, registry.names()), arguments.device))
            return 0
        if arguments.command in ("run", "floors", "kernels"):
            return {"run": _run, "floors": _floors, "kernels": _kernels}[arguments.command](arguments)
        op = _op(arguments)
        on_cpu = arguments.device == "cpu"
        records = [record for record in history.read(op.name) if (record.device == "cpu") == on_cpu]
        if arguments.command == "plot":
            name = op.name.replace(" ", "-")
            path = history.RESULTS / (f"{name}.png" if on_cpu else f"{name}-{arguments.device}.png")
            plot(op, records, path)
            print(f"written: {history.RESULTS.name}/{path.name}")
        else:
            print({"table": report.table, "compare": report.compare}[arguments.command](op, records))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
