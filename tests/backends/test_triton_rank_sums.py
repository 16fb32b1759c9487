"""rank_sums by Triton against the definition in float64: compiled where there is a GPU, else interpreted.

The interpreter's blocks are 16 rows, 16 columns, 32 features and chunks of 4 positives: the shapes below have several
of each and a rest on every axis. On a GPU the same classes come several times over, in wider rows.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastret.backends.segments import label_segments
from fastret.backends.triton import rank_sums as backend
from fastret.backends.triton.rows import ALIGNMENT, padded
from fastret.kernels.triton import config, tuned
from fastret.kernels.triton import rank_sums as kernels
from fastret.kernels.triton.pairwise import factored_sigmoid, factored_slope_root
from fastret.ops import rank_sums

F64 = torch.float64
COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
COPIES, WIDTHS = (9, (37, 130, 600)) if COMPILED else (1, (37,))

# Relative errors of ranks and of gradients
BOUNDS = {
    F64: (1e-14, 1e-13),
    torch.float32: (1e-6, 3e-6),
    torch.bfloat16: (2e-6, 2**-7),
    torch.float16: (2e-6, 2**-10),
}

# Saturated sigmoids overflow 2^z on purpose; numpy, which interprets, remarks on it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.usefixtures("fused"),  # what is tested by strips says so
]

BATCH = (1, 4, 5, 9, 3, 6, 7)  # class sizes around the chunk of 4; three blocks of rows, the last with 3
OTHER = (0, 2, 11, 0, 1, 4, 8)  # of a gallery: classes without a match, and one that spans two blocks


def problem(sizes: tuple[int, ...], width: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of classes of the given sizes, in random order, and their labels, which are not consecutive numbers."""
    generator = torch.Generator().manual_seed(seed)
    copies = sizes if len(sizes) == 1 else sizes * COPIES
    labels = torch.repeat_interleave(torch.arange(len(copies)) * 7 - 11, torch.tensor(copies))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return torch.randn(len(labels), width, generator=generator, dtype=F64).to(DEVICE), labels.to(DEVICE)


def values_and_gradients(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    *,
    wanted: str = "xy",
    rounded: torch.dtype | None = None,
    **options: object,
) -> list[Tensor]:
    """rank_all, rank_pos and the wanted gradients of a random linear form of both.

    rounded: unit rows are rounded to this dtype, as the kernels do for tl.dot; the gradient passes through.
    """
    x = x.detach().clone().requires_grad_("x" in wanted)
    y = None if y is None else y.detach().clone().requires_grad_("y" in wanted)

    def unit(rows: Tensor) -> Tensor:
        u = torch.nn.functional.normalize(rows)
        return u + (u.to(rounded).to(F64) - u).detach()

    if rounded is not None:
        r = rank_sums(unit(x), labels, None if y is None else unit(y), y_labels, normalize=False, **options)
    else:
        r = rank_sums(x, labels, y, y_labels, **options)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(2, r.rank_all.numel(), generator=generator, dtype=F64).to(r.rank_all)
    (weights[0] @ r.rank_all + weights[1] @ r.rank_pos).backward()
    return [r.rank_all.detach(), r.rank_pos.detach(), *(t.grad for t in (x, y) if t is not None and t.requires_grad)]


def assert_close(actual: list[Tensor], expected: list[Tensor], ranks: float, gradients: float) -> None:
    """Relative errors of the ranks and of the gradients, in the Frobenius norm."""
    for name, a, e in zip(("all", "pos", "first", "second"), actual, expected, strict=False):
        assert a.shape == e.shape
        error, bound = (a.to(F64) - e).norm().item(), ranks if name in ("all", "pos") else gradients
        assert error <= bound * e.norm().item(), (name, error / e.norm().item())
    assert len(actual) == len(expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("dtype", "exclude_self"),
    [(F64, False), (F64, True), (torch.float32, True)],
    ids=["f64", "f64 others", "f32 others"],
)
def test_batch(dtype: torch.dtype, exclude_self: bool, normalize: bool, width: int) -> None:
    x, labels = problem(BATCH, width)
    x = x.to(dtype)
    temperature = 0.05 if normalize else width**0.5
    options = {"temperature": temperature, "exclude_self": exclude_self, "normalize": normalize}
    expected = values_and_gradients(x.to(F64), labels, **options, impl="reference")
    assert_close(values_and_gradients(x, labels, **options, impl="triton"), expected, *BOUNDS[dtype])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "wanted"), [(F64, "x"), (F64, "y"), (F64, "xy"), (torch.float32, "xy")])
