"""DPQ and its loss against the formulas written out densely, with probabilities of all rows, books and words."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

import fastret
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.functional import dpq_loss
from fastret.losses.dpq import DPQOutput

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu", "triton")
    if all(
        registry.IMPLEMENTATIONS[impl].unsupported(Call(op, "cpu", torch.float32)) is None
        for op in ("soft_assign", "masked_lse")
    )
]
IMPLS = ["reference", *FUSED]
M, K, E, L, C = 3, 5, 4, 6, 7
LABELS = torch.tensor([3, 0, 6, 3, 2, 2, 1, 3, 2])  # classes without a row, classes with several


class StraightThrough(torch.autograd.Function):
    """One-hot of the greatest probability, whose derivative is the identity."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return one_hot(p.argmax(2), p.shape[2]).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


def dense_head(head: fastret.DPQ, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(soft, hard, probabilities (N, M, K))."""
    books = head.num_books
    logits = torch.stack([part @ keys.T for part, keys in zip(x.chunk(books, 1), head.keys, strict=True)], 1)
    p = torch.softmax(logits if head.bias is None else logits + head.bias, 2)
    results = []
    for weights in (p, StraightThrough.apply(p)):
        parts = [weights[:, m] @ head.codebook[m] for m in range(books)]
        results.append(torch.cat([normalize(t, dim=1) for t in parts] if head.intra_normalize else parts, 1))
    return *results, p


def dense_loss(criterion: fastret.DPQLoss, soft: Tensor, hard: Tensor, p: Tensor, labels: Tensor) -> Tensor:
    loss = criterion.diversity_weight * p.mean(0).square().sum()
    loss = loss - criterion.sharpness_weight * p.square().sum((1, 2)).mean()
    for rows in (soft, hard):
        loss = loss + cross_entropy(torch.nn.functional.linear(rows, criterion.weight, criterion.bias), labels)
        for row, label in zip(rows, labels.tolist(), strict=True):
            distance = (row - criterion.centers[label]).square().sum()
            loss = loss + criterion.center_weight * distance / 2 / len(rows)
    return loss


def case(dtype: torch.dtype = F64, impl: str | None = None, **options: Any) -> tuple[fastret.DPQ, fastret.DPQLoss]:
    head = fastret.DPQ(M * E, M, K, L, impl=impl, **options).to(dtype)
    criterion = fastret.DPQLoss(
        C, M * L, bias=True, center_weight=0.3, diversity_weight=0.5, sharpness_weight=0.7, impl=impl
    ).to(dtype)
    with torch.no_grad():
        for parameter in (*head.parameters(), *criterion.parameters()):
            parameter.normal_()
    return head, criterion


def leaves(*parts: Tensor | torch.nn.Module) -> list[Tensor]:
    return [t for part in parts for t in ([part] if isinstance(part, Tensor) else part.parameters())]


def test_no_rows_have_no_loss() -> None:
    quantized = fastret.DPQ(8, 2, 4)(torch.zeros(0, 8))
    assert [float(v.detach()) for v in (quantized.diversity, quantized.sharpness)] == [0, 0]
    assert float(fastret.DPQLoss(3, 8)(quantized, torch.zeros(0, dtype=torch.int64)).detach()) == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"intra_normalize": True}], ids=str)
def test_equals_the_dense_formulas(impl: str, options: dict[str, Any]) -> None:
    head, criterion = case(impl=impl, **options)
    x = torch.randn(9, M * E, dtype=F64, requires_grad=True)
    soft, hard, p = dense_head(head, x)
    found = head(x)
    for mine, truth in (
        (found.soft, soft),
        (found.hard, hard),
        (found.diversity, p.mean(0).square().sum()),
        (found.sharpness, p.square().sum((1, 2)).mean()),
    ):
        torch.testing.assert_close(mine, truth)
        upstream = torch.randn_like(truth)
        of_both = [
            torch.autograd.grad((7 * upstream * t).sum(), leaves(x, head), retain_graph=True, materialize_grads=True)
            for t in (mine, truth)
        ]
        torch.testing.assert_close(*of_both)
    assert torch.equal(found.codes, p.argmax(2))
    loss, truth = criterion(found, LABELS), dense_loss(criterion, soft, hard, p, LABELS)
    torch.testing.assert_close(loss, truth)
    of_both = [torch.autograd.grad(7 * t, leaves(x, head, criterion), retain_graph=True) for t in (loss, truth)]
    torch.testing.assert_close(*of_both)
    torch.testing.assert_close([7 * g for g in torch.autograd.grad(loss, leaves(x, head, criterion))], [*of_both[0]])


@pytest.mark.parametrize("impl", FUSED)
def test_terms_of_the_loss_are_separate(impl: str) -> None:
    head, criterion = case(impl=impl)
    found = head(torch.randn(9, M * E, dtype=F64))
    weight, centers = criterion.weight, criterion.centers
    off = {"center_weight": 0.0, "diversity_weight": 0.0, "sharpness_weight": 0.0}
    plain = dpq_loss(found, LABELS, weight, centers, **off, impl=impl)
    expected = cross_entropy(found.soft @ weight.T, LABELS) + cross_entropy(found.hard @ weight.T, LABELS)
    torch.testing.assert_close(plain, expected)
    for name, term in (
        ("center_weight", sum((t - centers[LABELS]).square().sum(1).mean() / 2 for t in (found.soft, found.hard))),
        ("diversity_weight", found.diversity),
        ("sharpness_weight", -found.sharpness),
    ):
        loss = dpq_loss(found, LABELS, weight, centers, **(off | {name: 2.0}), impl=impl)
        torch.testing.assert_close(loss, plain + 2 * term)


@pytest.mark.parametrize("impl", FUSED)
def test_order_of_rows_words_and_classes(impl: str) -> None:
    head, criterion = case(impl=impl)
    x = torch.randn(9, M * E, dtype=F64)
    rows, words, classes = torch.randperm(9), torch.randperm(K), torch.randperm(C)
    loss = criterion(head(x), LABELS)
    with torch.no_grad():
        head.codebook.copy_(head.codebook[:, words].clone())
        head.keys.copy_(head.keys[:, words].clone())
        head.bias.copy_(head.bias[:, words].clone())
        for parameter in criterion.parameters():
            parameter.copy_(parameter[classes].clone())
    renumbered = classes.argsort()[LABELS]
    torch.testing.assert_close(criterion(head(x[rows]), renumbered[rows]), loss)
    found = head(x)
    assert M / K <= found.diversity <= found.sharpness <= M


@pytest.mark.parametrize("impl", FUSED)
def test_nothing_of_size_rows_times_words_or_classes_is_kept(impl: str) -> None:
    n, books, words, width, classes = 128 if impl == "triton" else 512, 4, 256, 4, 600  # interpreted kernels are slow
    head = fastret.DPQ(books * width, books, words, impl=impl)
    criterion = fastret.DPQLoss(classes, books * width, impl=impl)
    x = torch.randn(n, books * width, requires_grad=True)
    parameters = {t.data_ptr() for t in leaves(x, head, criterion)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = criterion(head(x), torch.arange(n))
    codes_and_sums, rows = 16 * n * books + 64 * n, 4 * n * books * width
    gradients = 2 * rows + 4 * criterion.weight.numel()  # of the classifier and both quantisations, in one sweep
    usage = 4 * books * words
    assert sum(kept.values()) <= codes_and_sums + 6 * rows + gradients + usage < 4 * n * books * words / 2
    loss.backward()
    assert all(t.grad.isfinite().all() for t in leaves(x, head, criterion))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("options", [{}, {"bias": False, "intra_normalize": True}], ids=str)
def test_compiles_and_runs_under_autocast(impl: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    head, criterion = case(torch.float32, impl, **options)
    x = torch.randn(9, M * E, requires_grad=True)

    def whole(rows: Tensor) -> Tensor:
        loss: Tensor = criterion(head(rows), LABELS)
        return loss

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    values = [f(x) for f in (compiled, whole)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(t, leaves(x, head, criterion)) for t in values))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.nn.functional.linear(x, torch.eye(M * E))
        found = head(half)
        assert found.soft.dtype == found.hard.dtype == torch.bfloat16
        assert found.diversity.dtype == torch.float32
        loss = criterion(found, LABELS)
    loss.backward()
    exact = head(half.float())
    assert torch.equal(found.codes, exact.codes)
    if impl == "triton":  # probabilities are rounded too: tensor cores multiply bfloat16
        bound = float(torch.finfo(torch.bfloat16).eps * exact.hard.detach().abs().max())
        torch.testing.assert_close(found.soft, exact.soft.bfloat16(), rtol=0, atol=bound)
    else:
        torch.testing.assert_close(found.soft, exact.soft.bfloat16())
    torch.testing.assert_close(loss, criterion(exact, LABELS), rtol=2e-2, atol=0)
    assert all(t.grad.isfinite().all() for t in leaves(x, head, criterion))


def test_half_precision_modules() -> None:
    head, criterion = case(torch.bfloat16, intra_normalize=True)
    loss = criterion(head(torch.randn(9, M * E, dtype=torch.bfloat16)), LABELS)
    loss.backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.isfinite().all() for t in leaves(head, criterion))


@pytest.mark.parametrize("intra_normalize", [False, True])
def test_codes_stand_for_hard(intra_normalize: bool) -> None:
    head, _ = case(intra_normalize=intra_normalize)
    x = torch.randn(33, M * E, dtype=F64)
    found = head(x)
    codes = head.encode(x)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), found.codes)
    torch.testing.assert_close(head.decode(codes), found.hard.detach(), rtol=1e-14, atol=1e-14)
    if intra_normalize:
        for rows in (found.soft, found.hard):
            torch.testing.assert_close(rows.view(33, M, L).norm(dim=2), torch.ones(33, M, dtype=F64))
    assert torch.equal(head.usage(x).counts, head.usage(codes).counts)


def test_modules_are_copied_and_saved() -> None:
    head, criterion = case()
    x = torch.randn(9, M * E, dtype=F64)
    expected = criterion(head(x), LABELS)
    for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(criterion)(copied(head)(x), LABELS), expected)
    others = case()
    for other, module in zip(others, (head, criterion), strict=True):
        other.load_state_dict(module.state_dict())
        assert repr(other) == repr(module)
        assert "title=" in module.citation
    assert torch.equal(others[1](others[0](x), LABELS), expected)
    assert list(head.state_dict()) == ["codebook", "keys", "bias"]
    assert list(criterion.state_dict()) == ["weight", "centers", "bias"]
    assert head.num_bits == 3 * M
    plain = fastret.DPQ(24, 4, 8)  # the call of other implementations
    assert plain.codebook.shape == plain.keys.shape == (4, 8, 6)


def test_training_classifies_by_codes() -> None:
    labels = torch.arange(5).repeat(20)
    x = torch.randn(5, 8)[labels] + 0.3 * torch.randn(100, 8)
    head, criterion = fastret.DPQ(8, 2, 4), fastret.DPQLoss(5, 8)
    optimizer = torch.optim.Adam(leaves(head, criterion), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        criterion(head(x), labels).backward()
        optimizer.step()
    found = (head.decode(head.encode(x)) @ criterion.weight.T).argmax(1)
    assert (found == labels).float().mean() > 0.95


HEAD, LOSS = case(torch.float32)
FOUND = DPQOutput(*(t.detach() for t in HEAD(torch.randn(9, M * E))))
W = torch.randn(C, M * L)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastret.DPQ(10, 3), ValueError, "in_features: expected a multiple of num_books = 3, got 10"),
        (lambda: fastret.DPQ(0, 3), ValueError, "in_features: expected at least 1, got 0"),
        (lambda: fastret.DPQ(12, 0), ValueError, "num_books: expected at least 1, got 0"),
        (lambda: fastret.DPQ(12.0, 3), TypeError, "in_features: expected an integer, got float"),
        (lambda: fastret.DPQ(12, 3, 0), ValueError, "num_words: expected at least 1, got 0"),
        (lambda: fastret.DPQ(12, 3, 65537), ValueError, "num_words: expected at most 65,536"),
        (lambda: fastret.DPQ(12, 3, 4, 0), ValueError, "word_dim: expected at least 1, got 0"),
        (lambda: HEAD(torch.randn(9, 11)), ValueError, "x: expected 12 columns for 3 books of width 4, got 11"),
        (lambda: fastret.DPQLoss(1, 4), ValueError, "num_classes: expected at least 2, got 1"),
        (lambda: fastret.DPQLoss(2, 0), ValueError, "dim: expected at least 1, got 0"),
        (lambda: fastret.DPQLoss(2, 4, center_weight=-1), ValueError, "center_weight: expected at least 0, got -1"),
        (lambda: fastret.DPQLoss(2, 4, sharpness_weight="1"), TypeError, "sharpness_weight: expected a number"),
        (lambda: fastret.DPQLoss(2, 4, diversity_weight=float("nan")), ValueError, "diversity_weight: .* finite"),
        (lambda: LOSS(FOUND, LABELS + 1), ValueError, "labels: expected numbers from 0 to 6, got 7"),
        (lambda: LOSS(FOUND, LABELS.float()), TypeError, "labels: expected an integer dtype"),
        (lambda: LOSS(FOUND, LABELS[1:]), ValueError, r"labels: expected shape \(9,\)"),
        (lambda: dpq_loss(FOUND, LABELS, W[:, 1:], W), ValueError, "weight: expected 18 columns"),
        (lambda: dpq_loss(FOUND, LABELS, W, W[1:]), ValueError, r"centers: expected shape \(7, 18\), got \(6, 18\)"),
        (lambda: dpq_loss(FOUND, LABELS, W, W, bias=W[:2, 0]), ValueError, r"column_bias: expected shape \(7,\)"),
        (
            lambda: dpq_loss(FOUND._replace(hard=FOUND.hard[1:]), LABELS, W, W),
            ValueError,
            r"hard: expected shape \(9, 18\), got \(8, 18\)",
        ),
    ],
)
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
