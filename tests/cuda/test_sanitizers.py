"""Every kernel again, in the emulation, under AddressSanitizer and UndefinedBehaviorSanitizer; which find what they are
there for."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

Built = tuple[ModuleType, Path]

# A process of its own without PyTorch: (library, kernel, broken) in, what the emulation complains of out.
_PLANTED = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.run_planted.restype = ctypes.c_char_p
x, out = (ctypes.c_float * 200)(), (ctypes.c_float * 1)()
sizes = ctypes.c_int64(1), ctypes.c_int64(200)
print(library.run_planted(sys.argv[2].encode(), int(sys.argv[3]), ctypes.c_uint64(0), x, out, *sizes))
"""


def under_sanitizers(built: Built, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python process with AddressSanitizer's runtime in it. C++'s too: exceptions are found when that starts."""
    builder, _ = built
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = [builder.CXX, f"-print-file-name={name}"]
        libraries.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        assert Path(libraries[-1]).is_absolute(), f"the compiler has no {name}"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # what Python and PyTorch keep is theirs
        "FASTRET_TEST_EMULATION": "sanitized",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=builder.ROOT, capture_output=True, text=True, check=False)


def test_kernels_under_sanitizers(built: Built) -> None:
    """In one order of threads, as the sanitizers watch each thread by itself; not the longest of other cases."""
    chosen = "not ascending and not descending and not order_of_threads and not 17-16-20 and not 60000"
    chosen += " and not sanitizers and not nvcc"
    folder = Path(__file__).parent
    done = under_sanitizers(built, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "runtime error" not in done.stderr, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("beyond_a_local_array", "ERROR: AddressSanitizer: stack-buffer-overflow"),
        ("shift_too_far", "runtime error: shift exponent 200 is too large"),
    ],
)
def test_sanitizers_find_planted_mistakes(built: Built, kernel: str, message: str) -> None:
    library = built[1] / "sanitized" / "planted.so"
    right, wrong = (under_sanitizers(built, "-c", _PLANTED, library, kernel, broken) for broken in (0, 1))
    assert right.stdout.strip() == "None", right.stderr[-4000:]
    assert wrong.returncode != 0
    assert message in wrong.stderr
