"""Losses by Triton against the same losses by the reference, and one of them under torch.compile. What each loss is, is
tested in tests/losses; that of half-precision rows Triton multiplies unit rows rounded to them, in
test_triton_masked_lse.py."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastret
from fastret import functional as F
from fastret.backends.pairs import Head, PairMask
from fastret.ops import masked_lse, row_extrema
from fastret.ops.heads import flatten
from fastret.ops.problem import LEARNED, pack

F64 = torch.float64
COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
N, M = (130, 150) if COMPILED else (18, 21)
CLASSES = 5

# The exponent of a forbidden pair may overflow before it is discarded, log2(0) is meant; numpy, which interprets,
# remarks on both.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning")


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 9, generator=torch.Generator().manual_seed(seed), dtype=F64).to(DEVICE)


def labels(count: int, seed: int) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


OWN, OTHERS = labels(N, 1), labels(M, 2)
NOISE = torch.randint(0, M, (N, 19), generator=torch.Generator().manual_seed(3)).to(DEVICE)
PERMUTATION = torch.randperm(9, generator=torch.Generator().manual_seed(4)).to(DEVICE)


def patch_mix(x: Tensor, y: Tensor, temperature: Tensor, impl: str) -> Tensor:
    """Features as patches of one number."""
    mixed = F.patchmix(x[:, :, None], 1, 2, permutation=PERMUTATION, impl=impl)[:, :, 0]
    return fastret.PatchMixLoss(2, temperature, impl=impl)(x, y[:N], y[-N:], mixed, y[:N].roll(3, 0))


def npid(x: Tensor, y: Tensor, impl: str) -> Tensor:
    """The second batch, which the first has set Z, the bank and the noise for."""
    module = fastret.NPID(M, 9, num_noise=19, temperature=0.7, dtype=x.dtype, seed=5, impl=impl).to(DEVICE)
    module.bank.memory.copy_(y.detach())
    with fastret.backend(impl):  # of the update
        module(x.detach().requires_grad_(), 2 * OWN).backward()
    return module(x, 2 * OWN)


def nce_average(x: Tensor, y: Tensor, impl: str) -> Tensor:
    average = fastret.NCEAverage(9, M, 19, T=0.7).to(DEVICE, x.dtype)
    average.memory.copy_(y.detach())
    with fastret.backend(impl):
        return fastret.NCECriterion(M)(average(x, 2 * OWN), 2 * OWN)[0]


# Of x (N, D), y (M, D), classes (CLASSES, D) and a learned number; each loss uses what it needs.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "InfoNCE": lambda x, y, c, a, **k: F.info_nce(x, y, OWN, temperature=a, **k),
    "CLIP": lambda x, y, c, a, **k: F.clip(x, y[: len(x)], a, **k),
    "SupCon": lambda x, y, c, a, **k: F.sup_con(x, OWN, **k),
    "NTXent": lambda x, y, c, a, **k: F.nt_xent(x, OWN, **k),
    "MultiSimilarity": lambda x, y, c, a, **k: F.multi_similarity(x, OWN, alpha=a, beta=20.0, **k),
    "MultiSimilarity, mined": lambda x, y, c, a, **k: F.multi_similarity(x, OWN, alpha=a, mining_margin=0.1, **k),
    "MultiSimilarity, gallery, mined": lambda x, y, c, a, **k: F.multi_similarity(
        x, OWN, ref_emb=y, ref_labels=OTHERS, alpha=a, beta=10.0, mining_margin=-0.1, **k
    ),
    "InvariantSpreading": lambda x, y, c, a, **k: F.invariant_spreading(x, temperature=a, **k),
    "InvariantSpreading, both sides": lambda x, y, c, a, **k: F.invariant_spreading(
        x, temperature=a, negative_weight=2.0, detach_columns=False, **k
    ),
    "CentroidTriplet": lambda x, y, c, a, **k: F.centroid_triplet(x, c, OWN, **k),
    "CentroidTriplet, rows as given": lambda x, y, c, a, **k: F.centroid_triplet(x, c, OWN, normalize=False, **k),
    "ProxyNCA": lambda x, y, c, a, **k: F.proxy_nca(x, c, OWN, smoothing=0.1, **k),
    "ProxyAnchor": lambda x, y, c, a, **k: F.proxy_anchor(x, c, OWN, **k),
    "PatchMix": lambda x, y, c, a, **k: patch_mix(x, y, a, **k),
    "NCE": lambda x, y, c, a, **k: F.nce(x, y, 2 * OWN, NOISE, temperature=a, Z=30.0, **k),
    "NPID": lambda x, y, c, a, **k: npid(x, y, **k),
    "NCEAverage": lambda x, y, c, a, **k: nce_average(x, y, **k),
}


def value_and_gradients(name: str, dtype: torch.dtype, impl: str) -> list[Tensor]:
    inputs = [rows(N, 5), rows(M, 6), rows(CLASSES, 7), torch.tensor(0.7, dtype=F64, device=DEVICE)]
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    loss = LOSSES[name](*leaves, impl=impl)
    gradients = torch.autograd.grad(7 * loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_reference(name: str, dtype: torch.dtype) -> None:
    bound = 1e-12 if dtype == F64 else 3e-5
    pairs = zip(value_and_gradients(name, dtype, "triton"), value_and_gradients(name, F64, "reference"), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.to(F64), expected, rtol=bound, atol=bound * (1 + expected.abs().max().item()))


def test_compiles_in_one_graph() -> None:
    """Under the interpreter too: kernels run inside operators, which are opaque to the compiler."""
    x = rows(N, 5).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return F.multi_similarity(x, OWN, mining_margin=0.1, impl="triton")

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        value = function(x)
        results.append([value.detach(), *torch.autograd.grad(value, x)])
    torch.testing.assert_close(*results)


def check_operators(heads: Sequence[Head]) -> None:
    x, y = rows(6, 5), rows(7, 6)
    problem = pack(x, y, heads, normalize=True, first_column=0, columns=7, impl="triton")
    torch.library.opcheck(torch.ops.fastret.masked_lse.default, problem)
    lses = [lse for lse, _ in masked_lse(x, y, heads=heads, impl="triton")]
    grads = [torch.ones_like(lse) for lse in lses for _ in range(2)]
    torch.library.opcheck(torch.ops.fastret.masked_lse_backward.default, (grads, lses, *problem, [True] * LEARNED))


@pytest.mark.parametrize("plan", ["fused", "weights", "strips"])
def test_operators_are_what_pytorch_expects(request: pytest.FixtureRequest, plan: str) -> None:
    request.getfixturevalue(plan)
    scale = torch.tensor(2.0, dtype=F64, device=DEVICE)
    bias = torch.full((6,), -3.0, dtype=F64, device=DEVICE)
    column_bias = torch.zeros(7, dtype=F64, device=DEVICE)
    check_operators([Head(scale, PairMask(offset=0), row_bias=bias, column_bias=column_bias, reduce="log1m_exp")])
    flat = flatten([Head(mask=PairMask(offset=1, above=bias), reduce="max")], F64)
    settings = (flat.tensors, flat.numbers, flat.factors, flat.spec, True, 2, "triton")
    for gallery in (rows(7, 6), None):
        torch.library.opcheck(torch.ops.fastret.row_extrema.default, (rows(6, 5), gallery, *settings))


@pytest.mark.parametrize("op", ["masked_lse", "row_extrema"])
def test_a_second_differentiation_is_refused(op: str) -> None:
    x = rows(6, 5).requires_grad_()
    if op == "masked_lse":
        ((value, _),) = masked_lse(x, heads=[Head(2.0)], impl="triton")
    else:
        ((value, _),) = row_extrema(x, extrema=[("max", PairMask(offset=0))], impl="triton")
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()
