"""Compiles every kernel, in every configuration, for GPUs that need not be there; fails on register spills.

Run in a process without TRITON_INTERPRET: ``python tests/kernels/aot.py [--all] [DTYPE ...] [ARCHITECTURE ...]``, for
example ``fp32 bf16 sm_90``: float32 and bfloat16 where no dtype is named, every architecture where none is. Variants
that differ little from one that is compiled are left out; --all has them too. Prints a table: registers, bytes of stack
(a spill: CUDA kernels have no other use for it; spilled VGPRs on AMD) and of shared memory.
A broken AMD binary comes back without an exception: callers must also look for "error:" on standard error.
"""

import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from masked_lse_variants import masked_lse_variants, pair_sums_variants, row_extrema_variants
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from variant import ITEMSIZE, Choices, Variant, accumulated

from fastret.kernels.triton import (
    config,
    pair_dot,
    patchmix,
    rank_sums,
    sampled_dot,
    soft_assign,
    update_rows,
)
from fastret.kernels.triton import rows as row_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# KiB a program may use on all that take an architecture's entries: sm_86 has less than sm_80, sm_120 less than sm_100
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 99, "gfx942": 64}

# Kernel arguments by type, where a variant does not say: the rest point to numbers in the dtype of accumulation.
IN_ROW_DTYPE = ("x", "y", "u", "v", "bank", "logits", "soft", "grad_soft", "grad_hard", "d_rows", "weights")
INT64 = ("start", "size", "first", "self_slot", "row", "column", "partner", "index", "codes", "seed")
INT32 = (
    *("n", "m", "width", "stride", "pairs", "first_column", "books", "words"),
    *("blocks", "count", "batch", "pieces", "down"),
    *("du_stride", "dx_stride"),
)
ALIGNED = ("width", "stride", "du_stride", "dx_stride")  # of arguments that are no pointers


def variants(architecture: str, dtype: str, thorough: bool) -> list[Variant]:
    """All that a call with rows of this dtype may launch, as far as it takes registers of its own."""
    choices = functools.partial(config.choices, architecture=architecture, itemsize=ITEMSIZE[dtype])
    of_ops = (
        *(rank_sums_variants, masked_lse_variants, pair_sums_variants, row_extrema_variants, pair_dot_variants),
        *(soft_assign_variants, sampled_dot_variants, patchmix_variants, update_rows_variants, rows_variants),
    )
    found = [variant for of_op in of_ops for variant in of_op(choices, dtype)]
    if dtype == "fp32":
        choices = functools.partial(choices, tf32=True)
        found += [in_tf32(v) for of_op in of_ops for v in of_op(choices, dtype) if multiplies(v)]
    return [variant for variant in found if thorough or not variant.rare]


def multiplies(variant: Variant) -> bool:
    """Whether the precision of float32 products is a choice in it."""
    return "PRECISION" in variant.kernel.arg_names and None not in (variant.arguments.get(k, 0) for k in ("y", "v"))


def in_tf32(variant: Variant) -> Variant:
    """The same with products in TF32: in the test suite gradients of two heads and of ranks, which hold most."""
    name, arguments = f"TF32 {variant.name}".strip(), {**variant.arguments, "PRECISION": tl.constexpr("tf32")}
    rare = variant.rare or variant.name not in ("CLIP", "") or "SLICE" not in variant.options
    return variant._replace(name=name, arguments=arguments, rare=rare)


