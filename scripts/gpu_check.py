"""What scripts/gpu_check.sh runs: steps with a time limit each, a short table, and one JSON of all they found.

    python scripts/gpu_check.py [--part tests|bench|sanitize] [--output FOLDER] [--dry-run]

Every step is a process under ``timeout``, so that one that hangs costs its own time alone; what a step has written by
then still counts. The limits of all steps together are below 9 minutes; a part that runs alone has more for each.
fastret runs from this checkout, which is put on PYTHONPATH: nothing is installed. Needs no package but those that
fastret's build, tests and benchmarks need; where compute-sanitizer is missing, that step is skipped, and this is said.

FASTRET_GPU_TESTS=cpu tries the script without a GPU: the tests run small on the CPU, the other parts end in refusals.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "bench", "sanitize")
TOTAL = 9 * 60  # seconds
KILL_AFTER = 10  # seconds from the end of a limit, when pytest writes what it knows, to the signal that ends it

# Small, and with a kernel of every kind, forward and backward.
SANITIZED = "SmoothAP or masked_lse or pair_dot or SoftPQ or sampled_dot or topk or patchmix"
VERSIONS = ("torch", "triton", "numpy", "pytest", "pybind11", "ninja", "pytorch-metric-learning")


@dataclass(frozen=True)
class Step:
    """A process.

    Attributes:
        name: as in the table.
        part: of which it is; "build" comes before every part.
        limit: seconds it may take when all parts run. None: it runs only where its part runs alone.
        alone: seconds it may take then.
        command: what is run; {out} stands for the folder of results.
        results: a file in that folder, by the kind of what it holds.
        needs: a program that has to be there.
    """

    name: str
    part: str
    limit: int | None
    alone: int
    command: tuple[str, ...]
    results: str = ""
    needs: str = ""

    def shell(self, seconds: int, out: Path) -> list[str]:
        """The process as it is started."""
        limited = (
            ["timeout", "--signal=INT", f"--kill-after={KILL_AFTER}", str(seconds)] if shutil.which("timeout") else []
        )
        return [*limited, *(word.replace("{out}", str(out)) for word in self.command)]


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _pytest(name: str, *arguments: str, spread: bool = False) -> tuple[str, ...]:
    several = ("-n", "8") if spread and importlib.util.find_spec("xdist") else ()
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={{out}}/{name}.xml", *several)
    return _python("-m", "pytest", *options, *arguments)


def _bench(*arguments: str) -> tuple[str, ...]:
    return _python("-m", "benchmarks", *arguments, "--output", "{out}")


def _sanitized(tool: str) -> tuple[str, ...]:
    options = (f"--log-file={{out}}/{tool}.log", "--error-exitcode=17", "--launch-timeout=60")
    entries = ("tests/gpu/test_every_entry.py", "-k", f"test_values_and_gradients and ({SANITIZED}) and bf16")
    separately = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")  # from a shared block, a tensor's neighbour could be read
    return (*separately, "compute-sanitizer", f"--tool={tool}", *options, *_pytest(tool, *entries))


def steps() -> list[Step]:
    """All there are, what is quick and what others rely on first."""
    triton = sorted(f"tests/backends/{file.name}" for file in (ROOT / "tests/backends").glob("test_triton_*.py"))
    large = _pytest("scale", "-m", "gpu", "tests/gpu/test_scale.py")
    return [
        Step("build", "build", 75, 240, _python("setup.py", "-q", "build_ext", "--inplace")),
        Step(
            "tests: every op and loss",
            "tests",
            140,
            200,
            _pytest("entries", "-m", "gpu", "tests/gpu/test_every_entry.py", spread=True),
            "entries.xml",
        ),
        Step("tests: large sizes", "tests", 70, 120, large, "scale.xml"),
        Step("tests: kernels", "tests", None, 200, _pytest("kernels", *triton, spread=True), "kernels.xml"),
        Step("time of kernels", "bench", 40, 100, _bench("kernels"), "kernels.json"),
        Step("floors", "bench", 100, 300, _bench("floors"), "*.json"),
        Step("floors of searches", "bench", None, 180, _bench("floors", "--slow"), "*.json"),
        Step("memcheck", "sanitize", 50, 240, _sanitized("memcheck"), "memcheck.log", "compute-sanitizer"),
        Step("racecheck", "sanitize", 50, 240, _sanitized("racecheck"), "racecheck.log", "compute-sanitizer"),
    ]


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        status: "ok", "failed", "timed out" or "skipped".
        detail: what there is to say of it in a line.
        command: as it was run.
        output: its last lines, where it is not ok.
    """

    name: str
    part: str
    status: str
    seconds: float
    detail: str = ""
    command: str = ""
    output: str = ""


@dataclass
class Report:
    """Everything that is written."""

    date: str
    commit: str
    machine: dict[str, str]
    versions: dict[str, str]
    parts: list[str]
    outcomes: list[Outcome] = field(default_factory=list)
    tests: dict[str, Any] = field(default_factory=dict)
    kernels: list[Any] = field(default_factory=list)
    benchmarks: list[Any] = field(default_factory=list)
    sanitizer: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(outcome.status in ("ok", "skipped") for outcome in self.outcomes)

    def table(self) -> str:
        """A line a step."""
        width = max((len(outcome.name) for outcome in self.outcomes), default=0)
        lines = [f"{o.name:{width}}  {o.status:9}  {o.seconds:6.1f} s  {o.detail}".rstrip() for o in self.outcomes]
        gpu = self.machine.get("gpu", "none")
        return "\n".join([f"GPU: {gpu}; commit {self.commit}", *lines, "passed" if self.passed else "FAILED"])

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.date.replace(':', '')}-{self.commit}-gpu-check.json"
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return file


