"""Every Triton kernel compiles, without spilling registers, for an H100. For the other GPUs, and in more variants,
``make gate`` compiles them, whose table test_gate.py looks at. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest


def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    """In a process of its own: one in which Triton interprets cannot compile, and a broken binary may end it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # a cached binary would not repeat what its compiler complained of
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("aot.py")), "sm_90"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stderr, done.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_kernel_is_left_out(dtype: str) -> None:
    """But two whose instructions are of no dtype are compiled once, with those of float32."""
    every, here = ({v.kernel.__name__ for v in aot.variants("sm_90", dtype, thorough)} for thorough in (True, False))
    assert every - here == (set() if dtype == "fp32" else {"patchmix_kernel", "sampled_columns_kernel"})
