"""masked_lse by Triton against the definition in float64: compiled where there is a GPU, else interpreted.

The interpreter's blocks are 16 rows, 16 columns and 32 features: the shapes below have several of each and a rest on
every axis. On a GPU there are several times as many rows.
"""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from masked_lse_cases import (
    COMPILED,
    DEVICE,
    DTYPES,
    F64,
    MASKS,
    TARGETS,
    WIDE,
    M,
    N,
    assert_close,
    check,
    labels,
    rows,
    seeded,
    uniform,
    values_and_gradients,
)
from torch import Tensor

from fastret.backends import phi
from fastret.backends.pairs import Gradients, Need
from fastret.backends.rows import accumulation_dtype
from fastret.backends.triton import masked_lse as backend
from fastret.backends.triton import plans
from fastret.kernels.triton import config
from fastret.kernels.triton import masked_lse as kernels
from fastret.ops import Head, Indexed, Masked, PairMask, Shifted, masked_lse, masked_lse_sum

# The exponent of a forbidden pair may overflow before it is discarded, log2(0) is meant; numpy, which interprets,
# remarks on both.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning"),
    pytest.mark.usefixtures("fused"),  # what is tested by strips says so
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_target(mask: str, target: str) -> None:
    """On both axes, in dtypes by turns: every mask and every target meets each of them."""
    a, b = list(MASKS).index(mask), list(TARGETS).index(target)
    dtype, gallery = DTYPES[(a + b) % 4], (a + 2 * b) % 3 > 0
    m = M if gallery else N
    x, y = rows(N, 5), rows(m, 5, seed=6) if gallery else None
    head = Head(
        torch.tensor(2.5, device=DEVICE),
        MASKS[mask](N, m),
        TARGETS[target](N, m),
        0.2 * (a % 2),
        uniform(N),
        uniform(m) - 0.5,
    )
    check(x, y, [head, replace(head, axis="column", scale=-1.5, row_bias=None)], dtype)


@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("mask", ["any", "different", "not self", "below", "all at once"])
@pytest.mark.parametrize("name", phi.NAMES)
def test_every_phi(name: str, mask: str, gallery: bool) -> None:
    """Over rows beside a log-sum-exp, and over columns; in dtypes by turns."""
    turn = phi.NAMES.index(name) + list(MASKS).index(mask) + gallery
    m = M if gallery else N
    x, y = rows(N, 5), rows(m, 5, seed=6) if gallery else None
    # no argument is near 0, where slopes are large and rows rounded to half precision have others; the hinge has a kink
    far = 0.0 if name == "hinge" else -3.0
    scale = torch.tensor(2.0, device=DEVICE)
    head = Head(scale, MASKS[mask](N, m), Shifted(2), 0.1, far - uniform(N), uniform(m) * 0.2, reduce=name)
    heads = [head, Head(5.0, PairMask(offset=1)), replace(head, axis="column", scale=-1.5, target=None, smoothing=0.0)]
    check(x, y, heads, DTYPES[turn % 4])


