"""Builds fastret._C with ninja: one edge per (source, instruction set), each with its own flags. No torch needed.

FASTRET_PURE=1 installs without the extension; without a C++ compiler that happens by itself, and is said.
MAX_JOBS limits parallel compilers; CXX and CXXFLAGS are honoured.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")

# -fno-signed-zeros and friends let the compiler vectorise; never -ffast-math: it deletes the rounding inside exp2.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"]

ISAS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512"]

# Compiled once per instruction set; everything else under csrc/cpu and csrc/common is compiled once.
PER_ISA = (
    "masked_lse.cpp",
    "masked_lse_sweep.cpp",
    "pair_dot.cpp",
    "pq_topk.cpp",
    "rank_sums.cpp",
    "sampled_dot.cpp",
    "segment_mean.cpp",
    "soft_assign.cpp",
    "topk.cpp",
)


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compiles(*flags: str) -> bool:
    """Whether the compiler takes these flags and links a program."""
    command = [CXX, "-x", "c++", "-", "-o", os.devnull, *flags]
    return subprocess.run(command, input=b"int main() {}", capture_output=True, check=False).returncode == 0


class NinjaBuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = (Path(self.build_temp) / ext.name).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)

        openmp = ["-fopenmp"] if compiles("-fopenmp") else []
        include = [sysconfig.get_path("include"), pybind11.get_include()]
        flags = [*FLAGS, *openmp, *os.environ.get("CXXFLAGS", "").split(), *(f"-I{escape(i)}" for i in include)]
        link = ["-shared", "-pthread", *openmp]
        link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-O1", "-s"]

        edges, outputs = [], []
        for source in map(Path, ext.sources):
            variants = ISAS if source.name in PER_ISA else {"": []}
            for isa, isa_flags in variants.items():
                output = objects / f"{source.stem}{isa and '.' + isa}.o"
                extra = [f"-DFASTRET_ISA={isa}", *isa_flags] if isa else []
                edges += [f"build {escape(output)}: compile {escape(ROOT / source)}", f"  extra = {' '.join(extra)}"]
                outputs.append(escape(output))
        rules = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {CXX} {' '.join(flags)} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {CXX} $in -o $out {' '.join(link)}",
        ]
        edges += [f"build {escape(target)}: link {' '.join(outputs)}", f"default {escape(target)}", ""]
        (objects / "build.ninja").write_text("\n".join(rules + edges))

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        verbose = ["-v"] if self.verbose > 1 else []
        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects), *jobs, *verbose])


def extensions() -> list[Extension]:
    if os.environ.get("FASTRET_PURE", "0") == "1":
        return []
    if not CXX:
        print(
            "fastret: no C++ compiler found; installing without the CPU extension (PyTorch tiles serve)",
            file=sys.stderr,
        )
        return []
    sources = sorted(
        p.relative_to(ROOT).as_posix() for folder in ("cpu", "common") for p in (CSRC / folder).glob("*.cpp")
    )
    return [Extension("fastret._C", sources=sources)]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
