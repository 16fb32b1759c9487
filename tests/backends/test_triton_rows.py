"""Rows packed and unpacked by Triton against PyTorch in float64 (``fastret.backends.rows``): compiled where there is a
GPU, else interpreted, 32 features at a time."""

import math

import pytest
import torch
from torch import Tensor

from fastret.backends import rows as definition
from fastret.backends.rows import NORM_EPS, accumulation_dtype
from fastret.backends.triton.rows import PackedRows, look, nothing_yet, pack_padded, padded
from fastret.kernels.triton import config

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 37
WIDTHS = [1, 16, 37, 80]  # within a tile and beyond, multiples of 16 and not
ROUNDED = {F64: 2.0**-51, F32: 2.0**-22, BF16: 2.0**-8, F16: 2.0**-10}
WIDE = {F64: 2.0**-50, F32: 2.0**-20, BF16: 2.0**-20, F16: 2.0**-20}

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide).*:RuntimeWarning")


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("pack", "unpack"):
        monkeypatch.setitem(config._INTERPRETED[kind], "BLOCK_D", 32)


def values(n: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=F64).to(DEVICE, dtype)


def permuted(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(9)).to(DEVICE)


def whole(packed: PackedRows) -> Tensor:
    """Rows with their padding."""
    n, width = packed.rows.shape
    return packed.rows.as_strided((n, padded(width)), (padded(width), 1))


