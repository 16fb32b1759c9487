"""When Triton goes by strips, how large they are, what multiplies them, and how precisely float32 is multiplied."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.backends import workspace
from fastret.backends.triton import plans, products
from fastret.backends.triton.masked_lse import _Problem
from fastret.backends.triton.rows import PackedRows
from fastret.kernels.triton import config, masked_lse, rank_sums, row_extrema
from fastret.ops import Head, PairMask
from fastret.ops import masked_lse as masked_lse_op
from fastret.ops import rank_sums as rank_sums_op
from fastret.ops import row_extrema as row_extrema_op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the environment says."""
    monkeypatch.setattr(plans, "_chosen", "auto")
    monkeypatch.setattr(workspace, "_workspace", "128MiB")
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def test_the_plan_follows_from_the_width_and_from_what_multiplies() -> None:
    assert [plans.plan(width, 128, tensor_cores=False) for width in (128, 144)] == ["fused", "strip"]
    assert {plans.plan(width, 512, tensor_cores=True) for width in (16, 4096)} == {"weights"}
    narrow = [plans.plan(width, 512, tensor_cores=True, narrow=64) for width in (64, 80, 4096)]
    assert narrow == ["fused", "weights", "weights"]
    both = [plans.plan(width, 512, tensor_cores=True, narrow=64, wide=96) for width in (64, 96, 112)]
    assert both == ["fused", "weights", "strip"]
    for asked in ("fused", "weights", "strip"):
        assert {plans.plan(w, 512, tensor_cores=t, asked=asked) for w in (16, 4096) for t in (True, False)} == {asked}


@pytest.mark.parametrize(
    ("dtype", "kind", "widest", "wider", "wide"),
    [
        (torch.bfloat16, "lse gradient", 48, "weights", "strip"),
        (torch.float16, "lse gradient", 48, "weights", "weights"),
        (torch.bfloat16, "lse heavy", 32, "weights", "strip"),
        (torch.float32, "lse gradient", 128, "strip", "strip"),
        (torch.float32, "gradient", 128, "strip", "strip"),
        (torch.float64, "lse gradient", 32, "strip", "strip"),
    ],
)
def test_the_widest_rows_of_fused_kernels(dtype: torch.dtype, kind: str, widest: int, wider: str, wide: str) -> None:
    def plan(width: int) -> str:
        return plans.plan_for(torch.empty(3, width, dtype=dtype, device=DEVICE), kind)

    assert [plan(widest), plan(widest + 1), plan(4096)] == ["fused", wider, wide]


def test_ranks_of_half_precision_go_by_weights() -> None:
    """Of any width: sigmoids are taken once then, not for each side."""
    for dtype in (torch.bfloat16, torch.float16):
        assert {plans.plan_for(torch.empty(3, d, dtype=dtype, device=DEVICE), "gradient") for d in (1, 4096)} == {
            "weights"
        }


@pytest.mark.parametrize(
    ("dtype", "heads", "widest"),
    [(torch.bfloat16, 1, 1024), (torch.bfloat16, 2, 512), (torch.float32, 1, 512), (torch.float32, 2, 256)],
)
def test_the_widest_rows_whose_weights_alone_are_stored(dtype: torch.dtype, heads: int, widest: int) -> None:
    """Half as many bytes a row of two heads, whose tiles are smaller."""
    torch.set_float32_matmul_precision("high")

    def plan(width: int) -> str:
        rows = PackedRows(torch.empty(3, width, dtype=dtype, device=DEVICE), None, None)
        return _Problem(rows, rows, [Head(2.0)] * heads, list(range(heads)), False, 0, 3).plan

    assert [plan(widest), plan(widest + 1)] == ["weights", "strip"]


def test_float32_goes_by_weights_where_its_products_may_be_tf32() -> None:
    rows = torch.empty(3, 80, device=DEVICE)
    assert plans.plan_for(rows, "gradient") == "fused"
    torch.set_float32_matmul_precision("high")
    assert plans.plan_for(rows, "gradient") == "weights"


def test_ranks_stay_fused_where_no_strip_fits() -> None:
    u = torch.empty(4096, 1, device=DEVICE)
    step = config.granularity(DEVICE)
    columns = plans.workspace() // 4 // step
    for excess in (0, 1):
        gallery = u.new_empty(1, 1).expand(columns + excess, 1)
        assert plans.Strips(u, gallery, whole_rows=True).fits() == (excess == 0)


