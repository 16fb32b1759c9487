"""Builds the CUDA kernels as C++ for the emulation of csrc/emulation, with ninja, in a folder that is kept: plain, and
with AddressSanitizer and UndefinedBehaviorSanitizer."""

import ctypes
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or next(c for c in ("c++", "g++", "clang++") if shutil.which(c))

# Fibers switch by longjmp, which a fortified C library takes for a mistake.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-Werror", "-U_FORTIFY_SOURCE", "-DFASTRET_EMULATION"]
# object-size sees a part of what AddressSanitizer sees, and says less of it.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=object-size", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-O0", "-fno-omit-frame-pointer"]  # compiles in a third of the time of -O1, which is what counts here


def build() -> Path:
    """The folder with plain/ and sanitized/ variants of _cuda.so and planted.so, brought up to date."""
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # the processes that share the tests would each build it, in one place
        fcntl.flock(lock, fcntl.LOCK_EX)
        _bring_up_to_date(folder)
    return folder


def _bring_up_to_date(folder: Path) -> None:
    include = [sysconfig.get_path("include"), pybind11.get_include()]
    lines = ["ninja_required_version = 1.5", "rule cxx"]
    lines += [f"  command = {CXX} $flags -MMD -MF $out.d -x c++ -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", f"  command = {CXX} -shared $flags $in -o $out"]

    def compile_to(name: str, source: Path, flags: list[str]) -> str:
        near = f"-iquote {_escape(source.parent)}"
        lines.extend(
            (f"build {name}: cxx {_escape(_checked(source, folder))}", f"  flags = {' '.join([near, *flags])}")
        )
        return name

    # What binds the kernels to Python takes longest to compile and computes nothing: one object serves both.
    module = ROOT / "csrc" / "cuda" / "module.cpp"
    binding = compile_to("module.o", module, [*FLAGS, "-O0", "-g0", *(f"-I{_escape(i)}" for i in include)])
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for variant, extra in (("plain", []), ("sanitized", SANITIZE)):
        flags = [*FLAGS, *extra]
        objects = [compile_to(f"{variant}/{k.stem}.o", k, flags) for k in kernels]
        planted = compile_to(f"{variant}/planted.o", Path(__file__).with_name("planted.cu"), flags)
        for target, parts in (("_cuda.so", [binding, *objects]), ("planted.so", [planted])):
            lines.extend((f"build {variant}/{target}: link {' '.join(parts)}", f"  flags = {' '.join(extra)}"))
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", "-C", str(folder)], check=True)


def with_bounds(source: str) -> str:
    """Kernels with __launch_bounds__ check them as they begin: g++ has no place for a number there. No line moves."""
    parts, done = [], 0
    for found in re.finditer(r"__launch_bounds__\(", source):
        close = _closing(source, found.end())
        parameters = source.index("(", close)
        opens = re.compile(r"\s*\{").match(source, _closing(source, parameters + 1) + 1)
        if opens is None:
            continue  # declared only
        depth, threads = 0, source[found.end() : close]
        for at, character in enumerate(threads):
            depth += (character in "(<") - (character in ")>")
            if character == "," and depth == 0:
                threads = threads[:at]
                break
        parts += [source[done : opens.end()], f" ::fastret::emulation::machine().check_bounds({threads});"]
        done = opens.end()
    return "".join([*parts, source[done:]])


def _closing(source: str, begin: int) -> int:
    """Where the parenthesis closes after which ``begin`` is."""
    depth = 1
    for at in range(begin, len(source)):
        depth += (source[at] == "(") - (source[at] == ")")
        if depth == 0:
            return at
    raise ValueError("a parenthesis is not closed")


def _checked(source: Path, folder: Path) -> Path:
    """The source with checks of bounds, which g++ takes for the original; written where it changes only."""
    checked = folder / f"checked_{source.name}"
    text = f'#line 1 "{source}"\n{with_bounds(source.read_text())}'
    if not checked.exists() or checked.read_text() != text:
        checked.write_text(text)
    return checked


def variant() -> str:
    """Which one this process runs: a process under sanitizers is started for them."""
    return os.environ.get("FASTRET_TEST_EMULATION", "plain")


def load_module(folder: Path) -> ModuleType:
    """What ``fastret._cuda`` is, running on CPU tensors."""
    spec = importlib.util.spec_from_file_location("emulation._cuda", folder / variant() / "_cuda.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_planted(folder: Path) -> ctypes.CDLL:
    """The kernels of planted.cu."""
    return ctypes.CDLL(str(folder / variant() / "planted.so"))


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
