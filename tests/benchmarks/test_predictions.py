"""The model of what plans take: what phases need, how counts grow, and what stands in docs/performance.md."""

import dataclasses

import pytest

from benchmarks.gpu import FLOORS
from benchmarks.predictions import (
    L2,
    MEMORY,
    PRODUCTS,
    SHARED,
    SPECIAL,
    Pairs,
    Phase,
    of_assignment,
    of_lse,
    of_ranks,
    of_scan,
    predicted,
    total,
)

PAIRS = Pairs(4096, 8192, 512)


def test_a_phase_takes_what_it_needs_most_of() -> None:
    needs = {"flops": PRODUCTS["bfloat16"], "special": SPECIAL, "l2": L2, "memory": MEMORY, "shared": SHARED}
    for what, a_second in needs.items():
        assert Phase("", **{what: a_second}).milliseconds == pytest.approx(1000)
    assert Phase("", flops=66e12, memory=3.35e12).milliseconds == pytest.approx(1000)
    assert Phase("", flops=67e12, rate=PRODUCTS["float32"]).milliseconds == pytest.approx(1000)
    assert total([Phase("", memory=MEMORY), Phase("", special=SPECIAL)]) == pytest.approx(2000)


def test_matmuls_of_plans() -> None:
    """One head, both sides: 1 + 2 (slices + 1) fused, 4 by weights and by strips."""

    def matmuls(pairs: Pairs, plan: str) -> float:
        return sum(phase.flops for phase in of_lse(pairs)[plan]) / pairs.product

    for width, fused in ((128, 5), (512, 5), (768, 7), (4096, 19)):
        pairs = dataclasses.replace(PAIRS, width=width)
        assert matmuls(pairs, "fused") == fused
        assert matmuls(pairs, "weights") == matmuls(pairs, "strip") == 4
    two = dataclasses.replace(PAIRS, heads=2)
    assert [matmuls(two, plan) for plan in ("fused", "weights", "strip")] == [5, 4, 4]
    assert matmuls(dataclasses.replace(PAIRS, dtype="float32"), "fused") == 11


def test_bytes_of_tiles_and_of_stored_weights() -> None:
    tile = PAIRS.tile("lse")
    programs = PAIRS.n // tile["BLOCK_M"] * (PAIRS.m // tile["BLOCK_N"])
    assert PAIRS.reread("lse") == programs * (tile["BLOCK_M"] + tile["BLOCK_N"]) * 512 * 2
    count = PAIRS.n * PAIRS.m
    stored = {plan: sum(phase.memory for phase in phases) / count for plan, phases in of_lse(PAIRS).items()}
    rows = PAIRS.rows / count
    assert stored["fused"] == pytest.approx(3 * rows)
    assert stored["weights"] == pytest.approx(4 * rows + 3 * 2)  # written once, read by both products
    assert stored["strip"] == pytest.approx(4 * rows + 8 + 8 + 2 + 2 * 2)


def test_ranks_grow_with_positives() -> None:
    few, many = of_ranks(PAIRS, 16), of_ranks(PAIRS, 32)
    assert many["fused"][0].special == 2 * few["fused"][0].special
    assert many["fused"][0].flops == 2 * few["fused"][0].flops
    assert total(many["fused"]) > total(few["fused"])


def test_products_of_soft_assignment() -> None:
    """2 + 9, of which 8 are two each in bfloat16, and 4 exponentials."""
    phases = of_assignment(4096, 8, 256, 16)["fused"]
    assert sum(phase.flops for phase in phases) == (2 + 9 + 8) * 2 * 4096 * 8 * 256 * 16
    assert sum(phase.special for phase in phases) == 4 * 4096 * 8 * 256
    assert total(phases) == pytest.approx(0.0098, rel=0.01)


def test_lookups() -> None:
    """Bound by the banks of shared memory with tables in float32, with float16 by what turns entries into float32."""
    assert [round(total(of_scan(10_000, 1_000_000, 16, size)["lookups"])) for size in (4, 2)] == [22, 18]
    assert [1e3 * of_scan(10_000, 1_000_000, 16, size)["lookups"][0].shared / SHARED for size in (4, 2)] == (
        pytest.approx([22.3, 11.1], rel=0.01)
    )


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: f"{floor.op} {floor.size}")
def test_every_task_has_a_prediction(floor: object) -> None:
    found = predicted(floor.op, floor.size, floor.dtype)
    assert found
    assert all(0 < time < 1000 for time in found.values())
    assert floor.predicted().count(",") == len(found) - 1
