"""What scripts/gpu_check.sh runs: steps with a time limit each, a short table, and one JSON of all they found.

    python scripts/gpu_check.py [--part tests|bench|sanitize] [--output FOLDER] [--dry-run]

Every step is a group of processes with a time limit, so that one that hangs costs its own time alone: it is
interrupted, and killed KILL_AFTER seconds later; what a step has written by then still counts. The limits of all steps
together are below 9 minutes, and so are those of a part that runs alone, which has more for each. What earlier steps
leave of their time is for the next, up to what it has alone. What was not reached is listed at the end.
fastret runs from this checkout, which is put on PYTHONPATH: nothing is installed, and nothing is written outside of it
(compiled kernels and temporary files are in build/gpu-check, where a second run finds the kernels). Needs no package
but those that fastret's build, tests and benchmarks need; where compute-sanitizer is missing, that step is skipped, and
this is said. Where nvcc is, the CUDA C++ kernels have to build (FASTRET_CUDA=1); where it is not, the build's line says
so. Where the build fails, it is tried without them, and Triton's kernels are tested all the same.

FASTRET_GPU_TESTS=cpu tries the script without a GPU: the tests run small on the CPU, the other parts end in refusals.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / "build" / "gpu-check"
PARTS = ("tests", "bench", "sanitize")
TOTAL = 9 * 60  # seconds
ENOUGH = 10  # seconds, with less than which no step is begun
WORKERS = 12  # of pytest, each of which compiles kernels on a core and has some 500 MB of the GPU
KILL_AFTER = 5  # seconds from the end of a limit, when pytest writes what it knows, to the signal that ends it

# Small, and with a kernel of every kind, forward and backward; pytest -k looks within names: "topk" is pq_topk too.
SANITIZED = "SmoothAP or masked_lse or pair_dot or SoftPQ or sampled_dot or topk or knn_vote or update_rows or patchmix"
_VALUES = "test_values and (fp32 or bf16)"
_CALLS = "not test_values and not tf32"
_OTHER_DTYPES = f"not ({_VALUES}) and not ({_CALLS})"
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

    def shell(self, out: Path) -> list[str]:
        """The process as it is started."""
        return [word.replace("{out}", str(out)) for word in self.command]


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _pytest(name: str, *arguments: str, spread: bool = False) -> tuple[str, ...]:
    workers = str(max(1, min(WORKERS, (os.cpu_count() or 1) - 2)))
    several = ("-n", workers, "--dist", "worksteal") if spread and importlib.util.find_spec("xdist") else ()
    options = ("-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={{out}}/{name}.xml", *several)
    return _python("-m", "pytest", *options, *arguments)


def _entries(name: str, chosen: str) -> tuple[str, ...]:
    return _pytest(name, "-m", "gpu", "tests/gpu/test_every_entry.py", "-k", chosen, spread=True)


def _bench(*arguments: str) -> tuple[str, ...]:
    return _python("-m", "benchmarks", *arguments, "--output", "{out}")


def _sanitized(tool: str) -> tuple[str, ...]:
    only = "--target-processes=application-only"  # not Triton's compilers
    options = (f"--log-file={{out}}/{tool}.log", "--error-exitcode=17", "--launch-timeout=60", only)
    entries = ("tests/gpu/test_every_entry.py", "-k", f"test_values_and_gradients and ({SANITIZED}) and bf16")
    separately = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")  # from a shared block, a tensor's neighbour could be read
    return (*separately, "compute-sanitizer", f"--tool={tool}", *options, *_pytest(tool, *entries))


def steps() -> list[Step]:
    """All there are, what is quick and what others rely on first."""
    triton = sorted(f"tests/backends/{file.name}" for file in (ROOT / "tests/backends").glob("test_triton_*.py"))
    large = _pytest("scale", "-m", "gpu", "tests/gpu/test_scale.py")
    return [
        Step("build", "build", 70, 190, _python("setup.py", "-q", "build_ext", "--inplace")),
        # In the round of all, two dtypes stand for four, three in calls, and values come before what is done with them.
        Step("tests: values", "tests", 80, 100, _entries("values", _VALUES), "values.xml"),
        Step("tests: other dtypes", "tests", None, 60, _entries("dtypes", _OTHER_DTYPES), "dtypes.xml"),
        Step("tests: graphs, waits, streams", "tests", 60, 60, _entries("calls", _CALLS), "calls.xml"),
        Step("tests: large sizes", "tests", 50, 50, large, "scale.xml"),
        Step("tests: kernels", "tests", None, 40, _pytest("kernels", *triton, spread=True), "kernels.xml"),
        Step("time of kernels", "bench", 35, 60, _bench("kernels"), "kernels.json"),
        Step("floors", "bench", 80, 120, _bench("floors"), "*.json"),
        Step("floors of searches", "bench", None, 130, _bench("floors", "--slow"), "*.json"),
        Step("memcheck", "sanitize", 50, 160, _sanitized("memcheck"), "memcheck.log", "compute-sanitizer"),
        Step("racecheck", "sanitize", 50, 160, _sanitized("racecheck"), "racecheck.log", "compute-sanitizer"),
    ]


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        status: "ok", "failed", "timed out", "skipped", "interrupted" or "not reached".
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
    not_reached: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(outcome.status in ("ok", "skipped") for outcome in self.outcomes)

    def table(self) -> str:
        """A line a step."""
        width = max((len(outcome.name) for outcome in self.outcomes), default=0)
        lines = [f"{o.name:{width}}  {o.status:9}  {o.seconds:6.1f} s  {o.detail}".rstrip() for o in self.outcomes]
        gpu = self.machine.get("gpu", "none")
        missed = [f"not reached: {'; '.join(self.not_reached)}"] if self.not_reached else []
        return "\n".join([f"GPU: {gpu}; commit {self.commit}", *lines, *missed, "passed" if self.passed else "FAILED"])

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


def tests_that_ran(text: str) -> str:
    """Of pytest's output, however it ended; empty where it is not pytest's."""
    total = re.search(r"collected (\d+) items|\[(\d+) items\]", text)
    if total is None:
        return ""
    selected = re.search(r"(\d+) selected", text)
    of = selected[1] if selected else total[1] or total[2]
    return f"{len(re.findall(r'(?:PASSED|FAILED|SKIPPED|ERROR) +(?:tests/|.*%)', text))} of {of} tests ran"


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
    compiler = [line for line in _output(nvcc() or "nvcc", "--version").splitlines() if "release" in line]
    if compiler:
        found["nvcc"] = compiler[0].strip()
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
    """fastret, and the package of the benchmarks, are those of this checkout. Where nvcc is, its part has to build."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    insist = {"FASTRET_CUDA": "1"} if nvcc() else {}
    names = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
    folders = {name: str(SCRATCH / folder) for name, folder in names.items()}
    few = {"OMP_NUM_THREADS": "4", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # there are several workers
    given = {**insist, **few, **os.environ, **folders}
    return {**given, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}


def nvcc() -> str | None:
    """The one that setup.py finds."""
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(filter(None, (shutil.which("nvcc", path=home) for home in homes)), None) or shutil.which("nvcc")


def remove_extension() -> None:
    """CUDA C++ kernels of an earlier build, which may be those of other sources."""
    for file in (ROOT / "fastret").glob("_cuda*.so"):
        file.unlink()


def cannot_be_written(*folders: Path) -> str | None:
    """The first of the folders that takes no file, and why."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return f"{folder} cannot be written: {error.strerror}"
    return None


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
        text = text.replace(place, name) if len(place) > 1 else text
    return text


class _Limit:
    """Interrupts a group of processes after so many seconds, and kills it KILL_AFTER later."""

    def __init__(self, group: int, seconds: float) -> None:
        self.passed = False
        self._group = group
        self._timers = [
            threading.Timer(seconds, self._end, [signal.SIGINT]),
            threading.Timer(seconds + KILL_AFTER, self._end, [signal.SIGKILL]),
        ]
        for timer in self._timers:
            timer.daemon = True
            timer.start()

    def _end(self, how: int) -> None:
        self.passed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, how)

    def cancel(self) -> None:
        for timer in self._timers:
            timer.cancel()


def run_step(step: Step, seconds: int, out: Path) -> Outcome:
    """Runs it, its output shown as it comes."""
    command = step.shell(out)
    shown = without_places(" ".join(command), out)
    if step.needs and not shutil.which(step.needs):
        return Outcome(step.name, step.part, "skipped", 0.0, f"{step.needs} is not here", shown)
    print(f"--- {step.name}: at most {seconds} s", flush=True)
    log, start = out / f"{step.name.replace(' ', '-').replace(':', '')}.txt", time.monotonic()
    with log.open("w") as file:
        done = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        limit = _Limit(done.pid, seconds)
        assert done.stdout is not None
        try:
            for line in done.stdout:
                file.write(line)
                print(line, end="", flush=True)
            code = done.wait()
            status = "timed out" if limit.passed else "ok" if code == 0 else "failed"
        except KeyboardInterrupt:  # is not sent to a session of its own
            os.killpg(done.pid, signal.SIGKILL)
            status = "interrupted"
        finally:
            limit.cancel()
    took, text = time.monotonic() - start, log.read_text()
    tail = "" if status == "ok" else without_places("\n".join(text.splitlines()[-30:]), out)
    detail = tests_that_ran(text) if status in ("timed out", "interrupted") else ""
    return Outcome(step.name, step.part, status, round(took, 1), detail, shown, tail)


def collect(step: Step, outcome: Outcome, out: Path, report: Report) -> None:
    """Puts what a step wrote into the report, and a word on it into the table. A file that a step did not end is said
    to be one."""
    for file in sorted(out.glob(step.results)) if step.results else ():
        try:
            detail = _read(step, file, outcome, report)
        except (ElementTree.ParseError, ValueError, OSError) as error:
            detail = f"{file.name} cannot be read: {error}"
            outcome.status = "failed" if outcome.status == "ok" else outcome.status
        outcome.detail = "; ".join(filter(None, (outcome.detail, detail)))
        if file.suffix == ".json" and file.name != "kernels.json":
            file.unlink()  # a later step has the same pattern
    benchmarks = len(report.benchmarks)
    if step.results == "*.json":
        outcome.detail = "; ".join(filter(None, (outcome.detail, f"{benchmarks} tasks so far")))


def _read(step: Step, file: Path, outcome: Outcome, report: Report) -> str:
    """Takes one file into the report; what there is to say of it."""
    if file.suffix == ".xml":
        report.tests[step.name] = of_junit(file)
        return "{passed} passed, {failed} failed, {skipped} skipped".format(**report.tests[step.name])
    if file.suffix == ".log":
        text = file.read_text(errors="replace")
        report.sanitizer[step.name] = of_sanitizer(text)
        if "Device not supported" in text:
            outcome.status = "skipped"
            return f"{step.needs} does not support this machine's GPU"
        return str(report.sanitizer[step.name]["summary"])
    if step.results == "kernels.json":
        report.kernels = json.loads(file.read_text())
        return f"{len(report.kernels)} tasks"
    if file.name != "kernels.json":
        report.benchmarks.append(json.loads(file.read_text()))
    return ""


def plan(part: str | None) -> list[tuple[Step, int]]:
    """Steps and their seconds."""
    if part is None:
        return [(step, step.limit) for step in steps() if step.limit is not None]
    return [(step, step.alone) for step in steps() if step.part in ("build", part)]


def without_cuda(step: Step) -> Step:
    """The build of the rest, where that of the CUDA C++ kernels fails."""
    return replace(step, name="build without CUDA C++", command=("env", "FASTRET_CUDA=0", *step.command))


def room(k: int, planned: list[tuple[Step, int]], left: float) -> int:
    """Seconds for the k-th step of ``left``: its own, and what those after it do not have, up to what it has alone.
    What an earlier one took too much is missing at the end."""
    step, share = planned[k]
    later = sum(seconds + KILL_AFTER for _, seconds in planned[k + 1 :])
    return int(min(max(share, min(step.alone, left - later - KILL_AFTER)), left - KILL_AFTER))


def check(part: str | None, output: Path) -> Report:
    """Runs a part, or all of them."""
    begin = time.monotonic()
    report = Report(
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit(),
        machine(),
        versions(),
        list(PARTS) if part is None else [part],
    )
    remove_extension()
    planned = plan(part)
    if part is None:
        report.not_reached = [f"{step.name} (only with --part {step.part})" for step in steps() if step.limit is None]
    (SCRATCH / "tmp").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        for k, (step, _) in enumerate(planned):
            todo = [step]
            while todo:
                now = todo.pop()
                seconds = room(k, planned, TOTAL - (time.monotonic() - begin))
                outcome = Outcome(now.name, now.part, "not reached", 0.0)
                if seconds >= min(ENOUGH, planned[k][1]):
                    outcome = run_step(now, seconds, Path(folder))
                report.outcomes.append(outcome)
                if step.part == "build" and outcome.status in ("failed", "timed out") and now is step:
                    todo.append(without_cuda(step))
                elif step.part == "build":
                    outcome.detail = "" if nvcc() else "no nvcc here: without the CUDA C++ kernels"
                collect(now, outcome, Path(folder), report)
                if outcome.status in ("timed out", "interrupted", "not reached"):
                    report.not_reached.append(f"{now.name} ({outcome.detail or outcome.status})")
                file = report.save(output)  # after each step: a machine may be taken away
            if outcome.status == "interrupted":
                report.not_reached += [later.name for later, _ in planned[k + 1 :]]
                file = report.save(output)
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
            print(f"{step.part:9} {seconds:4} s  {' '.join(step.shell(Path('OUT')))}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is known is written
    if (reason := cannot_be_written(ROOT / "fastret", SCRATCH, arguments.output)) is not None:
        print(f"gpu_check: {reason}. It builds inside the checkout: copy it, or give --output", file=sys.stderr)
        return 2
    return 0 if check(arguments.part, arguments.output).passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
