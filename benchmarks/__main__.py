"""Command line: ``python -m benchmarks list | run OP | table OP | plot OP | compare OP``."""

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import history, registry, report
from benchmarks.plot import plot
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
    return parser


def _run(arguments: argparse.Namespace) -> int:
    op = registry.load(arguments.op)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    names = arguments.variants or [variant.name for variant in op.variants]
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
        if not arguments.no_save:
            print(f"\nsaved: {history.HISTORY.name}, {history.RESULTS.name}/{done.save().name}", file=sys.stderr)
    return _print_refusals(done)


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
        if arguments.command == "run":
            return _run(arguments)
        op = registry.load(arguments.op)
        on_cpu = arguments.device == "cpu"
        records = [record for record in history.read(op.name) if (record.device == "cpu") == on_cpu]
        if arguments.command == "plot":
            path = history.RESULTS / (f"{op.name}.png" if on_cpu else f"{op.name}-{arguments.device}.png")
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
