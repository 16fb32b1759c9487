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
    runtime = subprocess.run([builder.CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    libasan = runtime.stdout.strip()
    assert Path(libasan).is_absolute(), "the compiler has no AddressSanitizer"
    # Python's and PyTorch's memory is theirs to keep; a kernel's mistake ends the process
    environment = {
        **os.environ,
        "LD_PRELOAD": libasan,
        "ASAN_OPTIONS": "detect_leaks=0",
        "FASTRET_TEST_EMULATION": "sanitized",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(builder.ROOT)]
    chosen = ["-k", "not ascending and not descending", str(Path(__file__).parent)]
    done = subprocess.run(
        [*command, *chosen], env=environment, cwd=builder.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "ERROR: AddressSanitizer" not in done.stderr
    assert "runtime error" not in done.stderr, done.stderr[-4000:]