def test_gallery(dtype: torch.dtype, wanted: str, width: int) -> None:
    (x, labels), (y, y_labels) = problem(BATCH, width), problem(OTHER, width, seed=1)
    x, y = x.to(dtype), y.to(dtype)
    options = {"temperature": 0.05, "wanted": wanted}
    expected = values_and_gradients(x.to(F64), labels, y.to(F64), y_labels, **options, impl="reference")
    assert_close(values_and_gradients(x, labels, y, y_labels, **options, impl="triton"), expected, *BOUNDS[dtype])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, gallery: bool, width: int) -> None:
    """Ranks are those of the rounded unit rows to float32 precision; gradients have the precision of the dtype."""
    x, labels = problem(BATCH, width)
    y, y_labels = problem(OTHER, width, seed=1) if gallery else (None, None)
    x, y = x.to(dtype), None if y is None else y.to(dtype)
    wide = (x.to(F64), labels, None if y is None else y.to(F64), y_labels)
    expected = values_and_gradients(*wide, temperature=0.05, rounded=dtype, impl="reference")
    actual = values_and_gradients(x, labels, y, y_labels, temperature=0.05, impl="triton")
    assert all(g.dtype == dtype for g in actual[2:])
    assert_close(actual, expected, *BOUNDS[dtype])


@pytest.mark.parametrize("plan", ["weights", "strips"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, F64) for kind in ("others", "gallery", "queries only", "gallery only")),
        *(("batch", torch.float32), ("batch", torch.bfloat16), ("batch", torch.float16)),
        *(("gallery", torch.bfloat16), ("gallery", torch.float16)),
    ],
)
def test_stored_blocks(request: pytest.FixtureRequest, plan: str, kind: str, dtype: torch.dtype) -> None:
    """Three strips of rows of 600 features, the last with 3, or nine blocks; of half precision, ranks of the rounded
    unit rows."""
    request.getfixturevalue(plan)
    with_gallery = kind not in ("batch", "others")
    x, labels = problem(BATCH, 600)
    y, y_labels = problem(OTHER, 600, seed=1) if with_gallery else (None, None)
    x, y = x.to(dtype), None if y is None else y.to(dtype)
    wide = (x.to(F64), labels, None if y is None else y.to(F64), y_labels)
    options = {
        "temperature": 0.05,
        "exclude_self": kind == "others",
        "wanted": {"queries only": "x", "gallery only": "y"}.get(kind, "xy"),
    }
    rounded = dtype if dtype.itemsize == 2 else None
    expected = values_and_gradients(*wide, **options, rounded=rounded, impl="reference")
    actual = values_and_gradients(x, labels, y, y_labels, **options, impl="triton")
    assert all(g.dtype == dtype for g in actual[2:])
    assert_close(actual, expected, *BOUNDS[dtype])


@pytest.mark.parametrize(
    ("sizes", "width"),
    [((1,), 1), ((19,), 3), ((1,) * 18, 5), ((4,) * 5, 16), ((2, 3), 100)],
    ids=["one row", "one class", "singletons", "equal classes", "few wide rows"],
)
def test_shapes(sizes: tuple[int, ...], width: int) -> None:
    x, labels = problem(sizes, width)
    for exclude_self in (False, True):
        options = {"temperature": 0.1, "exclude_self": exclude_self}
        expected = values_and_gradients(x, labels, **options, impl="reference")
        assert_close(values_and_gradients(x, labels, **options, impl="triton"), expected, *BOUNDS[F64])


@pytest.mark.parametrize(("queries", "gallery"), [(0, 0), (0, 5), (5, 0), (5, 4)])
def test_no_positive_pair(queries: int, gallery: int) -> None:
    x = torch.randn(queries, 6, device=DEVICE)
    y = torch.randn(gallery, 6, device=DEVICE)
    labels, y_labels = torch.zeros(queries, dtype=int, device=DEVICE), torch.ones(gallery, dtype=int, device=DEVICE)
    for given in ((x, labels, y, y_labels), (x[:0], labels[:0])):
        rank_all, rank_pos, *gradients = values_and_gradients(*given, temperature=0.1, impl="triton")
        assert rank_all.shape == rank_pos.shape == (0,)
        assert all(g.count_nonzero() == 0 for g in gradients)


