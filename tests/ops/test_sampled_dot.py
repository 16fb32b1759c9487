"""sampled_dot against a gather, and what PyTorch expects of an operator."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.sampling import Draws
from fastret.backends.tiled import sampled_dot as tiled
from fastret.ops import sampled_dot

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu", "triton")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("sampled_dot", "cpu", torch.float32)) is None
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "BUDGET", 64)


def columns(kind: str, n: int, size: int, count: int = 11) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if "first" in kind:
        given["first"] = torch.randint(0, size, (n,))
    if "index" in kind:
        given["index"] = torch.randint(0, size, (n, count))
    else:
        given |= {"count": count, "seed": 2**40 + 3}
    return given


def gathered(x: Tensor, bank: Tensor, given: dict[str, Any]) -> Tensor:
    places = given.get("index")
    if places is None:
        places = Draws(given["count"], torch.tensor(given["seed"])).columns(len(x), len(bank))
    if "first" in given:
        places = torch.cat([given["first"][:, None], places], 1)
    return torch.stack([bank[row] @ x[i] for i, row in enumerate(places)])


KINDS = ["index", "first and index", "draws", "first and draws"]


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_blocks")
def test_equals_a_gather(impl: str, kind: str) -> None:
    x, bank = torch.randn(9, 5, dtype=F64), torch.randn(13, 5, dtype=F64)
    x.requires_grad_(), bank.requires_grad_()
    given = columns(kind, 9, 13)
    scores, expected = sampled_dot(x, bank, **given, impl=impl), gathered(x, bank, given)
    assert scores.shape == (9, 11 + ("first" in kind))
    torch.testing.assert_close(scores, expected)
    mine, theirs = (torch.autograd.grad(7 * s.sin().sum(), (x, bank)) for s in (scores, expected))
    torch.testing.assert_close(mine, theirs)
    (alone,) = torch.autograd.grad(sampled_dot(x, bank.detach(), **given, impl=impl).sum(), x)
    torch.testing.assert_close(alone, torch.autograd.grad(gathered(x, bank, given).sum(), x)[0])
    (alone,) = torch.autograd.grad(sampled_dot(x.detach(), bank, **given, impl=impl).sum(), bank)
    torch.testing.assert_close(alone, torch.autograd.grad(gathered(x, bank, given).sum(), bank)[0])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_opcheck_and_refusal(impl: str, kind: str) -> None:
    x, bank = torch.randn(3, 4, dtype=F64).requires_grad_(), torch.randn(5, 4, dtype=F64).requires_grad_()
    given = columns(kind, 3, 5, 4)
    check = torch.autograd.gradcheck
    assert check(lambda a, b: sampled_dot(a, b, **given, impl=impl), (x, bank), fast_mode=impl == "triton")
    seed = torch.tensor(given["seed"]) if "seed" in given else None
    where = (given.get("first"), given.get("index"), seed, given.get("count", 0))
    rows = (x.detach(), bank.detach())
    operators = torch.ops.fastret
    torch.library.opcheck(operators.sampled_dot.default, (*rows, *where, impl))
    grad = torch.randn(3, 4 + ("first" in kind), dtype=F64)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(operators.sampled_dot_backward.default, (grad, *rows, *where, *needs, impl))
    scores = sampled_dot(x, bank, **given, impl=impl)
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("impl", "kind"),
    [(impl, kind) for impl in FUSED for kind in (KINDS if impl != "triton" else ["index", "first and draws"])],
)
def test_compile_and_torch_func(impl: str, kind: str) -> None:
    x, bank = torch.randn(5, 4, dtype=F64), torch.randn(7, 4, dtype=F64)
    given = columns(kind, 5, 7)

    def loss(a: Tensor, impl: str) -> Tensor:
        return sampled_dot(a, bank, **given, impl=impl).sin().sum()

    one, two = (torch.func.grad(lambda a, impl=impl: loss(a, impl))(x) for impl in (impl, "reference"))
    torch.testing.assert_close(one, two)
    batch = torch.randn(3, 5, 4, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        many = torch.vmap(torch.func.grad(lambda a: loss(a, impl)))(batch)
    torch.testing.assert_close(many, torch.stack([torch.func.grad(lambda a: loss(a, impl))(a) for a in batch]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: loss(a, impl), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x.requires_grad_()), x)
    torch.testing.assert_close(gradient, two)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(impl: str, x_dtype: torch.dtype, bank_dtype: torch.dtype) -> None:
    x, bank = torch.randn(4, 33).to(x_dtype).requires_grad_(), torch.randn(20, 33).to(bank_dtype).requires_grad_()
    given = columns("first and draws", 4, 20, 24)
    scores = sampled_dot(x, bank, **given, impl=impl)
    assert scores.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (x, bank)]
    expected = gathered(*exact, given)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    scores.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip((x, bank), exact, strict=True):
        assert mine.grad.dtype == mine.dtype
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("n", [0, 1, 7, 65])
def test_any_number_of_rows_and_views_of_rows(impl: str, n: int) -> None:
    x, bank = torch.randn(2 * n + 1, 6)[1::2, ::2], torch.randn(40, 3).T.contiguous().T
    given = columns("first and draws", n, 40, 5)
    scores = sampled_dot(x, bank, **given, impl=impl)
    assert scores.shape == (n, 6)
    assert torch.equal(scores, sampled_dot(x.clone(), bank.contiguous(), **given, impl=impl))
    for dtype in (torch.int32, torch.uint8):
        narrow = {"first": given["first"].to(dtype), "index": columns("index", n, 40)["index"]}
        wide = narrow | {"first": given["first"]}
        assert torch.equal(sampled_dot(x, bank, **narrow, impl=impl), sampled_dot(x, bank, **wide, impl=impl))


@pytest.mark.parametrize("impl", FUSED)
def test_nothing_but_the_arguments_is_kept(impl: str) -> None:
    x, bank, first = torch.randn(2, 4).requires_grad_(), torch.randn(50, 4), torch.zeros(2, dtype=torch.int64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sampled_dot(x, bank, first=first, count=1000, seed=1, impl=impl)
    assert sum(t.numel() for t in kept) <= x.numel() + bank.numel() + first.numel() + 1


X, M, Y = torch.randn(4, 3), torch.randn(6, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sampled_dot(X, M[:, :2], count=3, seed=0), ValueError, "bank: expected 3 columns like x, got 2"),
        (lambda: sampled_dot(X, M[:0], count=3, seed=0), ValueError, "bank: expected at least one row"),
        (lambda: sampled_dot(X, M.double(), count=3, seed=0), TypeError, "bank: expected float64 exactly where x is"),
        (lambda: sampled_dot(X, M, count=0, seed=0), ValueError, "count: expected at least 1, got 0"),
        (lambda: sampled_dot(X, M, count=2.0, seed=0), TypeError, "count: expected an integer, got float"),
        (lambda: sampled_dot(X, M), ValueError, "index, count: expected exactly one"),
        (lambda: sampled_dot(X, M, count=2), ValueError, "count, seed: expected both or neither"),
        (lambda: sampled_dot(X, M, count=2, seed=0.5), TypeError, "seed: expected an integer"),
        (lambda: sampled_dot(X, M, count=2, seed=2**63), ValueError, "seed: expected an integer of 64 bits"),
        (lambda: sampled_dot(X, M, count=2, seed=torch.zeros(2)), ValueError, "seed: expected an integer or a 0-dim"),
        (lambda: sampled_dot(X, M, first=Y + 3, count=2, seed=0), ValueError, "first: expected numbers from 0 to 5"),
        (lambda: sampled_dot(X, M, first=Y[:2], count=2, seed=0), ValueError, r"first: expected shape \(4,\)"),
        (lambda: sampled_dot(X, M, index=Y), ValueError, r"index: expected shape \(4, K\) with K >= 1, got \(4,\)"),
        (lambda: sampled_dot(X, M, index=Y[:, None][:, :0]), ValueError, r"index: expected shape \(4, K\)"),
        (lambda: sampled_dot(X, M, index=X), TypeError, "index: expected an integer dtype"),
        (lambda: sampled_dot(X, M, index=[1]), TypeError, "index: expected an integer tensor"),
        (lambda: sampled_dot(X, M, index=Y[:, None] - 1), ValueError, "index: expected numbers from 0 to 5, got -1"),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str, impl: str) -> None:
    import fastret

    with fastret.backend(impl), pytest.raises(error, match=message):
        call()
