"""What an H100 should take for a task by each plan of fastret's kernels: a model of counts, not a measurement.

A plan is a sequence of phases that follow one another; a phase takes as long as the resource it needs most of. Bytes
of L2 are those that tiles read again, from BLOCK_M and BLOCK_N of kernels/triton/config.py; bytes of memory are stored
scores and weights, which leave L2, and rows once a pass. Launches are not counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.registry import DTYPES, Size
from fastret.kernels.triton import config

ARCHITECTURE = "sm_90"
PRODUCTS = {"bfloat16": 660e12, "float16": 660e12, "float32": 67e12}  # flops a second; float32 as IEEE has it
SPECIAL = 3.6e12  # exponentials and reciprocals a second: 132 SMs x 16 a clock x 1.7 GHz
ISSUED = 28.7e12  # other instructions a second, of a thread
L2 = 7e12  # bytes a second
MEMORY = 3.35e12
SHARED = 28.7e12  # 132 SMs x 32 banks x 4 bytes x 1.7 GHz
# Instructions out of compiled kernels (docs/performance.md), a pair and positive, and a pair: forward with slopes,
# weights, a side of the fused gradient, and the same of stored scores.
SWEPT, WEIGHED, IN_GRADIENT, SWEPT_STORED, WEIGHED_STORED = (7.0, 17), (6.7, 20), (13, 20), (57, 0), (9.7, 20)
SCANNED = {4: 42, 2: 53}  # instructions a query and code of 16 books, by the bytes of an entry
CHUNK = 16  # positives of a sweep


@dataclass(frozen=True)
class Phase:
    """What is done at once.

    Attributes:
        flops: of products, at ``rate`` a second.
        special: exponentials and reciprocals. issued: other instructions that matter.
        l2, memory, shared: bytes.
    """

    name: str
    flops: float = 0
    rate: float = PRODUCTS["bfloat16"]
    special: float = 0
    issued: float = 0
    l2: float = 0
    memory: float = 0
    shared: float = 0

    @property
    def milliseconds(self) -> float:
        by_resource = (
            *(self.flops / self.rate, self.special / SPECIAL, self.issued / ISSUED),
            *(self.l2 / L2, self.memory / MEMORY, self.shared / SHARED),
        )
        return 1e3 * max(by_resource)


def total(phases: list[Phase]) -> float:
    """Milliseconds of phases one after another."""
    return sum(phase.milliseconds for phase in phases)


@dataclass(frozen=True)
class Pairs:
    """A pair matrix of n rows and m columns of ``width`` features; of ``heads``, as many exponentials a pair."""

    n: int
    m: int
    width: int
    dtype: str = "bfloat16"
    heads: int = 1

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def product(self) -> float:
        return 2.0 * self.n * self.m * self.width

    @property
    def rows(self) -> float:
        """Bytes of both sides."""
        return float((self.n + self.m) * self.width * self.itemsize)

    def tile(self, kind: str) -> config.Options:
        """Of a kernel, at the SLICE that holds the width."""
        found = config.choices(kind, ARCHITECTURE, self.itemsize)
        return next((o for o in found if o.get("SLICE", self.width) >= self.width), found[-1])

    def reread(self, kind: str) -> float:
        """Bytes that the tiles of one product read: both sides of each, once for every tile."""
        m, n = self.tile(kind)["BLOCK_M"], self.tile(kind)["BLOCK_N"]
        return self.n * self.m * (1 / m + 1 / n) * self.width * self.itemsize

    def phase(self, name: str, products: float, **more: float) -> Phase:
        return Phase(name, products * self.product, PRODUCTS[self.dtype], **more)

    def gradient(self, kind: str, special: float, issued: float = 0) -> Phase:
        """One side by a fused kernel: S again for every slice, and the weighted sum, whose rows are read once more.
        special, issued: a pair and slice."""
        tile = self.tile(kind)
        slices = math.ceil(self.width / tile["SLICE"])
        pairs = self.n * self.m
        again = pairs / tile["BLOCK_M"] * self.width * self.itemsize
        return self.phase(
            "gradient",
            slices + 1,
            special=slices * special * pairs,
            issued=slices * issued * pairs,
            l2=slices * self.reread(kind) + again,
            memory=self.rows,
        )

    def products_of_weights(self) -> list[Phase]:
        """A matmul a side, each of which reads the stored weights."""
        stored = float(self.n * self.m * self.itemsize)
        return [self.phase(f"matmul, {side}", 1, memory=stored + self.rows) for side in ("rows", "columns")]


def of_lse(pairs: Pairs) -> dict[str, list[Phase]]:
    """masked_lse forward and backward by each plan; of two heads with a gradient of their scale."""
    count = pairs.n * pairs.m
    every, stored = float(pairs.heads * count), float(count * pairs.itemsize)
    one, sums = ("lse", "lse weights") if pairs.heads == 1 else ("lse two", "lse weights sums")
    forward = pairs.phase("forward", 1, special=every, l2=pairs.reread(one), memory=pairs.rows)
    weights = pairs.phase("weights", 1, special=every, l2=pairs.reread(sums), memory=pairs.rows + stored)
    scores = pairs.phase("scores", 1, memory=pairs.rows + 4.0 * count)
    return {
        "fused": [forward, *(pairs.gradient("lse gradient", pairs.heads) for _ in range(2))],
        "weights": [forward, weights, *pairs.products_of_weights()],
        "strip": [
            scores,
            Phase("sums of stored scores", special=every, memory=4.0 * every),
            scores,
            Phase("weights of stored scores", special=every, memory=4.0 * count + stored),
            *pairs.products_of_weights(),
        ],
    }


def of_ranks(pairs: Pairs, positives: int) -> dict[str, list[Phase]]:
    """rank_sums of rows with themselves, one sweep forward; one gradient for both sides, with sigmoids of each."""
    count = pairs.n * pairs.m
    sigmoids, chunks = float(positives * count), math.ceil(positives / CHUNK)
    swept, kept = 4.0 * chunks * count, float(count * pairs.itemsize)

    def issued(instructions: tuple[float, float], pieces: int = 1) -> float:
        return instructions[0] * sigmoids + instructions[1] * pieces * count

    l2 = pairs.reread("sums")
    sweep = pairs.phase(
        "sums", chunks, special=sigmoids, issued=issued(SWEPT, chunks), l2=chunks * l2, memory=pairs.rows
    )
    weights = pairs.phase("weights", 1, special=sigmoids, issued=issued(WEIGHED), l2=l2, memory=pairs.rows + kept)
    scores = pairs.phase("scores", 1, memory=pairs.rows + 4.0 * count)
    stored = Phase("weights of stored scores", 0, 1, sigmoids, issued(WEIGHED_STORED), memory=4.0 * count + kept)
    return {
        "fused": [sweep, pairs.gradient("gradient", 2 * positives, 2 * (IN_GRADIENT[0] * positives + IN_GRADIENT[1]))],
        "weights": [sweep, weights, *pairs.products_of_weights()],
        "strip": [
            *(scores, Phase("stored sums", 0, 1, 2 * sigmoids, issued(SWEPT_STORED), memory=swept)),
            *(scores, stored, *pairs.products_of_weights()),
        ],
    }


def of_assignment(n: int, books: int, words: int, width: int) -> dict[str, list[Phase]]:
    """soft_assign, rows and results in bfloat16: 2 products forward, 9 backward, 4 exponentials. Of 8 products a factor
    is the sum of two bfloat16, a product each: 19 in all (kernels/triton/soft_assign.py)."""
    product, scores = 2.0 * n * books * words * width, float(n * books * words)
    rows = float(2 * n * books * width)
    return {
        "fused": [
            Phase("forward", 3 * product, special=scores, memory=2 * rows),
            Phase("gradient of rows, two sweeps", 9 * product, special=2 * scores, memory=3 * rows),
            Phase("sums of words", 7 * product, special=scores, memory=2 * rows),
        ]
    }


def of_search(n: int, m: int, width: int) -> dict[str, list[Phase]]:
    """topk: products, and scores in float32 as PyTorch stores them and a kernel reads them again."""
    product, count = 2.0 * n * m * width, float(n * m)
    return {"strip": [Phase("scores", product, memory=4 * count), Phase("selection", memory=4 * count)]}


def of_scan(n: int, m: int, books: int, itemsize: int) -> dict[str, list[Phase]]:
    """pq_topk: a lookup in shared memory a query, code and book; codes of a byte; instructions as those of 16 books."""
    pairs = float(n) * m
    issued = pairs * SCANNED[itemsize] * books / 16
    return {"lookups": [Phase("scan", issued=issued, shared=pairs * books * itemsize, memory=float(m * books))]}


_BY_OP: dict[str, Callable[[Size, str], dict[str, list[Phase]]]] = {
    "clip": lambda s, dtype: of_lse(Pairs(s["n"], s["n"], s["d"], dtype, heads=2)),
    "info_nce_768": lambda s, dtype: of_lse(Pairs(s["n"], s["n"], s["d"], dtype)),
    "proxy_nca_512": lambda s, dtype: of_lse(Pairs(s["b"], s["c"], s["d"], dtype)),
    "smooth_ap": lambda s, dtype: of_ranks(Pairs(s["n"], s["n"], s["d"], dtype), s["g"]),
    "soft_assign": lambda s, dtype: of_assignment(s["n"], s["m"], s["k"], s["l"]),
    "topk": lambda s, dtype: of_search(s["n"], s["m"], s["d"]),
    "pq_topk": lambda s, dtype: of_scan(s["n"], s["m"], s["books"], DTYPES[dtype].itemsize),
}


def predicted(op: str, size: Size, dtype: str) -> dict[str, float]:
    """Milliseconds of a task by each plan."""
    return {plan: total(phases) for plan, phases in _BY_OP[op](size, dtype).items()}
