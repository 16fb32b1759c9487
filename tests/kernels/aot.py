"""Compiles every kernel, in every configuration, for GPUs that need not be there; fails on register spills.

Run in a process without TRITON_INTERPRET: ``python tests/kernels/aot.py [fp32 bf16 fp16 fp64]``. Prints a table:
registers, bytes of stack (a spill: CUDA kernels have no other use for it; spilled VGPRs on AMD) and of shared memory.
A broken AMD binary comes back without an exception: callers must also look for "error:" on standard error.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastret.kernels.triton import config
from fastret.kernels.triton import rank_sums as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# KiB a program may use on all that take an architecture's entries: sm_86 has less than sm_80, sm_120 less than sm_100
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 99, "gfx942": 64}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}

# Kernel arguments by type; the rest point to numbers in the dtype of accumulation.
IN_ROW_DTYPE = ("x", "y", "u", "v")
INT64 = ("start", "size", "first")
INT32 = ("n", "m", "width", "pairs")


class Variant(NamedTuple):
    """A kernel with its compile-time arguments and launch options."""

    kernel: Any
    options: dict[str, int]

    def __str__(self) -> str:
        constants = " ".join(f"{name}={int(value)}" for name, value in self.options.items() if name.isupper())
        return f"{self.kernel.__name__} {constants}"


def variants(architecture: str, dtype: str) -> Iterator[Variant]:
    """All that a call with rows of this dtype may launch; sides of the gradient at its largest slice only."""
    itemsize = ITEMSIZE[dtype]
    for options in config.choices("scores", architecture, itemsize):
        yield Variant(kernels.positive_scores_kernel, {**options})
    for options in config.choices("sums", architecture, itemsize):
        for kernel in (kernels.rank_sums_kernel, kernels.pair_gradient_kernel):
            yield Variant(kernel, {**options, "EXCLUDE_SELF": True})
    gradients = config.choices("gradient", architecture, itemsize)
    for options in gradients:
        yield Variant(kernels.rank_gradient_kernel, {**options, "ROWS": True, "COLUMNS": True, "EXCLUDE_SELF": True})
    for rows in (True, False):
        sides = {"ROWS": rows, "COLUMNS": not rows, "EXCLUDE_SELF": False}
        yield Variant(kernels.rank_gradient_kernel, {**gradients[-1], **sides})


def compiled(variant: Variant, dtype: str, target: GPUTarget) -> Any:
    """Specialised as at a launch: pointers and the width are multiples of 16."""
    names = variant.kernel.arg_names
    constants = {k: v for k, v in variant.options.items() if k in names}
    accumulated = "*fp64" if dtype == "fp64" else "*fp32"
    types = dict.fromkeys(IN_ROW_DTYPE, f"*{dtype}") | dict.fromkeys(INT64, "*i64") | dict.fromkeys(INT32, "i32")
    signature = {n: "constexpr" if n in constants else types.get(n, accumulated) for n in names}
    divisible = [n for n in names if signature[n].startswith("*") or n == "width"]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    launch = {k: v for k, v in variant.options.items() if k not in names}
    return triton.compile(source, target=target, options=launch)


def resources(kernel: Any) -> tuple[int, int]:
    """Registers and what was spilled."""
    if "amdgcn" in kernel.asm:
        found = (re.search(rf"\.{name}: *(\d+)", kernel.asm["amdgcn"]) for name in ("vgpr_count", "vgpr_spill_count"))
    else:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    registers, spilled = (int(match.group(1)) for match in found if match)
    return registers, spilled


def main(dtypes: list[str]) -> int:
    """The number of kernels that spill or ask for too much shared memory."""
    failures = 0
    print(f"triton {triton.__version__}\n{'':11}registers spilled shared")
    for dtype in dtypes:
        for architecture, target in TARGETS.items():
            for variant in variants(architecture, dtype):
                kernel = compiled(variant, dtype, target)
                registers, spilled = resources(kernel)
                shared = kernel.metadata.shared
                bad = spilled > 0 or shared > SHARED[architecture] << 10
                failures += bad
                verdict = "FAILED" if bad else "ok"
                print(f"{architecture:7}{dtype:5}{registers:8}{spilled:8}{shared:7}  {verdict} {variant}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["fp32", "bf16"]))
