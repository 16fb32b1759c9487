"""masked_lse in C++: every instruction set, multiplier, type and shape against the definition; what it refuses."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor

from fastret import _C
from fastret.backends import cpu
from fastret.backends.cpu import masked_lse as kernels
from fastret.backends.cpu.array import ArrayTuple, array
from fastret.backends.pairs import (
    Circulant,
    Dense,
    Gradients,
    Head,
    Indexed,
    Listed,
    Masked,
    Need,
    PairMask,
    Shifted,
    Target,
)
from fastret.backends.reference import masked_lse as reference

assert cpu.missing() is None
F64 = torch.float64
LEARNED = ("scale", "row_bias", "column_bias")


class Options(TypedDict):
    normalize: bool
    first_column: int
    columns: int


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")
    _C.set_gemm("")


def labels(count: int, classes: int, seed: int) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


MASKS: dict[str, Callable[[int, int], PairMask]] = {
    "any": lambda n, m: PairMask(),
    "same": lambda n, m: PairMask(same=(labels(n, 4, 1), labels(m, 4, 2))),
    "different": lambda n, m: PairMask(different=(labels(n, 4, 1), labels(m, 4, 2))),
    "distinct, wrapped offset": lambda n, m: PairMask(distinct=(labels(n, 9, 1), labels(m, 9, 2)), offset=-2, period=m),
    "not self": lambda n, m: PairMask(offset=0),
    "between": lambda n, m: PairMask(above=normal(n) - 1, below=normal(n) + 1),
    "none at all": lambda n, m: PairMask(same=(torch.zeros(n).long(), torch.ones(m).long())),
}


def entries(n: int, m: int) -> Listed:
    """Up to five a row, in no order, some twice."""
    offsets = torch.cat([torch.zeros(1).long(), labels(n, 6, 11).cumsum(0)])
    index = labels(int(offsets[-1]), m, 12)
    index[1::2] = index[: len(index) - 1 : 2]
    return Listed(offsets, index, normal(len(index)))


TARGETS: dict[str, Callable[[int, int], Target | None]] = {
    "none": lambda n, m: None,
    "index": lambda n, m: Indexed(labels(n, m, 3)),
    "shifted": lambda n, m: Shifted(1),
    "wrapped": lambda n, m: Shifted(-3, max(n, m)),
    "same label": lambda n, m: Masked(PairMask(same=(labels(n, 4, 1), labels(m, 4, 2)), offset=0), normal(n).abs()),
    "by score": lambda n, m: Masked(PairMask(above=normal(n) - 1), normal(n)),
    "circulant": lambda n, m: Circulant((0, 1, -1), (0.5, 0.25, 0.25), min(n, m)),
    "dense": lambda n, m: Dense(normal(n, m).abs()),
    "listed": entries,
}


def example(
    n: int, m: int | None, d: int, mask: str = "any", target: str = "index", dtype: torch.dtype = F64, **other: Any
) -> tuple[Tensor, Tensor | None, Head]:
    """Rows, columns and a head with every learned parameter, all exact in ``dtype``."""
    x, y = normal(n, d, seed=7).to(dtype), None if m is None else normal(m, d, seed=8).to(dtype)
    m = n if m is None else m
    biases: dict[str, Any] = {
        "row_bias": normal(n, seed=9),
        "column_bias": normal(m, seed=10),
        "scale": torch.tensor(7.0, dtype=F64),
    }
    return x, y, Head(mask=MASKS[mask](n, m), target=TARGETS[target](n, m), **biases | other)


def cast(head: Head, dtype: torch.dtype) -> Head:
    """The head as the operator hands it over: real tensors in the accumulation dtype."""

    def mask(p: PairMask) -> PairMask:
        return replace(p, **{k: v.to(dtype) for k in ("above", "below") if (v := getattr(p, k)) is not None})

    target = head.target
    if isinstance(target, Masked):
        target = Masked(mask(target.mask), target.weight.to(dtype))
    elif isinstance(target, Dense):
        target = Dense(target.weights.to(dtype))
    elif isinstance(target, Listed):
        target = replace(target, weight=target.weight.to(dtype))
    learned: dict[str, Any] = {k: v.to(dtype) for k in LEARNED if isinstance(v := getattr(head, k), Tensor)}
    return replace(head, mask=mask(head.mask), target=target, **learned)


def expected(
    x: Tensor, y: Tensor | None, heads: Sequence[Head], grads: Sequence[tuple[Tensor, Tensor]], options: Options
) -> tuple[list[Tensor], list[Tensor]]:
    """The definition in float64: results, and gradients of x, y and each head's scale, row bias and column bias."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(F64, copy=True).requires_grad_()

    x, y = leaf(x), None if y is None else leaf(y)
    leaves: list[dict[str, Any]] = [
        {k: leaf(v) for k in LEARNED if isinstance(v := getattr(h, k), Tensor)} for h in heads
    ]
    heads = [replace(cast(h, F64), **learned) for h, learned in zip(heads, leaves, strict=True)]
    results = reference.masked_lse(x, y, heads, **options)
    total = torch.zeros((), dtype=F64)
    for (lse, t), (g, h) in zip(results, grads, strict=True):
        total = total + (torch.where(lse.isinf(), 0, lse) * g).sum() + (t * h).sum()
    wanted = [x, *([] if y is None else [y]), *(v for learned in leaves for v in learned.values())]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    flat = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)]
    return [r.detach() for pair in results for r in pair], flat