def rank_sums_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """Sides of the gradient at its largest slice only."""
    real = accumulated(dtype)
    stored, direct = {"x": real, "y": None}, {"roots": None}
    factored, unbounded = {"FACTORED": choices("scores")[0]["FACTORED"]}, {"FACTORED": 0}
    for options in choices("scores"):
        yield Variant(rank_sums.positive_scores_kernel, {**options})
        yield Variant(rank_sums.positive_scores_kernel, {**options, **unbounded}, "", direct, rare=True)
    for options in choices("sums"):
        for kernel in (rank_sums.rank_sums_kernel, rank_sums.rank_weights_kernel):
            yield Variant(kernel, {**options, **factored})
            yield Variant(kernel, {**options, **unbounded}, "", direct, rare=True)
        alone = {"slopes": None}
        yield Variant(rank_sums.rank_sums_kernel, {**options, **factored}, "no slopes", alone, rare=True)
        positives = {k: v for k, v in options.items() if k not in ("BLOCK_N", "BLOCK_K")}
        yield Variant(rank_sums.positive_gradient_kernel, positives)
    for options in choices("gradient"):
        both = {**options, "ROWS": True, "COLUMNS": True}
        yield Variant(rank_sums.rank_gradient_kernel, {**both, **factored})
        yield Variant(rank_sums.rank_gradient_kernel, {**both, **unbounded}, "", direct, rare=True)
    for rows in (True, False):
        sides, every = {"ROWS": rows, "COLUMNS": not rows, **factored}, {"self_slot": None}
        yield Variant(rank_sums.rank_gradient_kernel, {**choices("gradient")[-1], **sides}, "", every, rare=True)
    for options in choices("strip"):
        launch = {**options, "BLOCK_K": 0, "CHUNK": choices("sums")[0]["CHUNK"]}
        yield Variant(rank_sums.rank_weights_kernel, {**launch, **factored}, "stored", stored)
        yield Variant(rank_sums.rank_weights_kernel, {**launch, **unbounded}, "stored", stored | direct, rare=True)
        yield Variant(rank_sums.rank_sums_kernel, {**launch, **unbounded}, "stored", stored)
        scored = {**options, **factored, "BLOCK_K": 0}
        yield Variant(rank_sums.positive_scores_kernel, scored, "stored", stored, rare=True)


def pair_dot_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """Of the only two there are."""
    for options in choices("pair scores"):
        yield Variant(pair_dot.pair_scores_kernel, {**options})
    for options in choices("pair gradient"):
        yield Variant(pair_dot.pair_gradient_kernel, {**options})


def soft_assign_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """With everything that can be asked for of keys with biases, and of logits; and what a product quantizer asks."""
    rows, words = soft_assign.soft_assign_row_gradient_kernel, soft_assign.soft_assign_word_sums_kernel
    given = {"x": None, "keys": None, "bias": None}
    alone = {"grad_hard": None, "grad_usage": None, "grad_purity": None}
    no_sums = {"dkeys": None, "dbias": None}
    straight, plain = {"STRAIGHT": True}, {"STRAIGHT": False}
    for kernel, kind, constants in (
        (soft_assign.soft_assign_kernel, "assign", {}),
        (rows, "assign rows", straight),
        (words, "assign words", straight),
    ):
        for k, options in enumerate(choices(kind, itemsize=4) if dtype == "fp16" else choices(kind)):
            width = options["SLICE"]
            launch = {**options, "KEY_WIDTH": width, "WORD_WIDTH": width, **constants}
            yield Variant(kernel, launch, "keys", {"logits": None, "usage": None}, k == 0)
            yield Variant(kernel, {**launch, "KEY_WIDTH": 0}, "logits", given | no_sums, True)
            if kernel is not soft_assign.soft_assign_kernel:
                yield Variant(kernel, {**launch, **plain}, "PQ", {"logits": None, "usage": None, **alone}, True)
            if kernel is words:
                used = {"logits": None, "dcodebook": None, "grad_soft": None, "mean_slope": None, **no_sums, **alone}
                yield Variant(kernel, {**launch, **plain}, "usage", used, True)


