"""What the GPU tests run: a table of ops and losses, an entry each, and how an entry is compared with its definition.

The definition is the reference in float64, of the rows as their dtype has them. Where rows are normalised, Triton
kernels multiply unit rows rounded to the dtype: the reference then takes those, a gradient passes through the rounding.

On a machine with a GPU entries are several tiles and a rest on every axis of the compiled kernels; elsewhere, of the
interpreter's (``FASTRET_GPU_TESTS=cpu``). A new op or loss is a new entry of ``CASES``: which implementations run it
follows from the registry.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastret import functional as F
from fastret import ops
from fastret.backends import registry
from fastret.losses import NPID
from fastret.losses.dpq import DPQOutput
from fastret.ops import Head, Indexed, Listed, Masked, PairMask

F64 = torch.float64
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
N, M, WIDTH, WIDE, WORDS = (260, 301, 72, 600, 150) if ON_GPU else (20, 21, 9, 40, 21)
CLASSES, EACH, BOOKS = 5, 4, 2
KERNELS = ("triton", "cuda")  # implementations with kernels of their own

Leaves = Callable[[], list[Tensor]]
Results = tuple[Tensor, ...]


def rows(count: int, width: int = WIDTH, *, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=F64).to(DEVICE)


def numbers(count: int, below: int, *, seed: int) -> Tensor:
    return torch.randint(0, below, (count,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, device=DEVICE)


OWN, OTHERS = numbers(N, CLASSES, seed=1), numbers(M, CLASSES, seed=2)
EQUAL = (torch.arange(N) // EACH).to(DEVICE)  # N is a multiple of EACH
PAIRED = (torch.arange(N) % (N // 2)).to(DEVICE)
PLACES = numbers(N, M, seed=3)
NOISE = numbers(N * 7, M, seed=4).view(N, 7)
CODES = numbers(M * BOOKS, WORDS, seed=5).view(M, BOOKS).int()
ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(6)).to(DEVICE)
LISTED = Listed(
    (torch.arange(N + 1) * 2).to(DEVICE), numbers(2 * N, M, seed=7), rows(2 * N, 1, seed=8)[:, 0].abs().float()
)


@dataclass(frozen=True)
class Case:
    """An op or loss.

    Attributes:
        op: the reduction that decides which implementations serve it.
        leaves: its floating tensors in float64, on DEVICE. Those with an axis come in the dtype under test, single
            numbers in that of accumulation.
        call: ``call(*leaves, impl=...)``: what is compared.
        learned: how many of the leaves, from the first on, receive gradients; 0: the op has none.
        options: of ``registry.Call``.
        waits: a size depends on values, which costs CUDA one synchronisation, or a module is built in the call:
            neither captured nor traced.
        traced: False: kernels of CUDA C++ are called without a registered operator.
        selects: scores choose pairs or words, so that scores of TF32 rows may choose others.
        copies: results are input values, bit for bit, at any precision.
    """

    op: str
    leaves: Leaves
    call: Callable[..., Tensor | Results]
    learned: int = 1
    options: tuple[str, ...] = ()
    waits: bool = False
    traced: bool = True
    selects: bool = False
    copies: bool = False


def one() -> list[Tensor]:
    return [rows(N, seed=5)]


def two() -> list[Tensor]:
    return [rows(N, seed=5), rows(M, seed=6)]


def classes() -> list[Tensor]:
    return [rows(N, seed=5), rows(CLASSES, seed=7)]


def subspaces() -> list[Tensor]:
    return [rows(N, BOOKS * 8, seed=5), rows(BOOKS * WORDS, 8, seed=6).view(BOOKS, WORDS, 8)]


def centers() -> list[Tensor]:
    return [rows(N, seed=5), rows(CLASSES * 3, seed=7).view(CLASSES, 3, WIDTH)]


def _flat(*pairs: tuple[Tensor, Tensor]) -> Results:
    return tuple(t for pair in pairs for t in pair)


def _masked_lse(x: Tensor, y: Tensor, a: Tensor, *, impl: str) -> Results:
    own = Masked(PairMask(same=(OWN, OTHERS)), torch.ones(N, device=DEVICE))
    heads = [Head(a, PairMask(offset=1, period=M), Indexed(PLACES), 0.1), Head(3.0, target=own, axis="row")]
    return _flat(*ops.masked_lse(x, y, heads=heads, impl=impl))


def _column_lse(x: Tensor, y: Tensor, *, impl: str) -> Results:
    heads = [Head(4.0, PairMask(different=(OWN, OTHERS)), axis="column"), Head(5.0, target=LISTED)]
    return _flat(*ops.masked_lse(x, y, heads=heads, impl=impl))


def _topk(x: Tensor, y: Tensor, *, impl: str) -> Results:
    """Scores, and those of the pairs that are named: of two that are as near, either may be."""
    scores, place = ops.topk(x, y, k=5, metric="l2", impl=impl)
    return scores, (x[:, None].to(F64) - y[place].to(F64)).square().sum(2)


def _pq_topk(x: Tensor, codebook: Tensor, *, impl: str, table_dtype: torch.dtype = torch.float32) -> Results:
    scores, place = ops.pq_topk(x, codebook, CODES, k=5, table_dtype=table_dtype, impl=impl)
    words = codebook[torch.arange(BOOKS, device=DEVICE), CODES[place].long()].to(F64)
    return scores, (x.to(F64).view(N, 1, BOOKS, -1) - words).square().sum((2, 3))


def _half_tables(x: Tensor, codebook: Tensor, *, impl: str) -> Results:
    """Of eighths, whose distances are exact before they are rounded, and so rounded alike."""
    x, codebook = ((8 * t).round() / 8 for t in (x, codebook))
    return _pq_topk(x, codebook, impl=impl, table_dtype=torch.float16)[:1]


def _knn_vote(scores: Tensor, *, impl: str) -> Results:
    """Shares, and whether somebody has them: of two that are as great, either may be first."""
    scores = scores if scores.dtype == F64 else scores.float()
    winners, shares = ops.knn_vote(scores.sort(1, descending=True)[0], NOISE, OTHERS, CLASSES, top=3, impl=impl)
    return shares, (winners >= 0).to(shares.dtype)


def _updated(x: Tensor, bank: Tensor, *, impl: str) -> Results:
    """One batch after another; the second has repeated rows."""
    bank = ops.update_rows_(bank.clone(), torch.arange(N, device=DEVICE), x, impl=impl)
    return (ops.update_rows_(bank, PLACES, x, convention="new", duplicates="first", impl=impl),)


def _masked_lse_sum(x: Tensor, y: Tensor, b: Tensor, *, impl: str) -> Tensor:
    head = Head(3.0, PairMask(offset=1, period=M), Indexed(PLACES), 0.1, column_bias=b[:, 0])
    return ops.masked_lse_sum(x, y, head=head, row_weight=EQUAL / N, impl=impl)


def _npid(x: Tensor, y: Tensor, *, impl: str) -> Tensor:
    loss = NPID(M, WIDTH, num_noise=9, temperature=0.5, dtype=y.dtype, impl=impl).to(DEVICE)
    with torch.no_grad():
        loss.bank.memory.copy_(y / 8)
    return loss(x, PLACES)


def _dpq(x: Tensor, keys: Tensor, codebook: Tensor, weight: Tensor, *, impl: str) -> Tensor:
    found = ops.soft_assign(x, codebook, keys=keys, hard="straight-through", usage=True, purity=True, impl=impl)
    assert found.soft is not None
    assert found.hard is not None
    assert found.usage is not None
    assert found.purity is not None
    terms = found.usage.square().sum(), found.purity.sum(1).mean()
    quantized = DPQOutput(found.soft, found.hard, found.codes, *terms)
    # soft and hard are rounded to the dtype of the rows: their loss has no more digits
    return F.dpq_loss(quantized, OWN, weight, weight / 2, impl=impl).to(x.dtype)


def _soft_assign(x: Tensor, codebook: Tensor, *, impl: str) -> Results:
    result = ops.soft_assign(x, codebook, 0.3, usage=True, purity=True, impl=impl)
    return tuple(t for t in (result.soft, result.usage, result.purity) if t is not None)


CASES: dict[str, Case] = {
    "rank_sums": Case(
        "rank_sums",
        two,
        lambda x, y, impl: tuple(ops.rank_sums(x, OWN, y, OTHERS, temperature=0.05, impl=impl)[:2]),
        learned=2,
        waits=True,
    ),
    "masked_lse": Case("masked_lse", lambda: [*two(), number(2.5)], _masked_lse, learned=3),
    "masked_lse_sum": Case("masked_lse", lambda: [*two(), rows(M, 1, seed=7)], _masked_lse_sum, learned=3),
    "masked_lse, columns": Case("masked_lse", two, _column_lse, learned=2),
    "row_extrema": Case(
        "row_extrema",
        two,
        lambda x, y, impl: tuple(
            value for value, _ in ops.row_extrema(x, y, extrema=[("max", PairMask()), ("min", PairMask())], impl=impl)
        ),
        selects=True,
    ),
    "pair_dot": Case("pair_dot", two, lambda x, y, impl: ops.pair_dot(x, y, PAIRED, PLACES, impl=impl), learned=2),
    "soft_assign": Case("soft_assign", subspaces, _soft_assign, learned=2),
    "soft_assign, logits": Case(
        "soft_assign",
        lambda: [rows(N, BOOKS * WORDS, seed=5), rows(BOOKS * WORDS, 8, seed=6).view(BOOKS, WORDS, 8)],
        lambda a, c, impl: tuple(
            t for t in ops.soft_assign(None, c, logits=a, purity=True, impl=impl)[1::3] if t is not None
        ),
        learned=2,
    ),
    "sampled_dot": Case(
        "sampled_dot",
        two,
        lambda x, y, impl: ops.sampled_dot(x, y, first=PLACES, index=NOISE, impl=impl),
        learned=2,
    ),
    "sampled_dot, drawn": Case(
        "sampled_dot", two, lambda x, y, impl: ops.sampled_dot(x, y, count=9, seed=7, impl=impl), learned=2
    ),
    "topk": Case("topk", two, _topk, learned=0, selects=True),
    "pq_topk": Case("pq_topk", subspaces, _pq_topk, learned=0, selects=True),
    "pq_topk, half tables": Case("pq_topk", subspaces, _half_tables, learned=0, selects=True),
    "knn_vote": Case("knn_vote", lambda: [rows(N, 7, seed=5)], _knn_vote, learned=0, traced=False),
    "update_rows": Case("update_rows", lambda: [rows(N, seed=5), rows(M, seed=6)], _updated, learned=0),
    "segment_mean": Case("segment_mean", one, lambda x, impl: ops.segment_mean(x, OWN, CLASSES, impl=impl)[0]),
    "patchmix": Case(
        "patchmix",
        lambda: [rows(8, 3 * 16 * 16, seed=5).view(8, 3, 16, 16)],
        lambda x, impl: ops.patchmix(x, 4, 3, permutation=ORDER, impl=impl),
        copies=True,
    ),
    "SmoothAP": Case(
        "rank_sums", one, lambda x, impl: F.smooth_ap(x, EQUAL, temperature=0.05, samples_per_class=EACH, impl=impl)
    ),
    "SmoothAP, wide": Case(
        "rank_sums",
        lambda: [rows(N, WIDE, seed=5)],
        lambda x, impl: F.smooth_ap(x, EQUAL, temperature=0.05, samples_per_class=EACH, impl=impl),
    ),
    "InfoNCE": Case("masked_lse", two, lambda x, y, impl: F.info_nce(x, y, PLACES, impl=impl), learned=2),
    "InfoNCE, learned temperature": Case(
        "masked_lse",
        lambda: [rows(N, WIDE, seed=5), rows(M, WIDE, seed=6), number(0.3)],
        lambda x, y, a, impl: F.info_nce(x, y, temperature=a, impl=impl),
        learned=3,
    ),
    "InfoNCE, Matryoshka": Case(
        "masked_lse",
        two,
        lambda x, y, impl: F.info_nce(x, y, PLACES, matryoshka=(WIDTH // 3, WIDTH), impl=impl),
        learned=2,
    ),
    "CLIP": Case(
        "masked_lse",
        lambda: [rows(N, seed=5) / 8, rows(N, seed=6) / 8, number(5.0)],
        lambda x, y, a, impl: F.clip(x, y, a, impl=impl),
        learned=3,
    ),
    "SupCon": Case("masked_lse", one, lambda x, impl: F.sup_con(x, OWN, impl=impl)),
    "NTXent": Case("pair_dot", one, lambda x, impl: F.nt_xent(x, PAIRED, impl=impl), waits=True),
    "CQC": Case(
        "masked_lse",
        lambda: [rows(N, seed=seed) for seed in (5, 6, 7, 8)],
        lambda a, b, c, d, impl: F.cqc(a, b, c, d, impl=impl),
        learned=4,
    ),
    "MultiSimilarity": Case("masked_lse", one, lambda x, impl: F.multi_similarity(x, OWN, beta=20.0, impl=impl)),
    "MultiSimilarity, mined": Case(
        "masked_lse",
        one,
        lambda x, impl: F.multi_similarity(x, OWN, beta=20.0, mining_margin=0.1, impl=impl),
        selects=True,
    ),
    "InvariantSpreading": Case("masked_lse", one, lambda x, impl: F.invariant_spreading(x, temperature=0.5, impl=impl)),
    "InstanceSoftmax": Case("masked_lse", two, lambda x, y, impl: F.instance_softmax(x, PLACES, y, impl=impl)),
    "CentroidTriplet": Case("masked_lse", classes, lambda x, c, impl: F.centroid_triplet(x, c, OWN, impl=impl)),
    "ProxyNCA": Case(
        "masked_lse", classes, lambda x, c, impl: F.proxy_nca(x, c, OWN, smoothing=0.1, impl=impl), learned=2
    ),
    "ProxyNCAPlusPlus": Case(
        "masked_lse", classes, lambda x, c, impl: F.proxy_nca_plus_plus(x, c, OWN, impl=impl), learned=2
    ),
    "NormalizedSoftmax": Case(
        "masked_lse", classes, lambda x, c, impl: F.normalized_softmax(x, c, OWN, impl=impl), learned=2
    ),
    "ProxyAnchor": Case("masked_lse", classes, lambda x, c, impl: F.proxy_anchor(x, c, OWN, impl=impl), learned=2),
    "CosFace": Case("masked_lse", classes, lambda x, c, impl: F.cos_face(x, c, OWN, scale=16.0, impl=impl), learned=2),
    "ArcFace": Case("masked_lse", classes, lambda x, c, impl: F.arc_face(x, c, OWN, scale=16.0, impl=impl), learned=2),
    "SoftTriple": Case(
        "masked_lse",
        centers,
        lambda x, c, impl: F.soft_triple(x, c, OWN, tau=0.0, impl=impl),
        learned=2,
        options=("centers",),
    ),
    "SubCenterArcFace": Case(
        "masked_lse",
        centers,
        lambda x, c, impl: F.sub_center_arc_face(x, c, OWN, scale=16.0, impl=impl),
        learned=2,
        options=("centers",),
        selects=True,
    ),
    "SoftTargetInfoNCE": Case(
        "masked_lse",
        two,
        lambda x, y, impl: F.soft_target_info_nce(x, y, _soft_targets(x), impl=impl),
    ),
    "SoftPQ": Case(
        "soft_assign",
        subspaces,
        lambda x, c, impl: F.soft_pq(x, c, 0.3, hard="straight-through", impl=impl),
        learned=2,
        selects=True,
    ),
    "DPQ": Case(
        "soft_assign",
        lambda: [*subspaces(), subspaces()[1] / 2, rows(CLASSES, BOOKS * 8, seed=7)],
        _dpq,
        learned=3,
        selects=True,
    ),
    "NPID": Case("sampled_dot", two, _npid, waits=True),
    "NCE": Case("sampled_dot", two, lambda x, y, impl: F.nce(x, y / 8, PLACES, NOISE, Z=3.0 * M, impl=impl)),
}


def _soft_targets(x: Tensor) -> Tensor:
    """(N, M) of two columns a row, in the dtype the loss wants."""
    wide = torch.zeros(N, M, dtype=F64 if x.dtype == F64 else torch.float32, device=x.device)
    return wide.scatter(1, PLACES[:, None], 0.75) + wide.scatter(1, NOISE[:, :1], 0.25)


@dataclass(frozen=True)
class Precision:
    """A dtype of rows, PyTorch's float32 matmul precision, and what errors are allowed.

    Attributes:
        values, gradients: largest error, relative to the norm where that is above 1.
    """

    dtype: torch.dtype
    matmul: str
    values: float
    gradients: float


# A row in TF32 has 11 bits as one in float16, cut off or rounded, and here the definition does not take the same ones.
PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(torch.float32, "highest", 3e-5, 3e-5),
    "tf32": Precision(torch.float32, "high", 2**-8, 2**-6),
    "bf16": Precision(torch.bfloat16, "highest", 3e-5, 2**-6),
    "fp16": Precision(torch.float16, "highest", 3e-5, 2**-9),
}
PARAMETERS = [
    pytest.param(name, precision, id=f"{name}-{precision}")
    for name, case in CASES.items()
    for precision in PRECISIONS
    if not (case.selects and precision == "tf32")
]


def implementations(case: Case, dtype: torch.dtype) -> list[str]:
    """Those with kernels that serve the entry here; PyTorch's tiles where there is none yet."""
    call = registry.Call(case.op, DEVICE, dtype, case.options)
    found = [name for name in KERNELS if name in registry.IMPLEMENTATIONS]
    return [name for name in found if registry.IMPLEMENTATIONS[name].unsupported(call) is None] or ["tiled"]


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def given(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Leaves of a dtype, the learned ones of which ask for gradients."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    leaves = [t.to(dtype if t.ndim else wide) for t in case.leaves()]
    return [t.requires_grad_(k < case.learned) for k, t in enumerate(leaves)]


def loss_of(results: Tensor | Results) -> tuple[Tensor, Results]:
    """A linear form of finite results, whose weights no rounding makes exact; and the results."""
    results = (results,) if isinstance(results, Tensor) else results
    total = torch.zeros((), dtype=F64 if results[0].dtype == F64 else torch.float32, device=results[0].device)
    for k, r in enumerate(results):
        weight = torch.linspace(0.3, 7.1 + k, max(1, r.numel()), dtype=F64, device=r.device).view(r.shape)
        total = total + (weight.to(total.dtype) * torch.where(r.isinf(), 0, r).to(total.dtype)).sum()
    return total, results


def step(case: Case, leaves: list[Tensor], impl: str, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """Results and gradients."""
    total, results = loss_of((call or case.call)(*leaves, impl=impl))
    gradients = torch.autograd.grad(total, leaves[: case.learned]) if case.learned else ()
    return [*(r.detach() for r in results), *gradients]


def rounded_reference(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Unit rows of the reference are those of the dtype; gradients pass through the rounding."""
    for name in ("masked_lse", "rank_sums", "pair_dot"):
        module = importlib.import_module(f"fastret.backends.reference.{name}")
        exact = module.unit_rows

        def unit_rows(x: Tensor, exact: Callable[[Tensor], Tensor] = exact) -> Tensor:
            unit = exact(x)
            return unit + (unit.to(dtype).to(unit.dtype) - unit).detach()

        monkeypatch.setattr(module, "unit_rows", unit_rows)


@contextmanager
def launches() -> Iterator[list[tuple[str, bool]]]:
    """Name of every Triton kernel that is launched, and whether it is machine code."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    seen: list[tuple[str, bool]] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (JITFunction, InterpretedFunction):

            def watched(self: Any, *args: Any, run: Callable[..., Any] = kind.run, **options: Any) -> Any:
                kernel = run(self, *args, **options)
                seen.append((self.fn.__name__, bool({"cubin", "hsaco"} & set(getattr(kernel, "asm", ())))))
                return kernel

            patch.setattr(kind, "run", watched)
        yield seen


def check(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of every implementation with kernels, two runs bit for bit, and that kernels ran."""
    case, p = CASES[name], PRECISIONS[precision]
    low = given(case, p.dtype)
    for impl in implementations(case, p.dtype):
        with monkeypatch.context() as patch:
            if impl == "triton" and p.dtype.itemsize == 2:  # tiles of PyTorch are those of float32 rows
                rounded_reference(patch, p.dtype)
            wide = [t.detach().to(F64).requires_grad_(t.requires_grad) for t in low]
            expected = step(case, wide, "reference")
        results = len(expected) - case.learned
        with matmul_precision(p.matmul), launches() as seen:
            actual, again = step(case, low, impl), step(case, low, impl)
        if impl == "triton":
            assert seen, f"{name}: no Triton kernel ran"
            assert all(compiled == ON_GPU for _, compiled in seen), seen
        for k, (a, e, b) in enumerate(zip(actual, expected, again, strict=True)):
            where = f"{name}, {impl}, {precision}: {'result' if k < results else 'gradient'} {k}"
            assert torch.equal(a, b), f"{where}: differs from run to run"
            assert a.shape == e.shape, where
            if k >= results:
                assert a.dtype == low[k - results].dtype, where
            bound = p.values if k < results else p.gradients
            if case.copies:
                bound = 0.0 if k < results else torch.finfo(a.dtype).eps
            elif a.dtype.itemsize == 2:
                bound = max(bound, 2 * torch.finfo(a.dtype).eps)
            finite = e.isfinite()
            assert torch.equal(a.isfinite(), finite), where
            error = (a.to(F64) - e)[finite].norm().item()
            scale = e[finite].norm().item()
            assert error <= bound * max(1.0, scale), f"{where}: off by {error:.2e} of {scale:.2e}, bound {bound:.1e}"
