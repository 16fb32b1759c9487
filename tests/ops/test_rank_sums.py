"""rank_sums against its definition: values, gradients, precision, and what PyTorch expects of an operator."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastret.ops import rank_sums, sum_by_query

FUSED = ("tiled", "cpu")
F64 = torch.float64


def by_loops(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, tau: float, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """The definition, one term at a time."""
    y, y_labels = (x, labels) if y is None or y_labels is None else (y, y_labels)
    unit = torch.nn.functional.normalize
    s = (unit(x.to(F64)) @ unit(y.to(F64)).T).tolist()
    rank_all, rank_pos = [], []
    for q in range(len(x)):
        for i in range(len(y)):
            if labels[q] != y_labels[i]:
                continue
            everyone = positives = 1.0
            for j in range(len(y)):
                if j == i or (exclude_self and j == q):
                    continue
                step = 1 / (1 + math.exp(-(s[q][j] - s[q][i]) / tau))
                everyone += step
                positives += step if y_labels[j] == labels[q] else 0
            own = exclude_self and i == q
            rank_all.append(1.0 if own else everyone)
            rank_pos.append(0.0 if own else positives)
    return torch.tensor(rank_all, dtype=F64), torch.tensor(rank_pos, dtype=F64)


def case(
    n: int, m: int, d: int, classes: int, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """n queries, m gallery rows (0: the batch itself), labels in random order with a label each side lacks."""
    x, labels = torch.randn(n, d, dtype=dtype), torch.randint(0, classes, (n,))
    if m == 0:
        return x, labels, None, None
    return x, labels, torch.randn(m, d, dtype=dtype), torch.randint(1, classes + 1, (m,))


def values_and_gradients(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, **options: object
) -> list[Tensor]:
    """rank_all, rank_pos, and the gradients of a random linear form of both."""
    x = x.detach().clone().requires_grad_()
    y = None if y is None else y.detach().clone().requires_grad_()
    r = rank_sums(x, labels, y, y_labels, **options)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(2, r.rank_all.numel(), generator=generator, dtype=F64).to(r.rank_all)
    (weights[0] @ r.rank_all + weights[1] @ r.rank_pos).backward()
    return [r.rank_all.detach(), r.rank_pos.detach(), x.grad, *([] if y is None else [y.grad])]


# Tile edges are multiples of 32 up to 256, chunks have 4 positives: sizes on both sides of each.
SIZES = [
    (1, 0, 3, 1),
    (7, 0, 5, 3),
    (63, 0, 33, 9),
    (64, 0, 64, 64),  # singletons
    (65, 0, 1, 1),  # one class: G = N, one column
    (130, 0, 17, 3),  # G about 43: not a multiple of the chunk
    (300, 0, 40, 75),
    (20, 33, 7, 5),
    (70, 65, 16, 8),
    (5, 300, 16, 3),
    (300, 5, 16, 3),
]


# (n, m, d, classes, exclude_self): a gallery of its own holds no query to exclude
CASES = [(*size, exclude_self) for size in SIZES for exclude_self in ([False] if size[1] else [False, True])]


@pytest.mark.parametrize(("n", "m", "d", "classes", "exclude_self"), [c for c in CASES if c[0] * max(c[:2]) < 5000])
def test_reference_is_the_definition(n: int, m: int, d: int, classes: int, exclude_self: bool) -> None:
    x, labels, y, y_labels = case(n, m, d, classes)
    r = rank_sums(x, labels, y, y_labels, temperature=0.1, exclude_self=exclude_self, impl="reference")
    expected = by_loops(x, labels, y, y_labels, 0.1, exclude_self)
    torch.testing.assert_close((r.rank_all, r.rank_pos), expected, rtol=1e-12, atol=1e-12)
    assert r.counts.sum() == len(r.rank_all)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "m", "d", "classes", "exclude_self"), CASES)
def test_float64_equals_reference(
    impl: str, normalize: bool, n: int, m: int, d: int, classes: int, exclude_self: bool
) -> None:
    problem = case(n, m, d, classes)
    options = {"temperature": 0.1, "exclude_self": exclude_self, "normalize": normalize}
    expected = values_and_gradients(*problem, **options, impl="reference")
    actual = values_and_gradients(*problem, **options, impl=impl)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11 * (1 + e.abs().max().item() if e.numel() else 1))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "temperature"), [(0, 0.01), (0, 0.1), (150, 0.05)])
def test_low_precision_is_no_worse_than_dense_torch(impl: str, dtype: torch.dtype, m: int, temperature: float) -> None:
    """|ours - float64| <= 2 |dense torch in the same dtype - float64| + a few units in the last place."""
    x, labels, y, y_labels = case(130, m, 32, 20, dtype)
    truth = values_and_gradients(
        x.to(F64), labels, None if y is None else y.to(F64), y_labels, temperature=temperature, impl="reference"
    )

    def dense() -> list[Tensor]:
        a = x.detach().clone().requires_grad_()
        b = a if y is None else y.detach().clone().requires_grad_()
        unit = torch.nn.functional.normalize
        s = unit(a) @ unit(b).T
        same = labels[:, None] == (labels if y_labels is None else y_labels)[None, :]
        q, i = same.nonzero(as_tuple=True)
        step = torch.sigmoid((s[q] - s[q, i][:, None]) / temperature)
        step = step * (torch.arange(len(b)) != i[:, None])
        everyone, positives = 1 + step.sum(1), 1 + (step * same[q]).sum(1)
        weights = torch.randn(2, len(q), generator=torch.Generator().manual_seed(7), dtype=F64).to(everyone)
        (weights[0] @ everyone + weights[1] @ positives).backward()
        return [everyone.detach(), positives.detach(), a.grad, *([] if y is None else [b.grad])]

    ours = values_and_gradients(x, labels, y, y_labels, temperature=temperature, impl=impl)
    for name, o, n, t in zip(("all", "pos", "dx", "dy"), ours, dense(), truth, strict=False):
        assert o.dtype == (torch.float32 if name in ("all", "pos") else dtype)
        error, naive = (o.to(F64) - t).abs().max(), (n.to(F64) - t).abs().max()
        assert error <= 2 * naive + 4 * torch.finfo(o.dtype).eps * t.abs().max(), (name, error.item(), naive.item())


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("exclude_self", [False, True])
def test_gradcheck_through_the_kernels(impl: str, exclude_self: bool) -> None:
    x, labels, _, _ = case(19, 0, 5, 5)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: rank_sums(a, labels, temperature=0.3, exclude_self=exclude_self, impl=impl)[:2], (x,)
    )


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_with_gallery_and_temperature(impl: str, normalize: bool) -> None:
    x, labels, y, y_labels = case(8, 13, 4, 3)
    tau = torch.tensor(0.4, dtype=F64, requires_grad=True)

    def ranks(a: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return rank_sums(a, labels, b, y_labels, temperature=t, normalize=normalize, impl=impl)[:2]

    assert torch.autograd.gradcheck(ranks, (x.requires_grad_(), y.requires_grad_(), tau))


@pytest.mark.parametrize("impl", FUSED)
def test_only_requested_gradients(impl: str) -> None:
    x, labels, y, y_labels = case(40, 70, 8, 6)
    both = values_and_gradients(x, labels, y, y_labels, temperature=0.1, impl=impl)
    generator = torch.Generator().manual_seed(7)
    for wanted in (0, 1):
        a, b = (t.clone().requires_grad_(k == wanted) for k, t in enumerate((x, y)))
        r = rank_sums(a, labels, b, y_labels, temperature=0.1, impl=impl)
        weights = torch.randn(2, r.rank_all.numel(), generator=generator.manual_seed(7), dtype=F64)
        (weights[0] @ r.rank_all + weights[1] @ r.rank_pos).backward()
        torch.testing.assert_close((a, b)[wanted].grad, both[2 + wanted], rtol=1e-12, atol=1e-12)
        assert (a, b)[1 - wanted].grad is None


@pytest.mark.parametrize("impl", FUSED)
def test_rows_of_the_score_gradient_sum_to_zero(impl: str) -> None:
    """Adding a constant to the gallery moves all scores of a query alike: no change, and sum_j dY_j = 0."""
    x, labels, y, y_labels = case(30, 50, 6, 4)
    options = {"temperature": 0.5, "normalize": False, "impl": impl}
    plain = values_and_gradients(x, labels, y, y_labels, **options)
    moved = values_and_gradients(x, labels, y + torch.randn(6, dtype=F64), y_labels, **options)
    torch.testing.assert_close(plain[:2], moved[:2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain[3].sum(0), torch.zeros(6, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", FUSED)
def test_normalised_gradient_has_no_radial_part(impl: str) -> None:
    x, labels, _, _ = case(50, 0, 9, 7)
    _, _, dx = values_and_gradients(x, labels, None, None, temperature=0.2, impl=impl)
    torch.testing.assert_close((dx * x).sum(1), torch.zeros(50, dtype=F64), rtol=0, atol=1e-10)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, dict[str, object]]:
    n, d = draw(st.integers(1, 70)), draw(st.integers(1, 20))
    m = draw(st.sampled_from([0, 0, 1, 31, 66]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = draw(st.integers(1, 40))
    label_type = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))

    def rows(count: int) -> Tensor:
        """Contiguous, transposed, every second column, or at an offset of a larger matrix."""
        layout = draw(st.sampled_from(["plain", "transposed", "strided", "offset"]))
        full = torch.randn(2 * count + 1, 2 * d + 1, generator=generator).to(dtype)
        if layout == "plain":
            return full[:count, :d].contiguous()
        if layout == "transposed":
            return full[:count, :d].T.contiguous().T
        return full[:count, : 2 * d : 2] if layout == "strided" else full[count : 2 * count, d : 2 * d]

    def labels(count: int) -> Tensor:
        return torch.randint(0, classes, (count,), generator=generator).to(label_type)

    options = {"temperature": draw(st.sampled_from([0.03, 0.2, 1.0])), "normalize": draw(st.booleans())}
    if m == 0:
        options["exclude_self"] = draw(st.booleans())
        return rows(n), labels(n), None, None, options
    return rows(n), labels(n), rows(m), labels(m), options


@pytest.mark.parametrize("impl", FUSED)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_any_shape_labels_dtype_and_strides(
    impl: str, problem: tuple[Tensor, Tensor, Tensor | None, Tensor | None, dict[str, object]]
) -> None:
    x, labels, y, y_labels, options = problem
    expected = values_and_gradients(
        x.to(F64), labels, None if y is None else y.to(F64), y_labels, **options, impl="reference"
    )
    actual = values_and_gradients(x, labels, y, y_labels, **options, impl=impl)
    accumulated = torch.finfo(torch.float64 if x.dtype == F64 else torch.float32).eps
    scale = (1 if options["normalize"] else 100) / float(options["temperature"])  # errors of a score, in units of tau
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        stored = torch.finfo(x.dtype).eps if k >= 2 else 0
        bound = (
            (40 * accumulated * scale + stored)
            * (1 + e.abs().max().item() if e.numel() else 1)
            * (1 + scale * (k >= 2) / 10)
        )
        torch.testing.assert_close(a.to(F64), e, rtol=0, atol=bound)
    if options["normalize"]:
        torch.testing.assert_close(actual[1] <= actual[0] * (1 + 1e-6), torch.ones_like(actual[0], dtype=torch.bool))


def test_more_than_two_to_the_31_pairs() -> None:
    """Unit rows of one column are +1 or -1, so that the ranks of singletons are known. (Tiles are 20 times slower.)"""
    n = 46_500
    x = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)[:, None]
    r = rank_sums(x, torch.randperm(n), temperature=0.05, impl="cpu")
    alike = torch.where(x[:, 0] < 0, (x < 0).sum(), (x > 0).sum())
    expected = 1 + 0.5 * (alike - 1)  # equal scores count a half; the others stand at sigmoid(-40)
    torch.testing.assert_close(r.rank_all, expected.to(torch.float32), rtol=1e-6, atol=0)
    assert torch.equal(r.rank_pos, torch.ones(n))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gallery", [False, True])
def test_bad_values_are_never_hidden(impl: str, bad: float, normalize: bool, gallery: bool) -> None:
    x, labels, y, y_labels = case(21, 34 if gallery else 0, 6, 4, torch.float32)
    (x if y is None else y)[3, 2] = bad
    r = rank_sums(x, labels, y, y_labels, temperature=0.1, normalize=normalize, impl=impl)
    assert (r.rank_pos / r.rank_all).mean().isnan()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("where", ["query", "gallery"])
def test_infinity_shows_where_no_positive_sees_it(impl: str, where: str) -> None:
    """Scores of a row with an infinity are infinite, and bounded sigmoids of them look harmless."""
    x, y = torch.ones(3, 2), torch.ones(4, 2)
    (x if where == "query" else y)[2] = math.inf  # of a label that the other side lacks
    labels, y_labels = torch.tensor([0, 1, 8]), torch.tensor([0, 1, 9, 1])
    r = rank_sums(x, labels, y, y_labels, temperature=0.1, normalize=False, impl=impl)
    assert r.rank_all.isnan().all()
    assert r.rank_pos.isnan().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_finite_rows_of_any_length(impl: str, scale: float) -> None:
    x, labels, _, _ = case(40, 0, 12, 8, torch.float32)
    small = scale < 1e-12  # shorter than the eps of the normalisation: the rows count as zero in float32's eyes
    actual = values_and_gradients(x * scale, labels, None, None, temperature=0.1, impl=impl)
    expected = values_and_gradients((x * scale).to(F64), labels, None, None, temperature=0.1, impl="reference")
    tau = torch.tensor(0.1)
    torch.testing.assert_close(rank_sums(x * scale, labels, temperature=tau, impl=impl)[0], actual[0])
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.to(F64), e, rtol=1e-3, atol=1e-4 * e.abs().max().item() + (1e-30 if small else 0))


@pytest.mark.parametrize("impl", FUSED)
def test_zero_rows_and_duplicates(impl: str) -> None:
    x, labels, _, _ = case(30, 0, 5, 4)
    x[3] = 0
    x[11] = x[12]
    options = {"temperature": 0.2}
    expected = values_and_gradients(x, labels, None, None, **options, impl="reference")
    actual = values_and_gradients(x, labels, None, None, **options, impl=impl)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * (1 + e.abs().max().item()))


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_empty_batch_and_unmatched_queries(impl: str) -> None:
    none = rank_sums(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), temperature=0.1, impl=impl)
    assert none.rank_all.shape == none.rank_pos.shape == none.counts.shape == (0,)
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    r = rank_sums(x, torch.tensor([1, 2, 3]), y, torch.tensor([4, 4, 5, 6, 7]), temperature=0.1, impl=impl)
    assert r.counts.tolist() == [0, 0, 0]
    r.rank_all.sum().backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("impl", FUSED)
def test_saved_for_backward_is_linear(impl: str) -> None:
    """Rows (which the caller holds anyway), O(N) integers, and of the formula two floats a positive pair."""
    n, d, g = 512, 16, 8
    x = torch.randn(n, d, requires_grad=True)
    labels = torch.arange(n) // g
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() != x.data_ptr():
            saved[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        r = rank_sums(x, labels, temperature=0.1, impl=impl)
        loss = 1 - sum_by_query(r.rank_pos / r.rank_all, r.counts).mean() / g
    assert sum(saved.values()) <= 2 * 4 * n * g + 3 * 8 * n + 4 * 16  # pairs; order, start, count
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
def test_registered_operators(impl: str) -> None:
    x, labels, y, y_labels = case(20, 30, 5, 4)
    op, backward = torch.ops.fastret.rank_sums.default, torch.ops.fastret.rank_sums_backward.default
    torch.library.opcheck(op, (x, None, labels, None, None, 0.1, True, True, True, impl))
    torch.library.opcheck(op, (x.float(), None, torch.arange(20) // 4, None, 4, 0.1, False, False, False, impl))
    for gallery in (None, y):
        arguments = (x, gallery, labels, None if gallery is None else y_labels, None, 0.1, False, True, True, impl)
        torch.library.opcheck(op, arguments)
        *ranks, slopes, order, start, count = op(*arguments)
        need_y = gallery is not None
        torch.library.opcheck(
            backward, (*ranks, x, gallery, slopes, order, start, count, 0.1, False, True, True, need_y, impl)
        )


@pytest.mark.parametrize("impl", FUSED)
def test_torch_func(impl: str) -> None:
    x, labels, _, _ = case(18, 0, 5, 4)

    def total(a: Tensor, impl: str = impl) -> Tensor:
        r = rank_sums(a, labels, temperature=0.2, impl=impl)
        return sum_by_query(r.rank_pos / r.rank_all, r.counts)

    expected = torch.func.jacrev(lambda a: total(a, "reference"))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: "no batching rule", it loops
        torch.testing.assert_close(torch.func.grad(lambda a: total(a).sum())(x), expected.sum(0))
        torch.testing.assert_close(torch.func.jacrev(total)(x), expected)
        batch = torch.randn(3, 18, 5, dtype=F64)
        torch.testing.assert_close(torch.vmap(total)(batch), torch.stack([total(a) for a in batch]))
        gradients = torch.vmap(torch.func.grad(lambda a: total(a).sum()))(batch)
    torch.testing.assert_close(gradients[1], torch.func.grad(lambda a: total(a, "reference").sum())(batch[1]))


@pytest.mark.parametrize("impl", FUSED)
def test_what_the_kernels_cannot_differentiate_is_an_error(impl: str) -> None:
    x, labels, _, _ = case(12, 0, 5, 3)

    def total(a: Tensor, impl: str = impl) -> Tensor:
        return rank_sums(a, labels, temperature=0.2, impl=impl).rank_all.square().sum()

    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(total, (x,), (x,))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(total(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()
    assert torch.autograd.gradgradcheck(lambda a: total(a, "reference"), (x,))


@pytest.mark.parametrize("impl", FUSED)
def test_same_bits_every_run(impl: str) -> None:
    x, labels, _, _ = case(300, 0, 24, 60, torch.float32)
    first = values_and_gradients(x, labels, None, None, temperature=0.05, impl=impl)
    for _ in range(3):
        again = values_and_gradients(x, labels, None, None, temperature=0.05, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("impl", FUSED)
def test_samples_per_class_is_checked(impl: str) -> None:
    x = torch.randn(12, 4)
    with pytest.raises(
        ValueError, match="samples_per_class: expected 4 rows of each query's class in the gallery, got 3"
    ):
        rank_sums(x, torch.arange(12) // 3, temperature=0.1, samples_per_class=4, impl=impl)


def test_sum_by_query() -> None:
    values = torch.randn(6, dtype=F64, requires_grad=True)
    count = torch.tensor([2, 0, 3, 1])
    expected = torch.stack([values[:2].sum(), values.new_zeros(()), values[2:5].sum(), values[5]])
    torch.testing.assert_close(sum_by_query(values, count), expected)
    assert torch.autograd.gradcheck(lambda v: sum_by_query(v, count), (values,))
    assert torch.autograd.gradgradcheck(lambda v: sum_by_query(v, count).square(), (values,))


@pytest.mark.parametrize("width", [1, 3, 4, 8, 15, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", FUSED)
def test_rows_of_nothing_but_nan(impl: str, dtype: torch.dtype, width: int) -> None:
    """Of queries or of the gallery, normalised or not: sigmoids are bounded and would hide them."""
    rows, bad = torch.randn(5, width, dtype=dtype), torch.randn(5, width, dtype=dtype)
    bad[3] = torch.nan
    labels = torch.tensor([0, 0, 1, 2, 1])
    for x, y in ((bad, None), (bad, rows), (rows, bad)):
        for normalize in (True, False):
            given = {"temperature": 0.5, "normalize": normalize, "impl": impl}
            ranks = rank_sums(x, labels, **given) if y is None else rank_sums(x, labels, y, labels, **given)
            assert ranks.rank_all.isnan().all()
            assert ranks.rank_pos.isnan().all()
