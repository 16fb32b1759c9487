"""The tracer of torch.compile is loaded by whoever compiles, and knows then what fastret said of its functions."""

import subprocess
import sys

import torch

from fastret.backends.tracing import constant_result


def test_importing_fastret_loads_no_compiler() -> None:
    check = "import sys, fastret; print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_marks_a_function_as_pytorch_does() -> None:
    def theirs() -> int:
        return 1

    def ours() -> int:
        return 1

    torch.compiler.assume_constant_result(theirs)
    assert constant_result(ours) is ours
    assert vars(ours) == vars(theirs) != {}