def of_junit(file: Path) -> dict[str, Any]:
    """Numbers of tests, and the names of those that failed."""
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in ElementTree.parse(file).getroot().iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, "failed": len(bad), "skipped": counts["skipped"], "failures": bad}


def of_sanitizer(text: str) -> dict[str, Any]:
    """Its last word, and the first lines of what it found. A log without a summary is one of a run cut short."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    found = [line.partition("========= ")[2] for line in text.splitlines() if "========= " in line]
    findings = [line for line in found if re.match(r"(Invalid|Error|Warning|Race|Potential|Program hit)", line)]
    return {"summary": "; ".join(sorted(set(summaries))) or "no summary", "findings": findings[:20]}


def machine() -> dict[str, str]:
    """GPU, driver and compiler, as far as they can be read; no host name."""
    found = {"system": platform.platform(), "processors": str(os.cpu_count())}
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if (line := _first_line(*query)) is not None:
        found |= dict(zip(("gpu", "driver", "memory"), line.split(", "), strict=False))
    nvcc = [line for line in _output("nvcc", "--version").splitlines() if "release" in line]
    if nvcc:
        found["nvcc"] = nvcc[0].strip()
    return found


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """Abbreviated; "unknown" outside of a repository."""
    head = _first_line("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if head is None:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{head}-dirty" if changed.strip() else head


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _first_line(*command: str) -> str | None:
    return next(iter(_output(*command).splitlines()), None)


def environment() -> dict[str, str]:
    """fastret, and the package of the benchmarks, are those of this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}


def without_places(text: str, out: Path) -> str:
    """Folders of this machine by what they are."""
    torch = importlib.util.find_spec("torch")
    places = {
        sys.executable: "python",
        **({str(Path(torch.origin).parents[1]): "SITE"} if torch is not None and torch.origin else {}),
        str(ROOT): ".",
        str(out): "OUT",
        sys.prefix: "PREFIX",
        str(Path.home()): "~",
    }
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def run_step(step: Step, seconds: int, out: Path) -> Outcome:
    """Runs it, its output shown as it comes."""
    command = step.shell(seconds, out)
    shown = without_places(" ".join(command), out)
    if step.needs and not shutil.which(step.needs):
        return Outcome(step.name, step.part, "skipped", 0.0, f"{step.needs} is not here", shown)
    print(f"--- {step.name}: at most {seconds} s", flush=True)
    log, start = out / f"{step.name.replace(' ', '-').replace(':', '')}.txt", time.monotonic()
    with log.open("w") as file:
        done = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.stdout is not None
        for line in done.stdout:
            file.write(line)
            print(line, end="", flush=True)
        code = done.wait()
    took = time.monotonic() - start
    status = "ok" if code == 0 else "timed out" if took >= seconds else "failed"
    tail = "" if status == "ok" else without_places("\n".join(log.read_text().splitlines()[-30:]), out)
    return Outcome(step.name, step.part, status, round(took, 1), "", shown, tail)


def collect(step: Step, outcome: Outcome, out: Path, report: Report) -> None:
    """Puts what a step wrote into the report, and a word on it into the table."""
    for file in sorted(out.glob(step.results)) if step.results else ():
        if file.suffix == ".xml":
            report.tests[step.name] = of_junit(file)
            outcome.detail = "{passed} passed, {failed} failed, {skipped} skipped".format(**report.tests[step.name])
        elif file.suffix == ".log":
            text = file.read_text(errors="replace")
            report.sanitizer[step.name] = of_sanitizer(text)
            outcome.detail = report.sanitizer[step.name]["summary"]
            if "Device not supported" in text:
                outcome.status, outcome.detail = "skipped", f"{step.needs} does not support this machine's GPU"
        elif step.results == "kernels.json":
            report.kernels = json.loads(file.read_text())
            outcome.detail = f"{len(report.kernels)} tasks"
        elif file.name != "kernels.json":
            report.benchmarks.append(json.loads(file.read_text()))
            file.unlink()
            outcome.detail = f"{len(report.benchmarks)} tasks so far"


def plan(part: str | None) -> list[tuple[Step, int]]:
    """Steps and their seconds."""
    if part is None:
        return [(step, step.limit) for step in steps() if step.limit is not None]
    return [(step, step.alone) for step in steps() if step.part in ("build", part)]


def check(part: str | None, output: Path) -> Report:
    """Runs a part, or all of them. Where the build fails, the rest is not run: it would be of something older."""
    report = Report(
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit(),
        machine(),
        versions(),
        list(PARTS) if part is None else [part],
    )
    with tempfile.TemporaryDirectory() as folder:
        for step, seconds in plan(part):
            outcome = run_step(step, seconds, Path(folder))
            report.outcomes.append(outcome)
            collect(step, outcome, Path(folder), report)
            file = report.save(output)  # after each step: a machine may be taken away
            if step.part == "build" and outcome.status != "ok":
                break
    print(f"\n{report.table()}\nwritten: {file.name}", flush=True)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        for step, seconds in plan(arguments.part):
            print(f"{step.part:9} {' '.join(step.shell(seconds, Path('OUT')))}")
        return 0
    return 0 if check(arguments.part, arguments.output).passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