def sampled_dot_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """Drawn, and listed; rows of an odd width between others; rows of float32 and a bank of half precision."""
    drawn, listed = {"size": "i32", "index": None}, {"size": "i32", "first": None, "seed": None}
    narrow = {"x": accumulated(dtype), **drawn}
    for options in choices("sampled scores"):
        launch = {**options, "WIDTH": 512, "STRIDE": 512}
        yield Variant(sampled_dot.sampled_scores_kernel, launch, "drawn", drawn)
        yield Variant(
            sampled_dot.sampled_scores_kernel, {**launch, "WIDTH": 101, "STRIDE": 103}, "listed", listed, True
        )
        yield Variant(sampled_dot.sampled_scores_kernel, {**launch, "WIDTH": 128, "STRIDE": 128}, "mixed", narrow, True)
        columns = {"BLOCK_S": options["BLOCK_S"], "num_warps": options["num_warps"]}
        yield Variant(
            sampled_dot.sampled_columns_kernel, columns, "drawn", {**drawn, "columns": "*i32"}, dtype != "fp32"
        )
    for options in choices("sampled gradient"):
        launch = {**options, "WIDTH": 512, "STRIDE": 512}
        yield Variant(sampled_dot.sampled_row_gradient_kernel, launch, "drawn", drawn)
        odd = {**launch, "WIDTH": 101, "STRIDE": 103}
        yield Variant(sampled_dot.sampled_row_gradient_kernel, odd, "listed", listed, True)


