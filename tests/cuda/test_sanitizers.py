"""Every kernel again, in the emulation, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


def test_kernels_under_sanitizers(built: tuple[ModuleType, Path]) -> None:
    builder, _ = built
    if builder.variant() == "sanitized":
        pytest.skip("this is the process under sanitizers")
    # AddressSanitizer looks for what throws exceptions when it is loaded: Python itself does not bring it
    asked = ("libasan.so", "libstdc++.so")
    found = [subprocess.run([builder.CXX, f"-print-file-name={a}"], capture_output=True, text=True) for a in asked]
    libraries = [f.stdout.strip() for f in found]
    assert all(Path(library).is_absolute() for library in libraries), "the compiler has no AddressSanitizer"
    # Python's and PyTorch's memory is theirs to keep; a kernel's mistake ends the process
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FASTRET_TEST_EMULATION": "sanitized",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(builder.ROOT)]
    chosen = ["-k", "not ascending and not descending and not nvcc", str(Path(__file__).parent)]
    done = subprocess.run(
        [*command, *chosen], env=environment, cwd=builder.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "ERROR: AddressSanitizer" not in done.stderr
    assert "runtime error" not in done.stderr, done.stderr[-4000:]
