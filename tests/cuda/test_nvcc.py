"""The CUDA sources compile for the GPUs they are shipped for, without spills; views cost nothing. No GPU needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def nvcc(*arguments: object) -> str:
    assert NVCC is not None
    done = subprocess.run([NVCC, "-std=c++17", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def instructions(ptx: Path) -> list[str]:
    """A kernel's instructions, without the declaration of its parameters and what names its source."""
    body = ptx.read_text().partition(".entry")[2]
    lines = (re.sub(r"_Z\w+", "kernel", line).strip() for line in body.splitlines())
    return [line for line in lines if line and not line.startswith((".param", ".loc", ".file", "//", ".section"))]


@needs_nvcc
def test_views_are_pointers(tmp_path: Path) -> None:
    """The same kernel on views and on raw pointers compiles to the same instructions."""
    views = "Global<const float> x, Global<float> y"
    loads = "const Pack<float, 4> v = load<4>(x, 4 * i);"
    raw = "const float* x, float* y"
    words = "Pack<float, 4> v; const uint4 w = __ldg(reinterpret_cast<const uint4*>(x + 4 * i)); memcpy(&v, &w, 16);"
    compiled = []
    for name, parameters, load in (("views", views, loads), ("raw", raw, words)):
        source = tmp_path / f"{name}.cu"
        source.write_text(
            f'#include "{ROOT}/csrc/cuda/portable.h"\nusing namespace fastret::cuda;\n'
            f"__global__ void kernel({parameters}) {{\n"
            "  const int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
            f"  {load}\n  y[i] = v.item[0] + v.item[3];\n}}\n"
        )
        nvcc("-arch=sm_80", "-ptx", source, "-o", tmp_path / f"{name}.ptx")
        compiled.append(instructions(tmp_path / f"{name}.ptx"))
    assert compiled[0] == compiled[1]
    assert any("ld.global.nc.v4" in line for line in compiled[0])


@needs_nvcc
def test_kernels_of_the_tests_compile(tmp_path: Path) -> None:
    nvcc("-arch=sm_80", "-cubin", Path(__file__).with_name("planted.cu"), "-o", tmp_path / "planted.cubin")


@needs_nvcc
@pytest.mark.skipif(os.environ.get("FASTRET_CUDA") == "0", reason="FASTRET_CUDA=0")
def test_the_extension_is_built_and_loads_without_a_driver() -> None:
    """It was compiled for every shipped architecture, a spill being an error (setup.py)."""
    from fastret import _cuda

    assert _cuda.device_type == "cuda"
    assert isinstance(_cuda.device_error(), str)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FASTRET_CUDA": "1"}, "FASTRET_CUDA=1: no nvcc in CUDA_HOME, CUDA_PATH or PATH"),
        ({"FASTRET_CUDA": "yes"}, "FASTRET_CUDA: expected 0, 1 or auto, got 'yes'"),
        ({"FASTRET_CUDA": "1", "FASTRET_PURE": "1"}, "FASTRET_CUDA=1: FASTRET_PURE=1 installs without extensions"),
        ({"FASTRET_CUDA": "1", "CXX": ""}, "FASTRET_CUDA=1: no C++ compiler found"),
    ],
)
def test_a_build_that_cannot_be_is_refused(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "CXX": "c++", **settings}
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"RuntimeError: {message}" in done.stderr