def listed(g: Gradients) -> list[Tensor]:
    """In the order of ``expected``."""
    per_head = zip(g.scale, g.row_bias, g.column_bias, strict=True)
    return [t for t in (g.x, g.y, *(p for head in per_head for p in head)) if t is not None]


def check(
    x: Tensor,
    y: Tensor | None,
    heads: Sequence[Head],
    bound: float,
    *,
    normalize: bool = True,
    first_column: int = 0,
    columns: int | None = None,
) -> None:
    """Values and all gradients; those of the one-sweep form too where there is one head over rows."""
    m = len(x if y is None else y)
    options = Options(normalize=normalize, first_column=first_column, columns=columns or first_column + m)
    wide = F64 if x.dtype == F64 else torch.float32
    own = [cast(h, wide) for h in heads]
    need = Need(True, y is not None, True, True, True)

    def close(actual: Sequence[Tensor], wanted: Sequence[Tensor], rounding: float = 0.0) -> None:
        for a, w in zip(actual, wanted, strict=True):
            scale = torch.where(w.isfinite(), w, 0).abs().max().item() if w.numel() else 0.0
            torch.testing.assert_close(a.to(F64), w, rtol=0, atol=(bound + rounding) * (1 + scale))

    lengths = [len(x) if h.axis == "row" else m for h in heads]
    grads = [(normal(n, seed=11), normal(n, seed=12)) for n in lengths]
    values, gradients = expected(x, y, heads, grads, options)
    results = kernels.forward(x, y, own, **options)
    close([r for pair in results for r in pair], values)
    lses = [lse for lse, _ in results]
    # whatever arrives where nothing was allowed counts nothing
    given = [
        (torch.where(lse.isinf(), torch.nan, g.to(wide)), h.to(wide)) for lse, (g, h) in zip(lses, grads, strict=True)
    ]
    rounding = torch.finfo(x.dtype).eps if x.dtype in (torch.bfloat16, torch.float16) else 0.0
    actual = kernels.backward(given, x, y, own, lses, need=need, **options)
    assert actual.x is not None
    assert actual.x.dtype == x.dtype
    close(listed(actual), gradients, rounding)
    if len(heads) > 1 or heads[0].axis == "column":
        return
    weight = torch.where(values[0].isinf(), 0, grads[0][0])
    _, gradients = expected(x, y, heads, [(weight, -weight)], options)
    value, swept = kernels.sweep(x, y, own[0], weight.to(wide), need=need, **options)
    assert swept.x is not None
    assert swept.x.dtype == wide
    close([value], [torch.where(weight == 0, 0, weight * (values[0] - values[1])).sum()])
    close(listed(swept), gradients)


