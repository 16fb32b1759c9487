"""Smooth-AP (fastret.functional.smooth_ap), forward and backward, N rows of D = 512 in classes of G = 4.

The floor is four (N, D) x (D, N) products: the scores in forward, the scores again, dS X and dS^T X in backward.
An implementation that uses the symmetry of the scores needs three and can pass below it; the sigmoids, N N G of them
in each direction, are not part of the floor.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.conditions import needs, only_at, pml_missing, up_to
from benchmarks.gpu import gpu_variants
from benchmarks.registry import Inputs, Op, Size, Variant
from fastret.backends import cpu
from fastret.functional import smooth_ap

TEMPERATURE = 0.01
DENSE_LIMIT = 512
PML_LIMIT = 384
TILED_LIMIT = 4096
CUBES = "several N x N x N temporaries"
ISA_SIZE = 4096
PROBE_LIMIT = 1024  # rows up to which every query is checked
PROBE_QUERIES = 256  # queries that are checked above


def setup(size: Size, seed: int) -> Inputs:
    """Rows in consecutive classes. A weak common direction per class keeps the ranks, and so the gradients, varied:
    with none or a strong one, positives stand anywhere or all in front, and the sigmoids at tau = 0.01 are flat.
    ``group`` is empty, and as long as a class: that is known without reading labels from a device."""
    generator = torch.Generator().manual_seed(seed)
    n, g, d = size["n"], size["g"], size["d"]
    labels = torch.arange(n) // g
    classes = torch.randn(math.ceil(n / g), d, generator=generator)
    return {
        "x": torch.randn(n, d, generator=generator) + 0.3 * classes[labels],
        "labels": labels,
        "group": torch.empty(g, 0),
    }


def shuffled(inputs: Inputs) -> Inputs:
    """The same rows in random order."""
    order = torch.randperm(len(inputs["x"]), generator=torch.Generator().manual_seed(1)).to(inputs["x"].device)
    return {**inputs, **{name: inputs[name][order] for name in ("x", "labels")}}


def with_gallery(inputs: Inputs) -> Inputs:
    """The batch as queries against a gallery of as many rows."""
    x = inputs["x"]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.device)
    return {**inputs, "y": 0.3 * x + noise, "y_labels": inputs["labels"]}


def fastret(inputs: Inputs, impl: str) -> Tensor:
    """The loss; where there are weights, the weighted sum over queries instead of their mean. CUDA is told how many
    rows a class has, as a training loop would: it would wait to count them."""
    weight, group = inputs.get("weight"), len(inputs["group"])
    told = inputs["x"].is_cuda and len(inputs["labels"]) % group == 0
    loss = smooth_ap(
        inputs["x"],
        inputs["labels"],
        temperature=TEMPERATURE,
        ref_emb=inputs.get("y"),
        ref_labels=inputs.get("y_labels"),
        reduction="mean" if weight is None else "none",
        samples_per_class=group if told else None,
        impl=impl,
    )
    return loss if weight is None else loss @ weight


_cpu = partial(fastret, impl="cpu")
_cpu_missing = needs("rank_sums", "cpu")


def dense(inputs: Inputs) -> Tensor:
    """The N x N x N formulation of the official code, from its formula, query included among its positives.

    Temporaries are broadcast where the official code repeats them: kinder to it than it is to itself.
    """
    x = normalize(inputs["x"])
    groups = int(inputs["labels"].max()) + 1
    blocks = x.view(groups, len(x) // groups, -1)
    rank_pos = _dense_ranks(blocks @ blocks.mT)
    block = torch.arange(groups, device=x.device)
    rank_all = _dense_ranks(x @ x.T).view(groups, len(x) // groups, groups, -1)[block, :, block]
    return 1 - (rank_pos / rank_all).mean()


def _dense_ranks(scores: Tensor) -> Tensor:
    """(..., Q, M) scores to 1 + sum over j != i of sigmoid((s_qj - s_qi) / tau), every i and j of a query at once."""
    difference = scores[..., None, :] - scores[..., :, None]
    step = 1 / (1 + torch.exp((-difference / TEMPERATURE).clamp(-50, 50)))
    others = 1 - torch.eye(scores.shape[-1], device=scores.device)
    return 1 + (step * others).sum(-1)


def pml(inputs: Inputs) -> Tensor:
    from pytorch_metric_learning.losses import SmoothAPLoss

    loss: Tensor = SmoothAPLoss(temperature=TEMPERATURE)(inputs["x"], inputs["labels"])
    return loss


def as_pml_groups(inputs: Inputs) -> Inputs:
    """The classes pytorch-metric-learning 2.9 works with: consecutive, of as many rows as there are classes in fact."""
    labels = inputs["labels"]
    classes = int(labels.max()) + 1
    return {**inputs, "labels": torch.arange(len(labels), device=labels.device) // classes}


def probe(inputs: Inputs) -> Inputs:
    """Inputs with weights that leave a random part of the queries. All rows and all tiles still take part, and each row
    receives the gradient of those queries."""
    n = len(inputs["x"])
    if n <= PROBE_LIMIT:
        return inputs
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(3))[:PROBE_QUERIES]
    return {**inputs, "weight": torch.zeros(n).index_fill(0, chosen, 1 / PROBE_QUERIES).to(inputs["x"].device)}


def oracle(inputs: Inputs) -> Tensor:
    """The dense definition, of the queries that have a weight; the batch is its own gallery where there is none."""
    x, labels = inputs["x"], inputs["labels"]
    weight = inputs.get("weight", torch.full_like(x[:, 0], 1 / len(x)))
    query = weight.detach().nonzero()[:, 0]
    loss = smooth_ap(
        x[query],
        labels[query],
        temperature=TEMPERATURE,
        ref_emb=inputs.get("y", x),
        ref_labels=inputs.get("y_labels", labels),
        reduction="none",
        impl="reference",
    )
    return loss @ weight[query]


def floor(inputs: Inputs) -> Callable[[], None]:
    x = inputs["x"]
    out = x.new_empty(len(x), len(x))

    def four_products() -> None:
        for _ in range(4):
            torch.mm(x, x.T, out=out)

    return four_products


def _isa_missing(device: str, *, isa: str) -> str | None:
    reason = _cpu_missing(device)
    if reason is not None:
        return reason
    from fastret import _C

    if isa not in _C.supported_isas():
        return f"this processor has no {isa}"
    return f"{isa} is what fastret-cpu runs here" if isa == _C.isa() else None


@contextlib.contextmanager
def _isa(isa: str) -> Iterator[None]:
    """C++ kernels of another instruction set, with the multiplier that ``FASTRET_ISA`` would pick for it."""
    from fastret import _C

    cpu.missing()  # sets up BLAS, which the multiplier may be
    before = _C.isa(), _C.gemm()
    _C.set_isa(isa)
    _C.set_gemm("")
    try:
        yield
    finally:
        _C.set_isa(before[0])
        _C.set_gemm(before[1])


def _isa_variant(isa: str) -> Variant:
    return Variant(
        f"fastret-cpu {isa}",
        _cpu,
        missing=partial(_isa_missing, isa=isa),
        unfit=only_at(ISA_SIZE),
        setting=partial(_isa, isa),
    )


OP = Op(
    name="smooth_ap",
    module=__name__,
    axis="n",
    sizes=(256, 512, 1024, 4096, 16384),
    fixed={"g": 4, "d": 512},
    setup=setup,
    gradients=("x", "y"),
    variants=(
        Variant("fastret-cpu", _cpu, missing=_cpu_missing),
        Variant("fastret-cpu shuffled", _cpu, shuffled, _cpu_missing, note="rows of a class anywhere in the batch"),
        Variant("fastret-cpu gallery", _cpu, with_gallery, _cpu_missing, note="a gallery of N rows, both gradients"),
        *map(_isa_variant, ("avx2", "base")),
        *gpu_variants("rank_sums", fastret),
        Variant("fastret-tiled", partial(fastret, impl="tiled"), unfit=up_to(TILED_LIMIT, "many seconds a call")),
        Variant("dense", dense, unfit=up_to(DENSE_LIMIT, CUBES), note="the official N x N x N formulation"),
        Variant(
            "pytorch-metric-learning",
            pml,
            missing=pml_missing,
            unfit=up_to(PML_LIMIT, CUBES),
            expected=as_pml_groups,
            note="2.9 computes another value unless there are as many classes as samples of each",
        ),
    ),
    oracle=oracle,
    probe=probe,
    loss_tolerance=1e-6,
    gradient_tolerance=1e-5,
    floor=floor,
    floor_name="four (N, D) x (D, N) torch.mm",
    warm_up=64,
)