def test_known_number_of_samples_and_strided_rows() -> None:
    x, labels = problem((4,) * 5, 24)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    expected = values_and_gradients(x, labels, temperature=0.1, impl="reference")
    options = {"temperature": 0.1, "samples_per_class": 4, "impl": "triton"}
    assert_close(values_and_gradients(strided, labels, **options), expected, *BOUNDS[F64])


def test_upstream_gradient_of_one_output() -> None:
    """autograd then hands over zeros that are expanded, not laid out."""
    x, labels = problem(BATCH, 37)
    gradients = []
    for impl in ("triton", "reference"):
        rows = x.clone().requires_grad_()
        rank_sums(rows, labels, temperature=0.1, impl=impl).rank_all.sum().backward()
        gradients.append(rows.grad)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_is_not_hidden(value: float) -> None:
    x, labels = problem(BATCH, 37)
    x[5, 3] = value
    r = rank_sums(x.float(), labels, temperature=0.01, impl="triton")
    assert r.rank_all.isnan().all()
    assert r.rank_pos.isnan().all()


def test_saturated_sigmoids() -> None:
    """Differences of thousands of temperatures: 2^z overflows, the ranks and gradients do not."""
    x, labels = problem(BATCH, 37)
    options = {"temperature": 1e-4, "normalize": True}
    expected = values_and_gradients(x, labels, **options, impl="reference")
    actual = values_and_gradients(x.float(), labels, **options, impl="triton")
    assert all(t.isfinite().all() for t in actual)
    assert_close(actual[:2], expected[:2], 1e-3, 0)


@triton.jit
def sigmoids_kernel(negative, positive, value, slope, SIZE: tl.constexpr, FACTORED: tl.constexpr):
    k = tl.arange(0, SIZE)
    z, z_i = tl.load(negative + k), tl.load(positive + k)
    ratio = tl.exp2(-0.5 * z) * tl.exp2(0.5 * z_i)
    u = factored_sigmoid(ratio, FACTORED)
    root = factored_slope_root(ratio, u, FACTORED)
    tl.store(value + k, u)
    tl.store(slope + k, root * root)


