"""A run of an op: sizes one after the other; for each, check every variant, time those that pass, measure memory."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import history, memory, provenance, timing
from benchmarks.check import Agreement, Checker
from benchmarks.history import Record
from benchmarks.memory import Memory
from benchmarks.provenance import Provenance
from benchmarks.registry import Figures, Inputs, Op, Size, Variant
from benchmarks.timing import Timing

FLOOR = "floor"
OUT_OF_MEMORY = "out of the GPU's memory"


@dataclass(frozen=True)
class Options:
    """Attributes:
    sizes: values of the op's axis.
    variants: names.
    budget: seconds of timing a variant and size.
    memory: whether to measure it.
    device: "cpu" or "cuda".
    seed: of the inputs.
    """

    sizes: tuple[int, ...]
    variants: tuple[str, ...]
    budget: float = 2.0
    memory: bool = True
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """Figures of a variant that agrees with the definition; ``isa`` and ``gemm`` as in ``history.Record``."""

    variant: str
    size: Size
    agreement: Agreement
    timing: Timing
    floor: Timing
    memory: Memory | None
    isa: str
    gemm: str


@dataclass(frozen=True)
class Refusal:
    """Why a figure is missing.

    Attributes:
        wrong: the variant disagrees with the definition.
    """

    variant: str
    size: Size
    reason: str
    wrong: bool = False


@dataclass(frozen=True)
class Run:
    """Everything a run found, as it is saved.

    Attributes:
        load: of the machine in the minute before, in busy processors: what else slowed the figures.
        figures: of the op, by size.
    """

    op: str
    floor: str
    provenance: Provenance
    load: float
    options: Options
    measurements: list[Measurement]
    refusals: list[Refusal]
    figures: dict[str, Figures] = field(default_factory=dict)

    def records(self) -> list[Record]:
        """Lines of the history."""
        return [record for measurement in self.measurements for record in self._records(measurement)]

    def _records(self, m: Measurement) -> Iterator[Record]:
        line = partial(
            Record,
            op=self.op,
            variant=m.variant,
            size=history.size_text(m.size),
            isa=m.isa,
            gemm=m.gemm,
            **asdict(self.provenance),
        )
        t, floor = m.timing, m.floor.median
        yield line(metric=history.TIME, value=t.median, p20=t.p20, p80=t.p80, floor_ms=floor)
        yield line(metric=history.RATIO, value=t.median / floor, p20=t.p20 / floor, p80=t.p80 / floor, floor_ms=floor)
        if m.memory is not None:
            yield line(metric=history.PEAK, value=m.memory.extra, p20=None, p80=None, floor_ms=None)

    def save(self, path: Path = history.HISTORY, results: Path = history.RESULTS) -> Path:
        """Appends to the history and writes the whole run as JSON, whose path it returns."""
        history.append(self.records(), path)
        results.mkdir(exist_ok=True)
        date = self.provenance.date.replace(":", "")
        file = results / f"{date}-{self.provenance.commit}-{self.op.replace(' ', '-')}.json"
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return file


def run(op: Op, options: Options) -> Run:
    """Measures an op."""
    result = Run(op.name, op.floor_name, provenance.here(options.device), os.getloadavg()[0], options, [], [])
    if options.memory and (reason := memory.unsupported(options.device)) is not None:
        tqdm.write(f"no memory: {reason}")
    for value in options.sizes:
        _run_size(op, op.size(value), options, result)
    return result


def _run_size(op: Op, size: Size, options: Options, result: Run) -> None:
    inputs = op.inputs(size, options.seed, options.device)
    checker = Checker(op, inputs)
    agreements: dict[str, Agreement] = {}
    for variant in map(op.variant, options.variants):
        if (reason := variant.refusal(size, options.device)) is not None:
            result.refusals.append(Refusal(variant.name, size, reason))
            continue
        try:
            agreement = checker.check(variant)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            result.refusals.append(Refusal(variant.name, size, OUT_OF_MEMORY))
            continue
        if agreement.passed:
            agreements[variant.name] = agreement
        else:
            reason = f"wrong: loss off by {agreement.loss:.1e}, gradient by {agreement.gradient:.1e} of its norm"
            if not op.gradients:
                reason = f"wrong: off by {agreement.loss:.1e}"
            result.refusals.append(Refusal(variant.name, size, reason, wrong=True))
    if not agreements:
        return
    if figures := op.figures(inputs):
        result.figures[history.size_text(size)] = figures
    prepared = {name: op.variant(name).prepare(inputs) for name in agreements}
    for name in list(prepared):
        if options.device == "cuda" and not _fits(op, op.variant(name), prepared[name]):
            del prepared[name]
            result.refusals.append(Refusal(name, size, OUT_OF_MEMORY))
    variants = [op.variant(name) for name in prepared]
    calls = {v.name: partial(op.run, v, prepared[v.name]) for v in variants}
    timings = timing.measure(
        {FLOOR: op.floor(inputs), **calls},
        budget=options.budget,
        device=options.device,
        title=f"{op.name} {op.axis}={size[op.axis]}: time",
    )
    title = f"{op.name} {op.axis}={size[op.axis]}: memory"
    for variant in tqdm(variants, desc=title, leave=False, disable=not options.memory):
        with variant.setting():
            isa, gemm = provenance.kernels()
        result.measurements.append(
            Measurement(
                variant.name,
                size,
                agreements[variant.name],
                timings[variant.name],
                timings[FLOOR],
                _memory(op, variant, size, prepared[variant.name], options, result),
                isa,
                gemm,
            )
        )


def _fits(op: Op, variant: Variant, inputs: Inputs) -> bool:
    """Whether a call on all inputs, of which the check may have had a part, finds enough memory."""
    try:
        op.run(variant, inputs)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def _memory(op: Op, variant: Variant, size: Size, prepared: Inputs, options: Options, result: Run) -> Memory | None:
    if not options.memory or memory.unsupported(options.device) is not None:
        return None
    if options.device == "cuda":
        return memory.measure_inputs(op, variant, prepared, device=options.device)
    try:
        return memory.measure(
            op,
            variant,
            size,
            device=options.device,
            threads=result.provenance.threads,
            seed=options.seed,
        )
    except RuntimeError as error:  # the system ended a process that took too much; the times are still good
        result.refusals.append(Refusal(variant.name, size, str(error)))
        return None
