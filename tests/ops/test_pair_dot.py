"""pair_dot and positive_pairs against their definition, and what PyTorch expects of an operator."""

import warnings

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import pair_dot as tiled
from fastret.ops import pair_dot, positive_pairs

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("pair_dot", "cpu", torch.float32)) is None
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "BUDGET", 32)


def case(gallery: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Pairs in any order, some more than once, some rows in none."""
    x, y = torch.randn(9, 5, dtype=F64), torch.randn(7, 5, dtype=F64) if gallery else None
    return x, y, torch.randint(0, 8, (23,)), torch.randint(0, 7, (23,))


@pytest.mark.parametrize("gallery", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.usefixtures("small_chunks")
def test_equals_reference_and_dense(gallery: bool, normalize: bool) -> None:
    x, y, row, column = case(gallery)
    leaves = [t.requires_grad_() for t in (x, y) if t is not None]
    unit = torch.nn.functional.normalize if normalize else torch.Tensor.clone
    dense = (unit(x) @ unit(x if y is None else y).T)[row, column]
    for impl in ("reference", *FUSED):
        scores = pair_dot(x, y, row, column, normalize=normalize, impl=impl)
        torch.testing.assert_close(scores, dense)
        mine, expected = (torch.autograd.grad(s.sin().sum(), leaves, retain_graph=True) for s in (scores, dense))
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("gallery", [True, False])
def test_gradcheck_opcheck_and_refusal(impl: str, gallery: bool) -> None:
    x, y, row, column = case(gallery)
    leaves = [t.requires_grad_() for t in (x, y) if t is not None]
    assert torch.autograd.gradcheck(lambda a, b=None: pair_dot(a, b, row, column, impl=impl), leaves)
    rows = [None if t is None else t.detach() for t in (x, y)]
    operators = torch.ops.fastret
    torch.library.opcheck(operators.pair_dot.default, (*rows, row, column, True, impl))
    arguments = (torch.ones(23, dtype=F64), *rows, row, column, True, True, gallery, impl)
    torch.library.opcheck(operators.pair_dot_backward.default, arguments)
    torch.library.opcheck(operators.positive_pairs.default, (torch.arange(6) % 2, None))
    (gradient,) = torch.autograd.grad(pair_dot(x, y, row, column, impl=impl).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", FUSED)
def test_compile_and_torch_func(impl: str) -> None:
    x, _, row, column = case(False)

    def loss(a: Tensor, impl: str) -> Tensor:
        return pair_dot(a, None, row, column, impl=impl).sin().sum()

    one, two = (torch.func.grad(lambda a, impl=impl: loss(a, impl))(x) for impl in (impl, "reference"))
    torch.testing.assert_close(one, two)
    batch = torch.randn(3, 9, 5, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        many = torch.vmap(torch.func.grad(lambda a: loss(a, impl)))(batch)
    torch.testing.assert_close(many, torch.stack([torch.func.grad(lambda a: loss(a, impl))(a) for a in batch]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: loss(a, impl), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x.requires_grad_()), x)
    torch.testing.assert_close(gradient, two)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_positive_pairs(dtype: torch.dtype) -> None:
    labels, others = torch.tensor([4, 1, 4, 9, 1, 4]).to(dtype), torch.tensor([1, 4, 7, 1]).to(dtype)
    for columns in (None, others):
        row, column = positive_pairs(labels, columns)
        expected = [
            (i, j)
            for i, a in enumerate(labels.tolist())
            for j, b in enumerate((labels if columns is None else columns).tolist())
            if a == b and not (columns is None and i == j)
        ]
        assert list(zip(row.tolist(), column.tolist(), strict=True)) == expected
    row, column = positive_pairs(labels[:0])
    assert row.shape == column.shape == (0,)
    for impl in ("reference", *FUSED):
        assert pair_dot(torch.ones(0, 3), None, row, column, impl=impl).shape == (0,)


X, P = torch.randn(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pair_dot(X, None, P, P[:2]), ValueError, r"column: expected shape \(4,\).*got \(2,\)"),
        (lambda: pair_dot(X, None, P.float(), P), TypeError, "row: expected an integer dtype"),
        (lambda: pair_dot(X, None, [0, 1], P), TypeError, "row: expected an integer tensor.*got list"),
        (lambda: pair_dot(X, None, P.to("meta"), P.to("meta")), ValueError, "row: expected device cpu.*got meta"),
        (lambda: pair_dot(X, None, P + 1, P), ValueError, "row: expected numbers from 0 to 3, got 4"),
        (lambda: pair_dot(X, X[:2], P, P), ValueError, "column: expected numbers from 0 to 1, got 2"),
        (lambda: pair_dot(X, X[:, :2], P, P), ValueError, "y: expected 3 columns"),
    ],
)
def test_bad_input_names_the_argument(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