def close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Relative to the largest number of a row."""
    largest = expected.abs().amax(-1, keepdim=True)
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= relative * largest).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ordered", [False, True])
def test_packs_unit_rows(dtype: torch.dtype, width: int, ordered: bool) -> None:
    x = values(N, width, dtype)
    order = permuted(N) if ordered else slice(None)
    packed = pack_padded(x, order, True)
    expected = definition.pack_rows(x.double(), order, True)
    assert packed.rows.dtype == dtype
    close(packed.rows, expected.rows, ROUNDED[dtype])
    assert packed.norms is not None
    assert expected.norms is not None
    assert packed.norms.dtype == accumulation_dtype(dtype)
    torch.testing.assert_close(packed.norms.double(), expected.norms[:, 0], rtol=WIDE[dtype], atol=0)
    assert (whole(packed)[:, width:] == 0).all()
    assert packed.rows.data_ptr() % 16 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 37])
def test_packs_rows_as_they_are(dtype: torch.dtype, width: int) -> None:
    x, order = values(N, width, dtype), permuted(N)
    packed = pack_padded(x, order, False)
    assert packed.norms is None
    assert torch.equal(packed.rows, x[order])
    assert (whole(packed)[:, width:] == 0).all()
    assert packed.rows.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_of_any_strides(normalize: bool) -> None:
    around = values(40, 60, F32)
    for x in (around[1::3, 2:20], around[:, ::3], around.T[5:9], around[:7].T, around[:1].expand(5, 60)):
        expected = pack_padded(x.clone(memory_format=torch.contiguous_format), None, normalize)
        packed = pack_padded(x, None, normalize)
        assert torch.equal(packed.rows, expected.rows)


@pytest.mark.parametrize("width", [21, 80])
def test_many_rows_take_taller_tiles(width: int) -> None:
    x = values(700, width, F32)
    packed, few = pack_padded(x, None, True), pack_padded(x[690:], None, True)
    close(packed.rows, definition.unit_rows(x.double()), ROUNDED[F32])
    torch.testing.assert_close(packed.rows[690:], few.rows, rtol=2e-7, atol=0)


def extremes(dtype: torch.dtype, width: int) -> Tensor:
    """Finite rows of every size: zero, shorter than 1e-12, whose squares overflow or vanish, with one large number."""
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    sizes = [0.0, 1e-30, 1e-20, 1e-13, 1e-12, 1e-6, 1.0, 1e4, 1e15, 1e16, 1e30, most / 10, least / 8]
    rows = values(len(sizes), width, F64).clamp(-3, 3).cpu()
    large = torch.zeros(2, width, dtype=F64)
    large[0, width - 1], large[1, 0], large[1, width - 1] = most, 1e-3, most / 2
    sized = (rows * torch.tensor(sizes, dtype=F64)[:, None]).clamp(-most / 2, most / 2)
    return torch.cat([sized, large]).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 70])
def test_extremes_that_are_finite(dtype: torch.dtype, width: int) -> None:
    """Where float64 itself overflows it is scaled first: unit rows do not depend on that."""
    x = extremes(dtype, width)
    nothing = nothing_yet(x)
    packed = pack_padded(x, None, True, nothing)
    norms = definition.row_norms(x.double())
    assert packed.norms is not None
    torch.testing.assert_close(packed.norms.double(), norms[:, 0], rtol=WIDE[dtype], atol=0)
    smallest = torch.finfo(dtype).smallest_normal
    assert ((packed.rows.double() - x.double() / norms).abs() <= 2 * ROUNDED[dtype] + smallest).all()
    assert nothing == 0
    du = values(len(x), width, accumulation_dtype(dtype), 1)
    expected = definition.PackedRows(packed.rows.double(), slice(None), norms).gradient(du.double(), F64)
    found = packed.gradient(du, du.dtype)
    assert found.isfinite().all()
    tiny = torch.finfo(du.dtype).smallest_normal
    assert ((found.double() - expected).abs() <= 8 * WIDE[dtype] * expected.abs().amax(1, keepdim=True) + tiny).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("width", [16, 70])
def test_a_norm_beyond_the_range_of_its_dtype(dtype: torch.dtype, width: int) -> None:
    """The row is one of numbers that are finite, and so are its direction and its gradient."""
    x = torch.full((2, width), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    nothing = nothing_yet(x)
    packed = pack_padded(x, None, True, nothing)
    torch.testing.assert_close(packed.rows.double(), torch.full_like(x, width**-0.5, dtype=F64), rtol=1e-2, atol=0)
    assert nothing == 0
    found = packed.gradient(values(2, width, accumulation_dtype(dtype)), dtype)
    assert found.isfinite().all()
    assert found.abs().max() <= 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("place", [(0, 0), (20, 36), (36, 5)])
def test_what_is_not_finite(dtype: torch.dtype, bad: float, normalize: bool, place: tuple[int, int]) -> None:
    x = values(N, 37, dtype)
    x[place] = bad
    nothing, seen, other = (nothing_yet(x) for _ in range(3))
    packed = pack_padded(x, permuted(N), normalize, nothing)
    look(x, seen)
    look(x[:, : place[1]], other)
    assert nothing.isnan()
    assert seen.isnan()
    assert other == 0
    if normalize:
        assert packed.norms is not None
        row = int((permuted(N) == place[0]).nonzero())
        assert packed.norms.isnan().nonzero().tolist() == [[row]]
        assert packed.rows[row].isnan().all()


def test_no_rows() -> None:
    packed = pack_padded(values(0, 21, F32), slice(None), True)
    assert packed.rows.shape == (0, 21)
    assert packed.gradient(values(0, 21, F32), BF16).shape == (0, 21)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_unpacks_gradients(dtype: torch.dtype, width: int, normalize: bool, ordered: bool, parts: int) -> None:
    x = values(N, width, dtype)
    x[3], x[4] = 0, 1e-13 if dtype != F16 else 0  # no direction, and no radial part of the gradient
    order = permuted(N) if ordered else slice(None)
    packed = pack_padded(x, order, normalize)
    wide = accumulation_dtype(dtype)
    du = values(max(parts, 1) * N, padded(width), wide, 1).view(max(parts, 1), N, -1)[:, :, :width]
    norms = None
    if packed.norms is not None:
        norms = packed.norms.double()[:, None]
        du[:, packed.norms < 1e-6] *= 1e-12  # the quotient is one of half precision
    expected = definition.PackedRows(packed.rows.double(), order, norms).gradient(du.double().sum(0), F64)
    for out in {wide, dtype}:
        given = du.clone(memory_format=torch.preserve_format)
        found = packed.gradient(given if parts else given[0], out)
        assert found.dtype == out
        assert found.is_contiguous()
        close(found, expected, ROUNDED[out] + 16 * WIDE[dtype])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_gradient_takes_the_place_of_what_it_is_made_of(normalize: bool, ordered: bool) -> None:
    x = values(N, 48, F32)
    packed = pack_padded(x, permuted(N) if ordered else None, normalize)
    du = values(N, 48, F32, 1)
    expected = packed.gradient(torch.stack([du, torch.zeros_like(du)]), F32)
    found = packed.gradient(du, F32)
    assert torch.equal(found, expected)
    assert (found.data_ptr() == du.data_ptr()) == (not ordered)


def test_onto_other_gradients_and_nothing_added() -> None:
    x, du = values(N, 37, F64), values(N, 37, F64, 1)
    packed = pack_padded(x, permuted(N), True)
    before = values(N, 50, F64, 2)
    alone = packed.gradient(du.clone(), F64)
    onto = before.clone()
    assert packed.gradient(du.clone(), F64, onto=onto) is onto
    torch.testing.assert_close(onto[:, :37], before[:, :37] + alone)
    assert torch.equal(onto[:, 37:], before[:, 37:])
    shifted = packed.gradient(du.clone(), F64, nothing=torch.tensor(0.5, dtype=F64, device=DEVICE))
    torch.testing.assert_close(shifted, alone + 0.5)
    assert packed.gradient(du.clone(), F32, nothing=nothing_yet(x) * math.nan).isnan().all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("width", [32, 80])
def test_gradients_of_rows_as_they_are(dtype: torch.dtype, width: int) -> None:
    """Of raw rows, du is what it is for unit rows, divided by the norms."""
    x = values(N, width, dtype)
    x[3] = 0
    x[4] *= 1e-14
    packed = pack_padded(x, None, True)
    assert packed.norms is not None
    raw = PackedRows(x, None, packed.norms, raw=True)
    du = values(N, width, dtype, 1)
    expected = packed.gradient(du.clone(), dtype)
    close(raw.gradient(du / packed.norms[:, None], dtype), expected.double(), 16 * WIDE[dtype])
    assert float(packed.norms[4]) == pytest.approx(NORM_EPS)
