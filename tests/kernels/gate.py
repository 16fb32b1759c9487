"""The compile gate: every Triton kernel in every configuration that is shipped, with each supported Triton.

``python tests/kernels/gate.py [FOLDER ...]`` (``make gate`` gives it the oldest supported Triton) runs aot.py --all
in float32, bfloat16, float16 and float64 with the installed Triton and with those in the folders, and writes
docs/kernels.csv: registers, spilled bytes (VGPRs on AMD) and bytes of shared memory of each. It fails where a kernel
spills or a compiler complains. The table names the hash of the sources it was made from, which the test suite compares
with theirs.
"""

import csv
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernels.csv"
DTYPES = ("fp32", "bf16", "fp16", "fp64")
MEASURED = ("registers", "spilled", "shared")


class Row(NamedTuple):
    """One kernel in one configuration, as one Triton compiles it."""

    architecture: str
    dtype: str
    registers: int
    spilled: int
    shared: int
    kernel: str


def sources() -> str:
    """Hash of all that decides what is compiled: the kernels, their configurations, and the list of variants."""
    digest = hashlib.sha256()
    listed = (Path(__file__).with_name(f"{name}.py") for name in ("aot", "masked_lse_variants", "variant"))
    for file in (*sorted((ROOT / "kernels" / "triton").glob("*.py")), *listed):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def compiled(folder: str | None) -> tuple[str, list[Row], list[str]]:
    """The version of a Triton, installed or in a folder, what it compiles, and what is wrong with it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, environment.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), "--all", *DTYPES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if " FAILED " in line]
    wrong += [line for line in done.stderr.splitlines() if "error:" in line]
    if done.returncode and not wrong:
        wrong = done.stderr.splitlines()[-5:]
    found = [line.split(maxsplit=6) for line in lines[2:]]
    rows = [Row(a, dtype, int(r), int(spilled), int(shared), name) for a, dtype, r, spilled, shared, _, name in found]
    return lines[0].removeprefix("triton "), rows, wrong


def write(results: dict[str, list[Row]]) -> None:
    """The table of several versions, which compile the same variants in the same order."""
    with TABLE.open("w", newline="") as file:
        file.write(f"# sources {sources()}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["architecture", "dtype", "kernel", *(f"{what} {v}" for v in results for what in MEASURED)])
        for same in zip(*results.values(), strict=True):
            first = same[0]
            assert {(row.architecture, row.dtype, row.kernel) for row in same} == {(first[0], first[1], first.kernel)}
            measured = [getattr(row, what) for row in same for what in MEASURED]
            table.writerow([first.architecture, first.dtype, first.kernel, *measured])


def main(folders: list[str]) -> int:
    """How many kernels fail."""
    results, failures = {}, 0
    for folder in (*folders, None):
        version, rows, wrong = compiled(folder)
        results[version] = rows
        failures += len(wrong)
        print(f"triton {version}: {len(rows)} kernels, {len(wrong)} failures", *wrong, sep="\n  ", flush=True)
    if not failures:
        write(results)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
