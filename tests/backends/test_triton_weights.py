"""masked_lse by Triton with stored pair weights: blocks of any shape, and float16, which has too little range for
gradients. Every mask, target and phi in it: test_triton_masked_lse.py."""

import math
from dataclasses import replace

import pytest
import torch
from masked_lse_cases import COMPILED, DEVICE, DTYPES, F64, MASKS, TARGETS, M, N, check, labels, rows, uniform

from fastret.backends.pairs import Block, Need
from fastret.backends.triton import masked_lse as backend
from fastret.backends.triton import masked_lse_blocks, plans
from fastret.ops import Head, Indexed, PairMask, Shifted, masked_lse

# The exponent of a forbidden pair may overflow before it is discarded, log2(0) is meant; numpy, which interprets,
# remarks on both.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning")


@pytest.mark.parametrize("workspace", ["7KiB", "1GiB"])
@pytest.mark.parametrize("gallery", [True, False])
def test_two_heads_of_weights_in_blocks_of_any_shape(
    monkeypatch: pytest.MonkeyPatch, weights: None, gallery: bool, workspace: str
) -> None:
    """Several programs to a block that sweep several tiles each, and a rest; what is learned has all its gradients."""
    monkeypatch.setattr(plans, "_workspace", workspace)
    n, m = (3 * N + 5, 5 * M) if gallery else (5 * N, 5 * N)
    x, y = rows(n, 70), rows(m, 70, seed=6) if gallery else None
    scale = torch.tensor(9.0, device=DEVICE)
    head = Head(scale, MASKS["not self"](n, m), Shifted(2), 0.1, uniform(n), uniform(m))
    check(x, y, [head, replace(head, axis="column", scale=-1.5, row_bias=None)])


HALF = torch.float16


@pytest.mark.parametrize("phi_name", [None, "hinge", "distance"])
@pytest.mark.parametrize(("factor", "length"), [(1e-6, 2**-10), (1.0, 1.0), (65536.0, 2**10)])
def test_weights_of_float16_are_scaled(
    monkeypatch: pytest.MonkeyPatch, weights: None, phi_name: str | None, factor: float, length: float
) -> None:
    """Upstream gradients beyond its range and below it; many softmax weights below 6e-8, where it ends; rows with
    upstream gradients a thousand times smaller than others. Rows are as long as keeps their own gradients in range."""
    monkeypatch.setattr(plans, "_workspace", "128KiB" if COMPILED else "4KiB")
    n, m = (N, 4000) if COMPILED else (18, 300)
    x, y = (length * rows(n, 70)).to(HALF), (length * rows(m, 70, seed=6)).to(HALF)
    head = Head(60.0, target=Indexed(labels(n, m)), smoothing=0.1)
    if phi_name is not None:
        head = replace(head, scale=2.0, row_bias=-2.5 + torch.zeros(n, device=DEVICE), reduce=phi_name)
    g = uniform(n).to(torch.float32) * factor
    g[::3] *= 1e-3
    h = -g.flip(0)
    options = {"normalize": True, "first_column": 0, "columns": m}
    (lse, _), *_ = backend.forward(x, y, [head], **options)
    if phi_name is None:
        share = torch.exp(60 * torch.nn.functional.normalize(x.float()) @ torch.nn.functional.normalize(y.float()).T)
        assert ((share / share.sum(1, keepdim=True)) < 6e-8).float().mean() > 0.3
    found = backend.backward([(g, h)], x, y, [head], [lse], need=Need(True, True, False, False, False), **options)
    # the definition, of unit rows as the kernels have them
    units = [torch.nn.functional.normalize(t.to(F64)).to(HALF).to(F64).requires_grad_() for t in (x, y)]
    ((lse, t),) = masked_lse(*units, heads=[head], normalize=False, impl="reference")
    of_units = torch.autograd.grad((lse * g).sum() + (t * h).sum(), units)
    for got, of_unit, unit, given in zip((found.x, found.y), of_units, units, (x, y), strict=True):
        norms = given.to(F64).norm(dim=1, keepdim=True)
        expected = (of_unit - (of_unit * unit).sum(1, keepdim=True) * unit) / norms
        error = (got.to(F64) - expected).norm(dim=1, keepdim=True)
        bound = 2**-9 * (of_unit / norms).norm(dim=1, keepdim=True) + 70 * torch.finfo(HALF).smallest_normal * 2**-10
        assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("upstream", [0.0, math.inf, math.nan])
def test_scaled_weights_of_nothing_and_of_too_much(weights: None, upstream: float) -> None:
    """Zero is zero; what is not finite stays with the row that it is given to, and with all columns."""
    x, y = rows(N, 70).to(HALF), rows(M, 70, seed=6).to(HALF)
    g = torch.full((N,), 0.0 if upstream == 0 else 1e-5, device=DEVICE)
    g[3] = upstream
    options = {"normalize": False, "first_column": 0, "columns": M}
    head = Head(0.5)
    (lse, _), *_ = backend.forward(x, y, [head], **options)
    found = backend.backward([(g, 0 * g)], x, y, [head], [lse], need=Need(True, True, False, False, False), **options)
    assert found.y.isfinite().all() == (upstream == 0)
    bad = ~found.x.isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == ([] if upstream == 0 else [3])
    g[3] = 0
    kept = backend.backward([(g, 0 * g)], x, y, [head], [lse], need=Need(True, False, False, False, False), **options)
    assert torch.equal(found.x[~bad], kept.x[~bad])
    assert (kept.x.abs().sum() > 0) == (upstream != 0)