BOUNDS = {F64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("gemm", ["own", "blas"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gallery", [None, 257])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", ["same label", "listed"])
def test_every_instruction_set_and_multiplier(
    isa: str, gemm: str, dtype: torch.dtype, gallery: int | None, threads: int, target: str
) -> None:
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    _C.set_gemm(gemm)
    assert (_C.isa(), _C.gemm()) == (isa, gemm)
    x, y, head = example(333, gallery, 37, "distinct, wrapped offset", target, dtype)
    check(x, y, [head], BOUNDS[dtype])
    column = replace(head, axis="column", target=Shifted(0), mask=PairMask(), scale=3.0, row_bias=None)
    check(x, y, [replace(head, column_bias=None), column], BOUNDS[dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(40, None), (65, 33)], ids=str)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_every_mask_and_target(mask: str, target: str, shape: tuple[int, int | None], axis: str) -> None:
    x, y, head = example(*shape, 9, mask, target, axis=axis)
    check(x, y, [head], 1e-12)


@pytest.mark.parametrize("n", [0, 1, 7, 31, 65])
@pytest.mark.parametrize("m", [None, 0, 1, 33, 257])
@pytest.mark.parametrize("d", [1, 31])
def test_odd_sizes(n: int, m: int | None, d: int) -> None:
    x, y, head = example(n, m, d, "not self", "shifted")
    for axis in ("row", "column"):
        check(x, y, [replace(head, axis=axis)], 1e-12)


@pytest.mark.parametrize("gallery", [None, 70])
def test_three_heads_share_a_product(gallery: int | None) -> None:
    x, y, first = example(61, gallery, 12, "same", "none")
    second = replace(
        first, mask=MASKS["different"](61, gallery or 61), scale=-5.0, target=TARGETS["dense"](61, gallery or 61)
    )
    check(x, y, [first, second, replace(second, axis="column", smoothing=0.25)], 1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gallery", [None, 70])
def test_widths_smoothing_and_raw_rows(normalize: bool, gallery: int | None) -> None:
    x, y, head = example(61, gallery, 12, smoothing=0.125, scale=0.5)
    check(x, y, [head], 1e-12, normalize=normalize)
    widths = [replace(head, width=w) for w in (3, 8, None)]
    check(x, y, widths, 1e-12, normalize=normalize)
    check(x, y, [replace(head, width=5)], 1e-12, normalize=normalize)


@pytest.mark.parametrize("target", ["index", "wrapped", "circulant", "listed"])
def test_pieces_of_the_columns(target: str) -> None:
    x, y, head = example(40, 90, 9, "not self", target)
    assert y is not None
    assert head.column_bias is not None
    for begin, end in ((0, 33), (33, 90)):
        piece = replace(head, column_bias=head.column_bias[begin:end], smoothing=0.5)
        check(x, y[begin:end], [piece], 1e-12, first_column=begin, columns=90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows(dtype: torch.dtype) -> None:
    x, y, head = example(61, 70, 40, dtype=dtype)
    assert y is not None
    for normalize in (False, True):
        check(x[::2, 3:20], y[:, ::2][:, :17], [replace(head, **_rows(head, 61))], BOUNDS[dtype], normalize=normalize)


def _rows(head: Head, n: int) -> dict[str, Any]:
    assert head.row_bias is not None
    assert isinstance(head.target, Indexed)
    return {"row_bias": head.row_bias[:n:2].contiguous(), "target": Indexed(head.target.index[::2].contiguous())}


@pytest.mark.parametrize("gallery", [None, 70])
def test_gradients_one_by_one(gallery: int | None) -> None:
    """Each wanted alone equals, bit for bit, the same among all; what is not wanted is not there."""
    x, y, head = example(61, gallery, 12)
    options = Options(normalize=True, first_column=0, columns=gallery or 61)
    lse, _ = kernels.forward(x, y, [head], **options)[0]
    g, h = normal(61, seed=3), normal(61, seed=4)

    def both(need: Need) -> list[Gradients]:
        return [
            kernels.backward([(g, h)], x, y, [head], [lse], need=need, **options),
            kernels.sweep(x, y, head, g, need=need, **options)[1],
        ]

    def entry(g: Gradients, k: int) -> Tensor | None:
        return (g.x, g.y, g.scale[0], g.row_bias[0], g.column_bias[0])[k]

    everything = both(Need(True, y is not None, True, True, True))
    for k in range(5):
        if k == 1 and y is None:
            continue
        for alone, among in zip(both(Need(*(i == k for i in range(5)))), everything, strict=True):
            assert all((entry(alone, i) is None) == (i != k) for i in range(5))
            torch.testing.assert_close(entry(alone, k), entry(among, k), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("columns", [33, 257])
def test_extreme_logits_stay_finite(scale: float, dtype: torch.dtype, columns: int) -> None:
    x, y, head = example(40, columns, 8, dtype=dtype, scale=torch.tensor(scale, dtype=F64))
    assert head.row_bias is not None
    assert head.column_bias is not None
    head = cast(replace(head, row_bias=head.row_bias * 1e3, column_bias=head.column_bias * 1e3), dtype)
    options = Options(normalize=True, first_column=0, columns=columns)
    need = Need(True, True, True, True, True)
    heads = [head, replace(head, axis="column")]
    results = kernels.forward(x, y, heads, **options)
    ones = [(torch.ones_like(lse), -torch.ones_like(t)) for lse, t in results]
    gradients = kernels.backward(ones, x, y, heads, [lse for lse, _ in results], need=need, **options)
    value, swept = kernels.sweep(x, y, head, torch.ones(40, dtype=dtype), need=need, **options)
    everything = [value, *(t for pair in results for t in pair), *listed(gradients), *listed(swept)]
    assert all(t.isfinite().all() for t in everything)
    check(x, y, heads, 2e-4 if dtype == torch.float32 else 1e-9)


def test_rising_maximum_scales_earlier_columns_again() -> None:
    """Logits that grow along a row by far more than the slack of the one-sweep reference."""
    m = 1500  # several blocks of columns
    x, y, head = example(40, m, 8, column_bias=torch.linspace(-400, 400, m, dtype=F64))
    check(x, y, [head], 1e-12)
    check(x, y, [replace(head, column_bias=torch.linspace(400, -400, m, dtype=F64))], 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("side", ["x", "y"])
def test_nan_and_infinity_are_never_hidden(bad: float, normalize: bool, side: str) -> None:
    x, y, head = example(40, 50, 8, "none at all", dtype=torch.float32)
    assert y is not None
    (x if side == "x" else y)[3, 2] = bad
    head = cast(head, torch.float32)
    options = Options(normalize=normalize, first_column=0, columns=50)
    for lse, t in kernels.forward(x, y, [head, replace(head, axis="column")], **options):
        assert lse.isnan().all()
        assert t.isnan().all()
    weight, need = torch.ones(40), Need(True, True, False, False, False)
    assert kernels.sweep(x, y, head, weight, need=need, **options)[0].isnan()


@pytest.mark.parametrize("where", ["scale", "row_bias", "column_bias"])
def test_nan_parameters_show(where: str) -> None:
    x, y, head = example(40, 50, 8)
    bad: dict[str, Any] = {where: torch.full_like(getattr(head, where), float("nan"))}
    head = replace(head, **bad)
    for axis in ("row", "column"):
        results = kernels.forward(x, y, [replace(head, axis=axis)], normalize=True, first_column=0, columns=50)
        assert results[0][0].isnan().all()


def test_runs_are_equal_bit_for_bit() -> None:
    torch.set_num_threads(2)
    x, y, head = example(600, 700, 24, dtype=torch.float32)
    heads = [cast(head, torch.float32), cast(replace(head, axis="column"), torch.float32)]
    options = Options(normalize=True, first_column=0, columns=700)
    need = Need(True, True, True, True, True)

    def run() -> list[Tensor]:
        results = kernels.forward(x, y, heads, **options)
        lses = [lse for lse, _ in results]
        gradients = kernels.backward(results, x, y, heads, lses, need=need, **options)
        value, swept = kernels.sweep(x, y, heads[0], lses[0], need=need, **options)
        return [value, *(t for pair in results for t in pair), *listed(gradients), *listed(swept)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_memory_that_malloc_returns_dirty() -> None:
    """glibc fills every allocation with 0xfe (-1.7e38 as floats): the result must not notice."""
    code = (
        "import torch\nfrom fastret.backends import cpu\nassert cpu.missing() is None\n"
        "from fastret.backends.cpu import masked_lse as k\nfrom fastret.backends.pairs import *\n"
        "x, y = (torch.randn(s, 33, generator=torch.Generator().manual_seed(s)) for s in (300, 259))\n"
        "for y in (y, None):\n"
        "  m = len(x if y is None else y)\n"
        "  o = dict(normalize=True, first_column=0, columns=m)\n"
        "  h = Head(scale=torch.tensor(9.), mask=PairMask(offset=1), target=Shifted(0), column_bias=torch.ones(m))\n"
        "  hs = [h, Head(axis='column', target=Shifted(0)), Head(target=Shifted(0), width=9)]\n"
        "  need = Need(True, y is not None, True, True, True)\n"
        "  r = k.forward(x, y, hs, **o)\n"
        "  g = k.backward(r, x, y, hs, [a for a, _ in r], need=need, **o)\n"
        "  v, s = k.sweep(x, y, h, torch.ones(300), need=need, **o)\n"
        "  for t in (v, *(t for p in r for t in p), g.x, g.y, g.scale[0], g.column_bias[0], s.x, s.y, s.scale[0]):\n"
        "    print(None if t is None else t.double().sum().item().hex())\n"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"MALLOC_PERTURB_": "1"})
    }
    assert len(results) == 1


def _changed(t: ArrayTuple, position: int, value: int) -> ArrayTuple:
    return (*t[:position], value, *t[position + 1 :])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("what", "position", "value", "message"),
    [
        ("x", 0, 0, "x: null pointer"),
        ("x", 1, 41, "x: reaches beyond its storage"),
        ("x", 4, 4, "x: not a floating point type"),
        ("y", 2, 7, "y: expected shape"),
        ("y", 4, 1, "y: unexpected dtype code 1"),
        ("same", 2, 39, r"heads\[0\].mask.same\[0\]: expected shape"),
        ("same", 4, 0, r"heads\[0\].mask.same\[0\]: unexpected dtype code 0"),
        ("above", 5, 8, r"heads\[0\].mask.above: reaches beyond its storage"),
        ("index", 2, 41, r"heads\[0\].target.index: expected shape"),
        ("index", 0, 0, r"heads\[0\].target.index: null pointer"),
        ("row_bias", 4, 1, r"heads\[0\].row_bias: unexpected dtype code 1"),
        ("column_bias", 2, 51, r"heads\[0\].column_bias: expected shape"),
        ("lse", 2, 41, "lse: expected shape"),
        ("t", 4, 1, "t: unexpected dtype code 1"),
        ("weight", 2, 39, "weight: expected shape"),
        ("dx", 1, 39, "dx: expected shape"),
        ("dy", 4, 2, "dy: unexpected dtype"),
        ("scale", 5, 2, "grad_scale: reaches beyond its storage"),
    ],
)
def test_nothing_is_touched_through_a_wrong_description(what: str, position: int, value: int, message: str) -> None:
    n, m, d = 40, 50, 8
    reals = {"x": (n, d), "y": (m, d), "above": (n,), "row_bias": (n,), "column_bias": (m,), "lse": (n,), "t": (n,)}
    reals |= {"weight": (n,), "dx": (n, d), "dy": (m, d), "scale": (1,)}
    tensors = {name: torch.ones(shape) for name, shape in reals.items()}
    tensors |= {"same": labels(n, 3, 1), "same_columns": labels(m, 3, 2), "index": labels(n, m, 3)}
    a = {name: array(t) for name, t in tensors.items()}

    def sweep(a: dict[str, ArrayTuple]) -> None:
        mask: _C.MaskTuple = ((a["same"], a["same_columns"]), None, None, None, 0, a["above"], None)
        none: _C.MaskTuple = (None, None, None, None, 0, None, None)
        target: _C.TargetTuple = (1, a["index"], None, [], [], 0, 0, none, None, None, 1.0, 0.0)
        head: _C.HeadTuple = (1.0, False, mask, target, a["row_bias"], a["column_bias"], 0)
        outputs = (a["lse"], a["t"], a["dx"], a["dy"], (a["scale"], None, None))
        _C.masked_lse_sweep(a["x"], a["y"], head, True, 0, 1, a["weight"], *outputs, (1, 0.0))

    sweep(a)
    with pytest.raises(ValueError, match=message):
        sweep({**a, what: _changed(a[what], position, value)})


@pytest.mark.parametrize(
    ("offsets", "index", "weights", "message"),
    [
        ([0, 2, 3], [1, 4, 0], 3, None),
        ([0, 3], [1, 4, 0], 3, r"offsets: expected shape \(1, 3\)"),
        ([0, 2, 3], [1, 4, 0], 2, r"weight: expected shape \(1, 3\)"),
        ([1, 2, 3], [1, 4, 0], 3, "offsets: expected numbers that rise from 0 to 3"),
        ([0, 2, 2], [1, 4, 0], 3, "offsets: expected numbers that rise from 0 to 3"),
        ([0, 9, 3], [1, 4, 0], 3, "offsets: expected numbers that rise from 0 to 3"),
        ([0, -9, 3], [1, 4, 0], 3, "offsets: expected numbers that rise from 0 to 3"),
        ([0, 2, 3], [4, 1, 0], 3, "index: expected column numbers that ascend within a row"),
        ([0, 2, 3], [1, 4, -1], 3, "index: expected column numbers that ascend within a row"),
    ],
)
def test_lists_that_say_where_nothing_is(
    offsets: list[int], index: list[int], weights: int, message: str | None
) -> None:
    x, out = torch.ones(2, 3), [torch.empty(2), torch.empty(2)]
    none: _C.MaskTuple = (None, None, None, None, 0, None, None)
    tensors = torch.tensor(index), torch.tensor(offsets), torch.ones(weights)
    places, starts, values = (array(t) for t in tensors)
    target: _C.TargetTuple = (5, places, starts, [], [], 0, 0, none, values, None, 1.0, 0.0)
    head, outputs = (1.0, False, none, target, None, None, 0), tuple(map(array, out))
    call = (array(x), None, [head], [], False, 0, 1, [outputs], (1, 0.0))
    if message is None:
        _C.masked_lse_forward(*call)
        assert out[1].tolist() == [3, 3]  # one of two labels stands at a column beyond
        return
    with pytest.raises(ValueError, match=r"heads\[0\].target." + message):
        _C.masked_lse_forward(*call)


def test_heads_that_do_not_fit_the_call() -> None:
    x, y, head = example(40, 50, 8)
    assert y is not None
    with pytest.raises(ValueError, match="heads: expected at least one"):
        _C.masked_lse_forward(array(x), None, [], [], True, 0, 1, [], (1, 0.0))
    with pytest.raises(ValueError, match="results: expected one a head"):
        _C.masked_lse_forward(array(x), array(y), [kernels._head(head, 50)], [], True, 0, 1, [], (1, 0.0))
    column, weight = replace(head, axis="column"), torch.ones(40, dtype=F64)
    options, need = Options(normalize=True, first_column=0, columns=50), Need(True, True, False, False, False)
    with pytest.raises(ValueError, match="one sweep serves one head over rows"):
        kernels.sweep(x, y, column, weight, need=need, **options)