@pytest.mark.parametrize(
    ("n", "m", "pairs", "step", "expected"),
    [
        (5, 7, 10**6, 16, (5, 7)),
        (70, 51, 69 * 51, 16, (70, 48)),
        (70, 51, 16 * 51, 16, (48, 16)),
        (70, 51, 1, 16, (16, 16)),
        (1000, 51, 600 * 51, 16, (592, 51)),
        (32768, 32768, 2**25, 128, (1024, 32768)),
        (512, 10**6, 2**25, 128, (512, 65536)),
        (4096, 10**6, 2**25, 128, (512, 65536)),
        (100, 10**6, 2**20, 128, (100, 10368)),
        (3, 0, 100, 16, (3, 0)),
    ],
)
def test_grid(n: int, m: int, pairs: int, step: int, expected: tuple[int, int]) -> None:
    rows, columns = plans.grid(n, m, pairs, step)
    assert (rows, columns) == expected
    assert plans.grid(n, m, pairs, step, whole_rows=True) == (min(n, max(step, pairs // max(m, 1) // step * step)), m)


@pytest.mark.parametrize(
    ("n", "m", "pairs", "step", "expected"),
    [
        (5, 7, 10**6, 16, (5, 7)),
        (70, 51, 40 * 40, 16, (32, 48)),
        (70, 51, 1, 16, (16, 16)),
        (32768, 32768, 2**26, 128, (8192, 8192)),
        (512, 10**6, 2**26, 128, (512, 131072)),
        (10**6, 512, 2**26, 128, (131072, 512)),
        (3, 0, 100, 16, (3, 0)),
    ],
)
def test_square_grid(n: int, m: int, pairs: int, step: int, expected: tuple[int, int]) -> None:
    assert plans.square_grid(n, m, pairs, step) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("4096", 4096), ("1KiB", 1024), ("128MiB", 2**27), ("128 MiB", 2**27), ("2GiB", 2**31)]
)
def test_workspace(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setattr(workspace, "_workspace", text)
    assert plans.workspace() == expected


@pytest.mark.parametrize("text", ["0", "-1", "128MB", "1.5GiB", "much", "0KiB"])
def test_bad_workspace(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(workspace, "_workspace", text)
    with pytest.raises(ValueError, match=f"FASTRET_WORKSPACE: expected a positive number.*got {text!r}"):
        plans.workspace()


def test_bad_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_chosen", "strips")
    with pytest.raises(
        ValueError, match="FASTRET_TRITON_PLAN: expected one of auto, fused, weights, strip, got 'strips'"
    ):
        masked_lse_op(torch.ones(2, 3, device=DEVICE), heads=[Head()], impl="triton")


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_cover_the_pair_matrix_within_the_workspace(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, whole_rows: bool
) -> None:
    step = config.granularity(DEVICE)
    bound = step * step * 50
    monkeypatch.setattr(workspace, "_workspace", str(bound))
    n, m = 3 * step + 5, 3 * step + 7
    u, v = (torch.randn(k, 40, device=DEVICE).to(dtype) for k in (n, m))
    strips = plans.Strips(u, v, whole_rows)
    found = torch.zeros(n, m, dtype=torch.float64, device=DEVICE)
    blocks = 0
    for b, scores in strips.blocks():
        assert (b.columns == m) or not whole_rows
        rows, columns = slice(b.first_row, b.first_row + b.rows), slice(b.first_column, b.first_column + b.columns)
        assert not found[rows, columns].any()
        found[rows, columns] = scores.to(torch.float64)
        weights = strips.space_of_weights()
        assert (weights is not None) == (dtype == torch.bfloat16)
        stored = scores.untyped_storage().nbytes() + (0 if weights is None else weights.untyped_storage().nbytes())
        assert stored <= bound
        blocks += 1
    assert blocks >= 2
    torch.testing.assert_close(found, u.to(torch.float64) @ v.to(torch.float64).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_rows_in_the_wider_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, in_place: bool
) -> None:
    """Where PyTorch multiplies half precision into float32, and where it does not, as on the CPU."""
    monkeypatch.setattr(products, "onto_float32", lambda *_: in_place)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (torch.randn(33, 600, device=DEVICE).to(dtype) for _ in range(2))
    exact = a.to(torch.float64) @ b.to(torch.float64).T
    space = torch.full((33, 48), torch.nan, dtype=wide, device=DEVICE)
    products.multiply(a, b.T, space[:, :33])
    torch.testing.assert_close(space[:, :33].to(torch.float64), exact, rtol=1e-5, atol=1e-4)
    products.add_product(space[:, :33], a, b.T)
    torch.testing.assert_close(space[:, :33].to(torch.float64), 2 * exact, rtol=1e-5, atol=2e-4)
    products.add_product(space[:, :33], a.to(wide), b.T)
    torch.testing.assert_close(space[:, :33].to(torch.float64), 3 * exact, rtol=1e-5, atol=3e-4)
    assert space[:, 33:].isnan().all()


def test_half_precision_is_widened_where_pytorch_has_no_wide_product() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        rows = torch.zeros(2, 2, dtype=dtype)
        assert not products.into_float32(rows)
        assert not products.onto_float32(rows)


def test_what_pytorch_has_is_found_in_its_operators() -> None:
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert (release >= (2, 8)) == products.INTO_FLOAT32
    assert (release >= (2, 11)) == products.ONTO_FLOAT32


def test_wide_products_are_used_where_pytorch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that CUDA takes, which the CPU lacks."""
    calls = []

    def wide(f: Any) -> Any:
        def call(*given: Tensor, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
            calls.append((f.__name__, out is not None))
            result = f(*(t.float() for t in given))
            assert result.dtype == out_dtype
            return result if out is None else out.copy_(result)

        return call

    a = torch.randn(5, 8).bfloat16()
    total = torch.ones(5, 5)
    expected = a.float() @ a.float().T
    monkeypatch.setattr(torch, "mm", wide(torch.mm))
    monkeypatch.setattr(torch, "addmm", wide(torch.addmm))
    monkeypatch.setattr(products, "into_float32", lambda *_: True)
    products.multiply(a, a.T, total)
    for onto in (True, False):
        monkeypatch.setattr(products, "onto_float32", lambda *_, onto=onto: onto)
        products.add_product(total, a, a.T)
    torch.testing.assert_close(total, 3 * expected)
    assert calls == [("mm", True), ("addmm", True), ("mm", False)]


KERNELS = [
    (masked_lse, ("masked_lse_kernel", "masked_lse_gradient_kernel")),
    (rank_sums, ("positive_scores_kernel", "rank_sums_kernel", "rank_gradient_kernel")),
    (row_extrema, ("row_extrema_kernel",)),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """PRECISION of every launch, by kernel."""
    found: dict[str, set[str]] = {}

    class Watched:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                found.setdefault(self.name, set()).add(options["PRECISION"])
                self.kernel[grid](*arguments, **options)

            return launch

    for module, names in KERNELS:
        for name in names:
            monkeypatch.setattr(module, name, Watched(getattr(module, name), name))
    return found


def everything(dtype: torch.dtype, width: int = 5) -> None:
    """Launches every kernel that multiplies rows of S, where it is fused."""
    x = torch.randn(9, width, device=DEVICE).to(dtype).requires_grad_()
    (lse, _), *_ = masked_lse_op(x, heads=[Head(2.0)], impl="triton")
    lse.sum().backward()
    labels = torch.arange(9, device=DEVICE) // 3
    rank_sums_op(x, labels, temperature=0.1, impl="triton").rank_all.sum().backward()
    row_extrema_op(x, extrema=[("max", PairMask())], impl="triton")


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_products_are_as_precise_as_pytorch_is_told(
    fused: None, launched: dict[str, set[str]], setting: str, expected: str
) -> None:
    torch.set_float32_matmul_precision(setting)
    everything(torch.float32)
    assert launched == {name: {expected} for _, names in KERNELS for name in names}


def test_the_setting_of_cuda_alone_is_heard(launched: dict[str, set[str]]) -> None:
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "tf32"
        everything(torch.float32)
    finally:
        matmul.fp32_precision = "ieee"
    assert set().union(*launched.values()) == {"tf32"}


def test_wide_rows_go_by_strips(launched: dict[str, set[str]]) -> None:
    """Nothing is asked for: rows that no program holds leave the fused gradients alone."""
    everything(torch.float32, 144)
    fused = {"masked_lse_gradient_kernel", "rank_gradient_kernel"}
    assert launched.keys() == {name for _, names in KERNELS for name in names} - fused


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_setting_is_float32s(launched: dict[str, set[str]], dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("high")
    everything(dtype)
    assert set().union(*launched.values()) == {"ieee"}


def test_tf32_has_tiles_of_its_own() -> None:
    assert config.choices("gradient", "sm_80", 4, tf32=True) != config.choices("gradient", "sm_80", 4)
    assert config.choices("lse listed", "sm_80", 4, tf32=True) == config.choices("lse listed", "sm_80", 4)
    for kind in ("gradient", "lse gradient"):  # the plan does not depend on it
        for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
            slices = [config.choices(kind, architecture, 4, tf32)[-1]["SLICE"] for tf32 in (False, True)]
            assert slices[0] == slices[1]