def test_what_goes_by_weights_in_float16() -> None:
    """Not slopes without a bound, but where thresholds need the tiles of the others: then in float32."""

    def blocks(head: Head, dtype: torch.dtype) -> tuple[str, torch.dtype | None]:
        x = rows(N, 70).to(dtype)
        (problem,) = backend._problems(x, None, [head], normalize=False, first_column=0, columns=N)
        space = problem.blocks.space_of_weights()
        return problem.plan, None if space is None else space.dtype

    mined = MASKS["above"](N, N)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plans, "_chosen", "auto")
        for reduce in ("lse", "hinge", "distance"):
            assert blocks(Head(reduce=reduce), HALF) == ("weights", HALF)
        for reduce in ("log1m_exp", "inverse_distance"):
            assert blocks(Head(reduce=reduce), HALF)[0] == "fused"
            assert blocks(Head(mask=mined, reduce=reduce), HALF) == ("weights", torch.float32)
            assert blocks(Head(reduce=reduce), torch.bfloat16) == ("weights", torch.bfloat16)
        assert blocks(Head(), torch.float32)[0] == "fused"


@pytest.mark.parametrize("name", TARGETS)
def test_no_weight_leaves_float16(name: str) -> None:
    """The bound is above every weight of a target, and at most 8 times the heaviest; the power of two follows it."""
    target = TARGETS[name](N, M)
    pairs = torch.zeros(N, M, dtype=F64, device=DEVICE)
    y = pairs if target is None else target.block(Block(0, N, 0, M), pairs - 0.1).to(F64)
    g, h = uniform(N) - 0.5, 3e4 * (uniform(N, seed=4) - 0.5)
    lse = torch.zeros_like(g)
    lse[2], g[2] = -math.inf, 1e30
    for smoothing in (0.0, 0.4):
        head = Head(torch.tensor(-2.5, dtype=F64, device=DEVICE), target=target, smoothing=smoothing)
        unit = masked_lse_blocks.power_of_two([head, Head(2.0)], [(lse, g, h), (lse, g, h)], M)
        assert torch.frexp(unit)[0] == 0.5
        weights = 2.5 * ((1 - smoothing) * y + smoothing / M).abs().amax() * h.abs().amax()
        weights += 4.5 * g[lse == 0].abs().amax()
        assert 2**15 / 64 <= weights * unit <= 2**14
    for most in (0.0, 1e-38, 1e30):
        inverse = 1 / masked_lse_blocks.power_of_two([Head()], [(lse[:1], lse[:1].float() + most, lse[:1])], M).float()
        assert inverse.isfinite()
        assert inverse >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize(("plan", "workspace"), [("fused", "1KiB"), ("weights", "1GiB")])
@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("axes", [("row", "column"), ("column", "row"), ("row", "row"), ("column", "column")])
def test_two_heads_of_one_product(
    monkeypatch: pytest.MonkeyPatch, axes: tuple[str, str], gallery: bool, workspace: str, plan: str
) -> None:
    """Over either side, of as many lines at a time as there is room for, in parts of the other side; by turns with a
    phi, without a target, with columns that begin elsewhere, and with lines that have no pair."""
    monkeypatch.setattr(plans, "_chosen", plan)
    monkeypatch.setattr(plans, "_workspace", workspace)
    turn = ["row", "column"].index(axes[0]) + 2 * gallery + 4 * (workspace == "1KiB")
    n, m = (2 * N + 5, 3 * M) if gallery else (3 * N, 3 * N)
    x, y = rows(n, 30), rows(m, 30, seed=6) if gallery else None
    alone = torch.where(torch.arange(n, device=DEVICE) == 4, 9, 0)
    mask = PairMask(different=(alone, torch.full((m,), 9, device=DEVICE)))
    first = Head(torch.tensor(4.0, device=DEVICE), PairMask(offset=0) if turn % 3 else mask, Shifted(3), axis=axes[0])
    second = Head(
        torch.tensor(-3.0, device=DEVICE),
        target=(None, Indexed(labels(n, m)))[turn % 2],
        reduce=("lse", "hinge")[turn // 2 % 2],
        axis=axes[1],
        column_bias=None if turn // 2 % 2 else uniform(m),
    )
    options = {"first_column": 2 * gallery, "columns": m + 5}
    (problem,) = backend._problems(x, y, [first, second], normalize=True, **options)
    assert not problem.heavy
    check(x, y, [first, second], DTYPES[turn % 4], **options)