@pytest.mark.parametrize("factored", [1, 2] if COMPILED else [1])
def test_factored_sigmoids_are_those_of_differences(factored: int) -> None:
    """To 5 units in the last place, as far as float32 has normal numbers, for all scores that they are taken of: fewer
    than the rounding of a difference of such scores costs. A GPU's exp2, right to 2^-22, costs 7 more."""
    units = 12 if COMPILED else 5
    generator = torch.Generator().manual_seed(0)
    size = 1 << 16
    positive = (torch.rand(size, generator=generator) * 2 - 1) * backend._LARGEST
    spread = torch.logspace(-3, math.log10(2 * backend._LARGEST), size) * torch.randn(size, generator=generator).sign()
    negative = (positive + spread).clamp(-backend._LARGEST, backend._LARGEST)
    positive, negative = positive.to(DEVICE), negative.to(DEVICE)
    value, slope = torch.empty_like(positive), torch.empty_like(positive)
    sigmoids_kernel[(1,)](negative, positive, value, slope, SIZE=size, FACTORED=factored)
    z = (negative.to(F64) - positive.to(F64)) * math.log(2)
    for actual, expected, least in ((value, z.sigmoid(), 2.0**-126), (slope, z.sigmoid() * (-z).sigmoid(), 2.0**-120)):
        error = (actual.to(F64) - expected).abs()
        assert (error <= units * 2.0**-23 * expected + least).all(), (error / expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_at_the_ends_of_what_is_factored(dtype: torch.dtype) -> None:
    """Rows that are equal, and opposite: products of roots overflow, the ranks and gradients do not."""
    _, labels = problem((4, 5, 9), 16)
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(16, generator=generator, dtype=F64).to(DEVICE)
    x = torch.where(torch.arange(len(labels), device=DEVICE)[:, None] % 3 == 0, -row, row)
    x[::2] += 0.2 * torch.randn(len(x[::2]), 16, generator=generator, dtype=F64).to(DEVICE)
    x = x.to(dtype)
    for temperature, factored in ((math.log2(math.e) / 239.9, True), (math.log2(math.e) / 240.1, False)):
        prepared = backend._prepare(x, None, label_segments(labels), 1, temperature, False, True)
        assert (prepared.roots is not None) == factored
        assert not backend._prepare(x, None, label_segments(labels), 1, temperature, False, False).factored
        options = {"temperature": temperature, "impl": "triton"}
        actual = values_and_gradients(x, labels, **options)
        rounded = dtype if dtype.itemsize == 2 else None
        options["impl"] = "reference"
        expected = values_and_gradients(x.to(F64), labels, rounded=rounded, **options)
        assert all(t.isfinite().all() for t in actual)
        compared = 3 if dtype == torch.float32 else 2  # gradients of rows so near to each other are differences
        assert_close(actual[:compared], expected[:compared], 3e-6, 2e-5)  # scores of 240 are rounded to 2^-17


def test_an_exponential_for_each_sigmoid(strips: None) -> None:
    """What FACTORED = 0 asks for, and gets: gradients that differ in their last digits, and no more."""
    x, labels = problem((4, 5, 9), 37)
    x = x.float()
    options = {"temperature": 0.05, "exclude_self": True}
    entry = config.lookup("scores", DEVICE, x.dtype)
    factored = values_and_gradients(x, labels, **options, impl="triton")
    with config.overriding(tuned.name("scores", 4, entry), {**entry, "FACTORED": 0}):
        direct = values_and_gradients(x, labels, **options, impl="triton")
    expected = values_and_gradients(x.to(F64), labels, **options, impl="reference")
    assert_close(direct, expected, *BOUNDS[torch.float32])
    assert not torch.equal(direct[2], factored[2])


def test_equal_from_run_to_run() -> None:
    x, labels = problem(BATCH, 37)
    runs = [values_and_gradients(x.float(), labels, temperature=0.05, impl="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_interpreted_shapes_have_several_of_everything() -> None:
    sums, gradient = (config.choices(kind, "interpreter", 4)[0] for kind in ("sums", "gradient"))
    for sizes in (BATCH, OTHER):
        assert sum(sizes) > sums["BLOCK_M"]
        assert max(sizes) > 2 * sums["CHUNK"]
    for block in ("SLICE", "BLOCK_K"):
        assert ALIGNMENT < gradient[block] < WIDTHS[0]
        assert padded(WIDTHS[0]) % gradient[block] != 0
    blocks = triton.cdiv(sum(BATCH), sums["BLOCK_M"])
    assert config.parts(torch.device("cpu"), blocks, blocks) > 1, "ranks are summed over parts of the gallery"
    assert config.parts(torch.device("cpu"), 2, 2) > 1, "gradients too, where the gallery is small"


@pytest.mark.parametrize("tiles", [1, 5, 64, 1000])
@pytest.mark.parametrize("programs", [1, 2, 3, 7, 100])
def test_no_part_is_empty(programs: int, tiles: int) -> None:
    parts = config.parts(torch.device("cpu"), programs, tiles)
    share = triton.cdiv(tiles, parts)
    assert 1 <= parts <= tiles
    assert (parts - 1) * share < tiles


def test_kernels_are_compiled_on_a_gpu_and_only_there() -> None:
    for kernel in (
        kernels.positive_scores_kernel,
        kernels.rank_sums_kernel,
        kernels.positive_gradient_kernel,
        kernels.rank_gradient_kernel,
        kernels.rank_weights_kernel,
    ):
        assert isinstance(kernel, triton.JITFunction) == COMPILED


@pytest.mark.parametrize(
    ("architecture", "tile"), [("sm_75", "sm_80"), ("sm_86", "sm_80"), ("sm_103", "sm_100"), ("gfx950", "gfx942")]
)
def test_architectures_that_are_not_listed(architecture: str, tile: str) -> None:
    assert config.choices("gradient", architecture, 2) == config.choices("gradient", tile, 2)


@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_nothing_waits_for_the_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    request.getfixturevalue(plan)
    x, labels = problem(BATCH, 37)
    segments = label_segments(labels)
    pairs = int(segments.count.sum())
    options = {"temperature": 0.1, "exclude_self": True, "normalize": True}

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read on the host")

    names = ("item", "tolist", "nonzero", "__int__", "__bool__", "__float__", "__index__")
    if COMPILED:
        torch.cuda.set_sync_debug_mode("error")
    else:
        for name in names:
            monkeypatch.setattr(Tensor, name, refuse)
    try:
        *ranks, slopes = backend.forward(x, None, segments, pairs, **options, slopes=True)
        backend.backward(*ranks, x, None, segments, slopes=slopes, **options, need_x=True, need_y=False)
    finally:
        if COMPILED:
            torch.cuda.set_sync_debug_mode("default")