def patchmix_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """Patches of 16 and of 14 pixels, and of a sequence, in words of 8 bytes, or of those of the dtype where odd."""
    sequence = {"LINES": 1, "ACROSS": 1}
    for word, words, shape, rare in (
        (8, 16 * ITEMSIZE[dtype] // 8, {"LINES": 16, "ACROSS": 14}, dtype != "fp32"),
        (ITEMSIZE[dtype], 15, {"LINES": 15, "ACROSS": 14}, True),
        (8, 768 * ITEMSIZE[dtype] // 8, sequence, True),
        (1, 1, sequence, True),
    ):
        for options in choices("patchmix", itemsize=word):
            width = min(options["BLOCK_W"], triton.next_power_of_2(words))
            tile = {"BLOCK_W": width, "BLOCK_P": options["BLOCK_P"] * options["BLOCK_W"] // width}
            pointers = dict.fromkeys(("x", "out"), f"*i{8 * word}") | {"groups": "*i64"}
            launch = {**options, **tile, **shape, "WORDS": words}
            yield Variant(patchmix.patchmix_kernel, launch, f"{word}-byte words", pointers, rare)


def update_rows_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """Each of the ways with duplicates, rows in one tile and in several; x in the dtype of accumulation."""
    for duplicates, width, rare in (("mean", 1500, False), ("last", 128, True), ("first", 37, True)):
        for options in choices("update rows"):
            tile = min(options["BLOCK_D"], triton.next_power_of_2(width))
            shape = {"WIDTH": width, "STRIDE": width, "STEP": 1, "BLOCK_D": tile}
            given = {"x": accumulated(dtype), "ordered": "*i64", "order": "*i64"}
            launch = {**options, **shape, "KEEPS": True, "NORMALIZE": True}
            duplicated = {**given, "DUPLICATES": tl.constexpr(duplicates)}
            yield Variant(update_rows.update_rows_kernel, launch, duplicates, duplicated, rare)


def rows_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """Rows in one tile, many and few, and in several; in the order of classes, and in their own; gradients in the dtype
    of accumulation and in that of the rows, of packed rows and of a parameter's own."""
    real, one = accumulated(dtype), tl.constexpr(1)
    known: dict[str, Any] = {"rows": f"*{dtype}", "order": "*i64", "step": one}
    plain: dict[str, Any] = {**known, "order": None}
    for options in choices("pack"):
        for width, padding, many, rare in ((512, 512, True, False), (512, 512, False, True), (1500, 1504, True, False)):
            launch = {**tiled(options, width, many), "WIDTH": width, "PADDED": padding}
            yield Variant(row_kernels.pack_kernel, launch, "order", known, rare)
            yield Variant(row_kernels.pack_kernel, launch, "as they are", {**plain, "norms": None}, True)
            yield Variant(row_kernels.pack_kernel, launch, "norms", {**plain, "rows": None}, True)
        apart = {**known, "step": "i32"}
        yield Variant(
            row_kernels.pack_kernel, {**tiled(options, 101, True), "WIDTH": 101, "PADDED": 112}, "columns", apart, True
        )
    for options in choices("unpack"):
        for width, many, rare in ((512, True, False), (512, False, True), (1500, True, False)):
            launch = {**tiled(options, width, many), "WIDTH": width, "ADD": False, "RAW": False}
            yield Variant(row_kernels.unpack_kernel, launch, "order", {**known, "dx": f"*{dtype}"}, rare)
            yield Variant(row_kernels.unpack_kernel, {**launch, "RAW": True}, "raw", {**plain, "dx": real}, rare)
            yield Variant(row_kernels.unpack_kernel, {**launch, "ADD": True}, "onto", {**plain, "dx": real}, True)
            yield Variant(
                row_kernels.unpack_kernel, launch, "as they are", {**plain, "rows": None, "norms": None}, True
            )


def tiled(options: Mapping[str, int], width: int, many: bool) -> dict[str, int]:
    """Tiles of rows of a width, of as many as there are, or of one."""
    features = min(options["BLOCK_D"], triton.next_power_of_2(width))
    most = options["BLOCK_R"] * options["BLOCK_D"] // features
    return {**options, "BLOCK_D": features, "BLOCK_R": most if many else 1}


def described(value: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any]) -> Any:
    """The type of an argument; what is constant in it goes to ``constants``, by its path."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        parts = [described(part, (*path, k), constants) for k, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    constants[path] = value.value if isinstance(value, tl.constexpr) else value
    return "constexpr"


def compiled(variant: Variant, dtype: str, target: GPUTarget) -> Any:
    """Specialised as at a launch: pointers that are arguments of their own, and widths, are multiples of 16."""
    names = variant.kernel.arg_names
    types = dict.fromkeys(IN_ROW_DTYPE, f"*{dtype}") | dict.fromkeys(INT64, "*i64") | dict.fromkeys(INT32, "i32")
    types |= {"PRECISION": tl.constexpr("ieee"), "arrived": "*i32"}
    given = {**dict.fromkeys(names, accumulated(dtype)), **types, **variant.arguments, **variant.options}
    constants: dict[tuple[int, ...], Any] = {}
    signature = {name: described(given[name], (k,), constants) for k, name in enumerate(names)}
    arguments = {name: kind for name, kind in signature.items() if isinstance(kind, str) and kind != "constexpr"}
    divisible = [name for name, kind in arguments.items() if name in ALIGNED or kind.startswith("*")]
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


def compiled_line(dtype: str, architecture: str, thorough: bool, k: int) -> tuple[bool, str]:
    """Whether the k-th variant spills or asks for too much shared memory, and its line of the table."""
    variant = variants(architecture, dtype, thorough)[k]
    kernel = compiled(variant, dtype, TARGETS[architecture])
    registers, spilled = resources(kernel)
    shared = kernel.metadata.shared
    bad = spilled > 0 or shared > SHARED[architecture] << 10
    verdict = "FAILED" if bad else "ok"
    return bad, f"{architecture:7}{dtype:5}{registers:8}{spilled:8}{shared:7}  {verdict} {variant}"


def main(arguments: list[str]) -> int:
    """The number of kernels that fail."""
    if unknown := set(arguments) - {"--all", *ITEMSIZE, *TARGETS}:
        sys.exit(f"expected --all, {', '.join(ITEMSIZE)}, {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    thorough = "--all" in arguments
    dtypes = [a for a in arguments if a in ITEMSIZE] or ["fp32", "bf16"]
    jobs = [
        (dtype, architecture, thorough, k)
        for dtype in dtypes
        for architecture in [a for a in arguments if a in TARGETS] or TARGETS
        for k in range(len(variants(architecture, dtype, thorough)))
    ]
    failures = 0
    print(f"triton {triton.__version__}\n{'':11}registers spilled shared")
    # spawned, not forked: a compiler's threads do not survive a fork
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for bad, line in pool.map(compiled_line, *zip(*jobs, strict=True)):
            failures += bad
            print(line, flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
