"""Builds fastret._C with ninja: one edge per (source, instruction set), each with its own flags; and fastret._cuda
where nvcc is. No torch needed.

FASTRET_PURE=1 installs without the extensions; without a C++ compiler that happens by itself, and is said.
FASTRET_CUDA=0 leaves fastret._cuda out, 1 insists on it, auto (the default) builds it where nvcc is found: by CUDA_HOME
or CUDA_PATH, else on PATH. 1 is refused with FASTRET_PURE=1, and without a C++ compiler. MAX_JOBS limits parallel
compilers; CXX and CXXFLAGS are honoured.
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
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")

# -fno-signed-zeros and friends let the compiler vectorise; never -ffast-math: it deletes the rounding inside exp2.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"]

# It hands arrays on and computes nothing; -O3 would take as long again as all else of its compilation.
BINDING_FLAGS = {"module.cpp": ["-O1"]}

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


# Ampere, Hopper with its own instructions, Blackwell; PTX for what comes later.
CUDA_TARGETS = [f"-gencode arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
CUDA_TARGETS.append("-gencode arch=compute_100,code=compute_100")
# A kernel that spills registers is a defect, not a slow kernel: it does not build.
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler -fPIC,-fvisibility=hidden,-Wall", *CUDA_TARGETS]
NVCC_FLAGS.append("-Xptxas --warn-on-spills -Xptxas --warning-as-error")


def find_nvcc() -> str | None:
    """The compiler of CUDA C++ that FASTRET_CUDA allows."""
    mode = os.environ.get("FASTRET_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise RuntimeError(f"FASTRET_CUDA: expected 0, 1 or auto, got {mode!r}")
    if mode == "0":
        return None
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = next((f for home in homes if (f := shutil.which("nvcc", path=str(home)))), None) or shutil.which("nvcc")
    if found is None and mode == "1":
        raise RuntimeError("FASTRET_CUDA=1: no nvcc in CUDA_HOME, CUDA_PATH or PATH")
    return found


def cuda_libraries(nvcc: str) -> Path:
    """Where libcudart_static lies. nvcc on PATH may be a wrapper: it is asked, not its path."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    named = dict(line[3:].split("=", 1) for line in said.stderr.splitlines() if line.startswith("#$ _"))
    if "_HERE_" not in named:
        raise CompileError(f"{nvcc} --dryrun does not say where CUDA is: {said.stderr.strip() or said.returncode}")
    home = Path(named["_HERE_"].strip()).parent
    folders = [home / named.get("_TARGET_DIR_", "").strip() / "lib", home / "lib64", home / "lib"]
    return next((f for f in folders if (f / "libcudart_static.a").exists()), folders[1])


class NinjaBuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        include = [sysconfig.get_path("include"), pybind11.get_include()]
        flags = [*FLAGS, *os.environ.get("CXXFLAGS", "").split(), *(f"-I{escape(i)}" for i in include)]
        link = ["-shared", "-pthread"]
        link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-O1", "-s"]
        if ext.name == "fastret._cuda":
            self.build_cuda(ext, flags, link)
        else:
            self.build_cpu(ext, flags, link)

    def build_cpu(self, ext: Extension, flags: list[str], link: list[str]) -> None:
        openmp = ["-fopenmp"] if compiles("-fopenmp") else []
        edges = []
        for source in map(Path, ext.sources):
            variants = ISAS if source.name in PER_ISA else {"": []}
            for isa, isa_flags in variants.items():
                name = f"{source.stem}{isa and '.' + isa}.o"
                extra = [f"-DFASTRET_ISA={isa}", *isa_flags] if isa else BINDING_FLAGS.get(source.name, [])
                edges.append((source, "cxx", name, extra))
        self.run_ninja(ext, {"cxx": [CXX, *flags, *openmp]}, edges, [*link, *openmp])

    def build_cuda(self, ext: Extension, flags: list[str], link: list[str]) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        at_once = 1 if os.environ.get("MAX_JOBS") else len(CUDA_TARGETS)  # one file takes longer than all others
        compilers = {"cxx": [CXX, *flags], "nvcc": [escape(nvcc), *NVCC_FLAGS, f"--threads {at_once}"]}
        edges = []
        for source in map(Path, ext.sources):
            compiler = "nvcc" if source.suffix == ".cu" else "cxx"
            edges.append((source, compiler, f"{source.stem}.o", BINDING_FLAGS.get(source.name, [])))
        # CUDA's runtime is this extension's own: PyTorch's may be another version, and neither may see the other.
        runtime = [f"-L{escape(cuda_libraries(nvcc))}", "-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
        self.run_ninja(ext, compilers, edges, [*link, *runtime])

    def run_ninja(
        self,
        ext: Extension,
        compilers: dict[str, list[str]],
        edges: list[tuple[Path, str, str, list[str]]],
        link: list[str],
    ) -> None:
        """Compiles (source, compiler, object, extra flags) and links the objects."""
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = (Path(self.build_temp) / ext.name).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        lines = ["ninja_required_version = 1.5"]
        for name, command in compilers.items():
            depend = "-MD" if name == "nvcc" else "-MMD"
            lines += [f"rule {name}", f"  command = {' '.join(command)} $extra {depend} -MF $out.d -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {CXX} $in -o $out {' '.join(link)}"]
        for source, compiler, name, extra in edges:
            lines.append(f"build {escape(objects / name)}: {compiler} {escape(ROOT / source)}")
            lines.append(f"  extra = {' '.join(extra)}")
        outputs = " ".join(escape(objects / name) for _, _, name, _ in edges)
        lines += [f"build {escape(target)}: link {outputs}", f"default {escape(target)}", ""]
        (objects / "build.ninja").write_text("\n".join(lines))

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        verbose = ["-v"] if self.verbose > 1 else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects), *jobs, *verbose]
        if subprocess.run(command, check=False).returncode:
            raise CompileError(f"{ext.name} does not build")


def sources(*folders: str) -> list[str]:
    return sorted(
        p.relative_to(ROOT).as_posix()
        for folder in folders
        for p in (CSRC / folder).iterdir()
        if p.suffix in (".cpp", ".cu")
    )


def extensions() -> list[Extension]:
    pure, asked = os.environ.get("FASTRET_PURE", "0") == "1", os.environ.get("FASTRET_CUDA") == "1"
    if asked and (pure or not CXX):
        why = "FASTRET_PURE=1 installs without extensions" if pure else "no C++ compiler found"
        raise RuntimeError(f"FASTRET_CUDA=1: {why}")
    if pure:
        return []
    if not CXX:
        print(
            "fastret: no C++ compiler found; installing without extensions (PyTorch tiles serve)",
            file=sys.stderr,
        )
        return []
    built = [Extension("fastret._C", sources=sources("cpu", "common"))]
    if find_nvcc() is not None:
        built.append(Extension("fastret._cuda", sources=sources("cuda"), optional=not asked))
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