@pytest.mark.parametrize(("gallery", "normalize"), [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows(dtype: torch.dtype, gallery: bool, normalize: bool) -> None:
    """Several slices and blocks of features, and a rest."""
    m = M if gallery else N
    x, y = rows(N, WIDE), rows(m, WIDE, seed=6) if gallery else None
    scale = 8.0 if normalize else 8.0 / WIDE
    check(x, y, [Head(scale, PairMask(offset=1), Indexed(labels(N, m)))], dtype, normalize=normalize)


@pytest.mark.parametrize("plan", ["weights", "strips"])
@pytest.mark.parametrize("k", range(len(MASKS)))
def test_every_mask_and_target_by_blocks(request: pytest.FixtureRequest, plan: str, k: int) -> None:
    """On both axes by turns, with all that a head has, cut to blocks; rows of 520 features and more, of 70 and more
    where weights alone are stored."""
    request.getfixturevalue(plan)
    dtype, gallery = DTYPES[(k + (plan == "weights")) % 4], k % 3 > 0
    m, width = M if gallery else N, (520 if plan == "strips" else 70) + 29 * k
    x, y = rows(N, width), rows(m, width, seed=6) if gallery else None
    target = list(TARGETS.values())[k](N, m)
    head = Head(torch.tensor(9.0, device=DEVICE), list(MASKS.values())[k](N, m), target, 0.2 * (k % 2), uniform(N))
    other = Head(-7.0, row_bias=uniform(N) - 4, column_bias=-uniform(m), reduce=phi.NAMES[k % len(phi.NAMES)])
    heads = [
        replace(h, axis=a) for h, a in ((head, ("row", "column")[k // 2 % 2]), (other, "row"), (Head(5.0), "column"))
    ]
    check(x, y, heads, dtype, first_column=3 * gallery, columns=m + 5)


@pytest.mark.parametrize("plan", ["weights", "strips"])
@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_and_one(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, plan: str, dtype: torch.dtype, gallery: bool
) -> None:
    """And rows as they are: of 1,100 features, and of prefixes."""
    request.getfixturevalue(plan)
    if gallery:
        monkeypatch.setattr(plans, "_workspace", "1GiB")
    m = M if gallery else N
    x, y = rows(N, 1100), rows(m, 1100, seed=6) if gallery else None
    head = Head(8.0 / 1100, PairMask(offset=1), Indexed(labels(N, m)), column_bias=uniform(m))
    check(x, y, [head, replace(head, axis="column", width=700)], dtype, normalize=False)


@pytest.mark.parametrize(("n", "m", "width"), [(1, 1, 1), (1, 33, 3), (33, 1, 16), (17, 16, 33), (5, 0, 7)])
def test_shapes(n: int, m: int, width: int) -> None:
    x, y = rows(n, width), rows(m, width, seed=6) if m else None
    heads = [Head(3.0, target=Shifted(), axis=axis, smoothing=0.1) for axis in ("row", "column")]
    check(x, y, heads)


@pytest.mark.parametrize("gallery", [True, False])
def test_many_heads_and_widths(gallery: bool) -> None:
    """More heads of a width than share a product, and prefixes of the rows."""
    m = M if gallery else N
    x, y = rows(N, 40), rows(m, 40, seed=6) if gallery else None
    both = labels(N), labels(m, seed=3)
    heads = [
        Head(-2.0, PairMask(same=both, offset=0)),
        Head(5.0, PairMask(different=both), row_bias=uniform(N)),
        Head(torch.tensor(3.0, device=DEVICE), target=Indexed(labels(N, m)), axis="column"),
        Head(4.0, target=Shifted(1), width=17, smoothing=0.1),
        Head(4.0, target=Shifted(1), width=3, column_bias=uniform(m)),
    ]
    check(x, y, heads)


@pytest.mark.parametrize("name", ["index", "shifted, wrapped", "circulant, offset", "same label", "listed"])
def test_pieces_of_the_columns(name: str) -> None:
    """Partial results merge to those of all columns; so do the gradients."""
    x, y = rows(N, 9).requires_grad_(), rows(M, 9, seed=6).requires_grad_()
    cut = M - 1
    lone = Masked(PairMask(same=(labels(N), labels(M, seed=3))), uniform(N))
    target = lone if name == "same label" else TARGETS[name](N, M)
    head = Head(3.0, PairMask(offset=2, period=M), target, smoothing=0.25)

    def piece(begin: int, end: int) -> Head:
        if name != "same label":
            return head
        return replace(head, target=replace(lone, mask=PairMask(same=(labels(N), labels(M, seed=3)[begin:end]))))

    parts = [
        masked_lse(x, y[a:b], heads=[piece(a, b)], first_column=a, columns=M, impl="triton")[0]
        for a, b in ((0, cut), (cut, M))
    ]
    merged = torch.logaddexp(parts[0][0], parts[1][0]), parts[0][1] + parts[1][1]
    whole = masked_lse(x, y, heads=[head], impl="reference")[0]
    assert_close(merged, whole, 1e-13)
    gradients = [torch.autograd.grad((r[0].sin() + r[1].cos()).sum(), (x, y)) for r in (merged, whole)]
    assert_close(*gradients, 1e-13)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    x, y = rows(N, 6).float(), rows(M, 6, seed=6).float()
    heads = [Head(scale, target=Shifted()), Head(-scale, PairMask(offset=0), axis="column")]
    results, gradients, _ = values_and_gradients(x, y, heads, impl="triton")
    expected, *_ = values_and_gradients(x.to(F64), y.to(F64), heads, impl="reference")
    assert_close(results, expected, 1e-6)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_rows_without_a_pair(axis: str) -> None:
    """-inf and no gradient, whatever the upstream gradient; the others are not touched."""
    x, y = rows(6, 3).requires_grad_(), rows(6, 3, seed=6).requires_grad_()
    mask = PairMask(same=(torch.tensor([0, 0, 1, 1, 2, 5]).to(DEVICE), torch.tensor([0, 1, 1, 0, 7, 7]).to(DEVICE)))
    ((lse, t),) = masked_lse(x, y, heads=[Head(2.0, mask, axis=axis)], impl="triton")
    assert lse.isneginf().tolist() == [False] * 4 + [True] * 2
    assert not t.any()
    for upstream in (1.0, math.inf, math.nan):
        given = torch.tensor([1.0] * 4 + [upstream] * 2, dtype=F64, device=DEVICE)
        dx, dy = torch.autograd.grad(lse, (x, y), given, retain_graph=True)
        for g in (dx, dy):
            assert not g[4:].any()
            assert g[:4].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["x", "y"])
def test_bad_values_are_never_hidden(bad: float, side: str) -> None:
    x, y = rows(5, 3), rows(7, 3, seed=6)
    (x if side == "x" else y)[4, 1] = bad
    heads = [Head(2.0, PairMask(offset=4), row_bias=uniform(5)), Head(2.0, axis="column")]
    results, gradients, _ = values_and_gradients(x, y, heads, normalize=False, impl="triton")
    assert all(t.isnan().all() for t in (*results, *gradients))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_no_pair(n: int, m: int) -> None:
    scale = torch.tensor(2.0, device=DEVICE)
    heads = [Head(2.0, target=Shifted(), row_bias=uniform(n)), Head(scale, axis="column"), Head(reduce="hinge")]
    check(rows(n, 6), rows(m, 6), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_low_precision_is_no_worse_than_dense_torch(dtype: torch.dtype, gallery: bool, scale: float) -> None:
    """|ours - float64| <= 2 |dense torch in the same dtype - float64| + a few units in the last place."""
    x, y = rows(N, 32).to(dtype), rows(M, 32, seed=6).to(dtype) if gallery else None
    head = Head(scale, PairMask(offset=3), Indexed(labels(N, M if gallery else N)))
    truth = values_and_gradients(x.to(F64), None if y is None else y.to(F64), [head], impl="reference")
    ours = values_and_gradients(x, y, [head], impl="triton")
    leaves = [t.clone().requires_grad_() for t in (x, y) if t is not None]
    unit = [torch.nn.functional.normalize(t) for t in leaves]
    logits = unit[0] @ unit[-1].T * scale
    mask = torch.arange(len(unit[-1]), device=DEVICE) != torch.arange(N, device=DEVICE)[:, None] + 3
    dense = [torch.where(mask, logits, -math.inf).logsumexp(1), logits.gather(1, head.target.index[:, None])[:, 0]]
    generator = seeded(7)
    weights = [torch.randn(N, generator=generator, dtype=F64).to(r) for r in dense]
    dense += torch.autograd.grad(weights[0] @ dense[0] + weights[1] @ dense[1], leaves)
    for o, e, t in zip([*ours[0], *ours[1]], dense, [*truth[0], *truth[1]], strict=True):
        error, naive = (o.to(F64) - t).abs().max(), (e.to(F64) - t).abs().max()
        assert error <= 2 * naive + 4 * torch.finfo(o.dtype).eps * t.abs().max(), (error.item(), naive.item())


@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_gradients_one_by_one(request: pytest.FixtureRequest, plan: str, gallery: bool) -> None:
    """Each wanted alone equals the same among all; what is not wanted is not there."""
    request.getfixturevalue(plan)
    m = M if gallery else N
    x, y = rows(N, 12), rows(m, 12, seed=6) if gallery else None
    scale = torch.tensor(2.5, dtype=F64, device=DEVICE)
    head = Head(scale, PairMask(offset=0), Shifted(1), 0.0, uniform(N), uniform(m))
    options = {"normalize": True, "first_column": 0, "columns": m}
    lse, t = backend.forward(x, y, [head], **options)[0]

    def entries(need: Need) -> list[Tensor | None]:
        g: Gradients = backend.backward([(lse, t)], x, y, [head], [lse], need=need, **options)
        return [g.x, g.y, g.scale[0], g.row_bias[0], g.column_bias[0]]

    among = entries(Need(True, gallery, True, True, True))
    for k in range(5):
        if k != 1 or gallery:
            alone = entries(Need(*(i == k for i in range(5))))
            assert [e is not None for e in alone] == [i == k for i in range(5)]
            torch.testing.assert_close(alone[k], among[k], rtol=1e-12, atol=1e-12)


@triton.jit
def own_tile_kernel(
    u, v, s, n, m, width, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    own, other = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tile = kernels.own_tile(u, v, own % n, other % m, width, s.dtype.element_ty, TRANSPOSED, "ieee", BLOCK_K)
    tl.store(s + own[:, None] * BLOCK_N + other[None, :], tile)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_see_the_same_bits(dtype: torch.dtype) -> None:
    """Programs that own rows and those that own columns compare the same scores."""
    x, y = rows(27, 48).to(dtype), rows(29, 48, seed=6).to(dtype)
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "SLICE": 7}
    s = torch.empty(64, 32, dtype=accumulation_dtype(dtype), device=DEVICE)
    turned = torch.empty_like(s.T, memory_format=torch.contiguous_format)
    own_tile_kernel[(1,)](x, y, s, 27, 29, 48, TRANSPOSED=False, **backend.oriented(tile, False))
    own_tile_kernel[(1,)](y, x, turned, 29, 27, 48, TRANSPOSED=True, **backend.oriented(tile, True))
    assert torch.equal(s, turned.T)
    torch.testing.assert_close(s[:27, :29], (x.to(s.dtype) @ y.to(s.dtype).T))


def test_only_launches_that_compare_or_hold_much_take_small_tiles() -> None:
    def heavy(*heads: Head) -> bool:
        options = {"normalize": True, "first_column": 0, "columns": M}
        (problem,) = backend._problems(rows(N, 4), rows(M, 4), heads, **options)
        return problem.heavy

    clip = Head(target=Shifted())
    sup_con = Head(mask=PairMask(offset=0), target=TARGETS["same label"](N, M))
    assert not heavy(clip, replace(clip, axis="column"))
    assert not heavy(sup_con)
    assert heavy(sup_con, sup_con)
    assert heavy(Head(mask=MASKS["below"](N, M)))
    assert heavy(Head(target=TARGETS["between"](N, M)))


def test_equal_from_run_to_run() -> None:
    x, y = rows(N, 12).float(), rows(M, 12, seed=6).float()
    heads = [Head(4.0, target=Shifted()), Head(4.0, target=Shifted(), axis="column")]
    one, two = (values_and_gradients(x, y, heads, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True))


@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_one_sweep_form(request: pytest.FixtureRequest, plan: str, gallery: bool) -> None:
    """With everything that has a gradient; a row of weight 0 counts nothing, though no pair of it is allowed."""
    request.getfixturevalue(plan)
    m = M if gallery else N
    weight = uniform(N)
    weight[3] = 0
    alone = torch.arange(N, device=DEVICE)
    mask = PairMask(
        different=(torch.where(alone == 3, 0, 1), torch.zeros(m, dtype=torch.int64, device=DEVICE)), offset=0
    )
    losses = []
    for impl in ("triton", "reference"):
        leaves = [
            t.requires_grad_() for t in (rows(N, 12), torch.tensor(4.0, dtype=F64), uniform(N), uniform(m, seed=4))
        ]
        y = rows(m, 12, seed=6).requires_grad_() if gallery else None
        x, scale, row_bias, column_bias = (t.to(DEVICE) for t in leaves)
        head = Head(scale, mask, Shifted(1, N), 0.1, row_bias, column_bias)
        loss = masked_lse_sum(x, y, head=head, row_weight=weight, impl=impl)
        wanted = leaves if y is None else [*leaves, y]
        losses.append([loss.detach(), *torch.autograd.grad(7 * loss, wanted)])
    assert_close(*losses, 1e-13)


def test_interpreted_shapes_have_several_of_everything() -> None:
    for kind in ("lse", "lse gradient", "lse heavy"):
        (options,) = config.choices(kind, "interpreter", 4)
        for size, block in ((N, "BLOCK_M"), (M, "BLOCK_N"), (WIDE, "BLOCK_K"), (WIDE, "SLICE")):
            assert options.get(block, 32) < size
            assert size % options.get(block, 32) != 0
    assert config.parts(torch.device("cpu"), 2, 2) > 1, "sums are added over parts of the other side"


def test_kernels_are_compiled_on_a_gpu_and_only_there() -> None:
    for kernel in (
        kernels.masked_lse_kernel,
        kernels.masked_lse_gradient_kernel,
        kernels.masked_lse_weights_kernel,
    ):
        assert isinstance(kernel, triton.JITFunction) == COMPILED


@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_nothing_waits_for_the_device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    request.getfixturevalue(plan)
    x, y = rows(N, 12), rows(M, 12, seed=6)
    scale = torch.tensor(2.5, dtype=F64, device=DEVICE)
    heads = [Head(scale, MASKS["all at once"](N, M), TARGETS["circulant"](N, M), 0.1, uniform(N), uniform(M))]
    options = {"normalize": True, "first_column": 0, "columns": M}

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read on the host")

    if COMPILED:
        torch.cuda.set_sync_debug_mode("error")
    else:
        for name in ("item", "tolist", "nonzero", "__int__", "__bool__", "__float__", "__index__"):
            monkeypatch.setattr(Tensor, name, refuse)
    try:
        results = backend.forward(x, y, heads, **options)
        need = Need(True, True, True, True, True)
        backend.backward(results, x, y, heads, [lse for lse, _ in results], need=need, **options)
    finally:
        if COMPILED:
            torch.cuda.set_sync_debug_mode("default")
