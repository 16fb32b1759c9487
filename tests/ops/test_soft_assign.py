"""soft_assign against a direct loop and its reference, and what PyTorch expects of an operator."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import soft_assign as tiled
from fastret.ops import SoftAssign, soft_assign

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu", "triton")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("soft_assign", "cpu", torch.float32)) is None
]
EVERYTHING: dict[str, Any] = {"hard": "straight-through", "usage": True, "purity": True}
SOURCES = ("distances", "tensor tau", "keys", "keys without bias", "logits")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "BUDGET", 64)


def case(
    source: str, n: int = 9, books: int = 3, words: int = 5, width: int = 4, dtype: torch.dtype = F64
) -> dict[str, Any]:
    """Arguments of soft_assign, of which every floating point tensor asks for its gradient."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    arguments: dict[str, Any] = {"x": leaf(n, books * width), "codebook": leaf(books, words, width)}
    if source == "distances":
        arguments["tau"] = 0.7
    elif source == "tensor tau":
        arguments["tau"] = torch.tensor(0.7, dtype=dtype).requires_grad_()
    elif source == "logits":
        arguments |= {"x": None, "logits": leaf(n, books * words)}
    else:
        arguments |= {"x": leaf(n, books * (width + 2)), "keys": leaf(books, words, width + 2)}
        if source == "keys":
            arguments["bias"] = leaf(books, words)
    return arguments


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [t for t in arguments.values() if isinstance(t, Tensor)]


def by_loops(arguments: dict[str, Any]) -> SoftAssign:
    """The definition, an element at a time."""
    codebook, x, logits = arguments["codebook"], arguments["x"], arguments.get("logits")
    books, words, width = codebook.shape
    n = len(logits if x is None else x)
    soft, hard = torch.zeros(2, n, books * width, dtype=F64)
    codes, purity = torch.zeros(n, books, dtype=torch.int64), torch.zeros(n, books, dtype=F64)
    usage = torch.zeros(books, words, dtype=F64)
    for i in range(n):
        for m in range(books):
            score = []
            for k in range(words):
                if logits is not None:
                    score.append(logits[i, m * words + k])
                elif "keys" in arguments:
                    key = arguments["keys"][m, k]
                    bias = arguments["bias"][m, k] if "bias" in arguments else 0
                    score.append(x[i, m * len(key) : (m + 1) * len(key)] @ key + bias)
                else:
                    part = x[i, m * width : (m + 1) * width]
                    score.append(-arguments["tau"] * (part - codebook[m, k]).square().sum())
            p = torch.stack(score).softmax(0)
            place = slice(m * width, (m + 1) * width)
            codes[i, m] = int(torch.stack(score).argmax())
            soft[i, place] = sum(p[k] * codebook[m, k] for k in range(words))
            hard[i, place] = codebook[m, codes[i, m]]
            usage[m] += p / n
            purity[i, m] = p.square().sum()
    return SoftAssign(codes, soft, hard, usage, purity)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.usefixtures("small_blocks")
def test_equals_a_direct_loop(impl: str, source: str) -> None:
    arguments = case(source)
    with torch.no_grad():
        expected = by_loops(arguments)
        result = soft_assign(**arguments, **EVERYTHING, impl=impl)
        torch.testing.assert_close(tuple(result), tuple(expected))
        for hard in (None, "detached"):
            some = soft_assign(**arguments, hard=hard, soft=False, impl=impl)
            assert torch.equal(some.codes, expected.codes)
            assert some.soft is some.usage is some.purity is None
            assert (some.hard is None) == (hard is None)
            if some.hard is not None:
                assert torch.equal(some.hard, result.hard)


def value(result: SoftAssign) -> Tensor:
    """A number that depends on everything there is."""
    return sum((k + 1) * t.sin().sum() for k, t in enumerate(result[1:]) if t is not None)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"soft": False, "hard": "straight-through"},
        {"hard": "detached"},
        {"soft": False, "hard": "detached"},
        {"soft": False, "usage": True},
        {"soft": False, "purity": True},
        EVERYTHING,
    ],
    ids=lambda wanted: "+".join(f"{k}={v}" for k, v in wanted.items()) or "soft",
)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_equal_the_reference(impl: str, source: str, wanted: dict[str, Any]) -> None:
    arguments = case(source, n=21, books=2, words=7)
    mine, expected = (
        torch.autograd.grad(
            7 * value(soft_assign(**arguments, **wanted, impl=i)), leaves(arguments), materialize_grads=True
        )
        for i in (impl, "reference")
    )
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("source", SOURCES)
def test_gradcheck_opcheck_and_refusal(impl: str, source: str) -> None:
    arguments = case(source, n=3, books=2, words=3, width=2)
    names = [name for name, t in arguments.items() if isinstance(t, Tensor)]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = soft_assign(**(arguments | dict(zip(names, tensors, strict=True))), usage=True, purity=True, impl=impl)
        return result.soft, result.usage, result.purity

    # interpreted kernels take too long to be differentiated element by element
    assert torch.autograd.gradcheck(outputs, leaves(arguments), fast_mode=impl == "triton")
    (gradient, *_) = torch.autograd.grad(outputs(*leaves(arguments))[0].sum(), leaves(arguments), create_graph=True)
    with pytest.raises(NotImplementedError, match="second differentiation; impl='reference' does"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck(impl: str) -> None:
    operators = torch.ops.fastret
    x, keys, bias, codebook = (torch.randn(s, dtype=F64) for s in ((5, 6), (2, 4, 3), (2, 4), (2, 4, 5)))
    logits, codes = torch.randn(5, 8, dtype=F64), torch.randint(0, 4, (5, 2))
    lse = torch.randn(5, 2, dtype=F64).abs() + 9
    grads = (torch.randn(5, 10, dtype=F64), torch.randn(5, 10, dtype=F64), torch.randn(2, 4, dtype=F64), lse)
    for scores in ((x, keys, bias, None), (None, None, None, logits)):
        for flags in ((True, True, True), (False, False, False)):
            torch.library.opcheck(operators.soft_assign.default, (*scores, codebook, *flags, impl))
        arguments = (*grads, lse, codes, *scores, codebook, True, True, True, impl)
        torch.library.opcheck(operators.soft_assign_backward.default, arguments)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("source", SOURCES)
def test_compile_and_torch_func(impl: str, source: str) -> None:
    arguments = case(source)
    rows = "logits" if source == "logits" else "x"
    x = arguments.pop(rows).detach()
    if rows == "logits":
        arguments.pop("x")
    arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}

    def loss(a: Tensor, impl: str) -> Tensor:
        given = {"x": None, rows: a} | arguments
        return value(soft_assign(**given, **EVERYTHING, impl=impl))

    one, two = (torch.func.grad(lambda a, impl=impl: loss(a, impl))(x) for impl in (impl, "reference"))
    torch.testing.assert_close(one, two)
    batch = torch.randn(3, *x.shape, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        many = torch.vmap(torch.func.grad(lambda a: loss(a, impl)))(batch)
    torch.testing.assert_close(many, torch.stack([torch.func.grad(lambda a: loss(a, impl))(a) for a in batch]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: loss(a, impl), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x.requires_grad_()), x)
    torch.testing.assert_close(gradient, two)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_ties_go_to_the_first_word_and_gradients_of_a_row_balance(impl: str) -> None:
    arguments = case("distances", n=33)
    codebook = arguments["codebook"]
    with torch.no_grad():
        codebook[:, 3] = codebook[:, 1]
    result = soft_assign(**arguments, impl=impl)
    assert not (result.codes == 3).any()
    assert (result.codes == 1).any()
    # sum over k of b is 0: a common shift of rows and words changes nothing
    dx, dc = torch.autograd.grad((result.soft - arguments["x"]).square().sum(), (arguments["x"], codebook))
    shifted = {"x": (arguments["x"] + 3).detach().requires_grad_(), "codebook": (codebook + 3).detach()}
    shifted["codebook"].requires_grad_()
    again = soft_assign(**shifted, tau=0.7, impl=impl)
    torch.testing.assert_close(again.soft - 3, result.soft)
    torch.testing.assert_close(
        torch.autograd.grad((again.soft - shifted["x"]).square().sum(), tuple(shifted.values())), (dx, dc)
    )


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 65])
def test_any_number_of_rows_and_views_of_rows(impl: str, n: int) -> None:
    arguments = case("distances", n=2 * n + 1, dtype=torch.float32)
    x = arguments["x"].detach()
    strided = soft_assign(x[1::2], arguments["codebook"], 0.7, impl=impl)
    plain = soft_assign(x[1::2].clone(), arguments["codebook"].clone(), 0.7, impl=impl)
    assert strided.soft.shape == (n, 12)
    assert torch.equal(strided.soft, plain.soft)
    assert torch.equal(strided.codes, plain.codes)


def errors(impl: str, given: dict[str, Tensor], tau: float, seed: int) -> list[tuple[float, float, float]]:
    """Of soft and the gradients of x and codebook: the norms of the truth, and of the naive path's error and ours."""
    results = []
    upstream = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(seed))
    for name in ("truth", "naive", "ours"):
        working = (t.double() if name == "truth" else t.clone() for t in given.values())
        x, codebook = (t.requires_grad_() for t in working)
        if name == "ours":
            soft = soft_assign(x, codebook, tau, impl=impl).soft
        else:
            parts = x.unflatten(1, (len(codebook), -1))
            p = (-tau * (parts[:, :, None] - codebook).square().sum(3)).softmax(2)
            soft = torch.einsum("nmk,mkl->nml", p, codebook).flatten(1)
        assert soft.dtype == x.dtype
        results.append([soft, *torch.autograd.grad(soft, (x, codebook), upstream.to(given["x"]).to(soft.dtype))])
    return [
        tuple(float(v.detach().norm()) for v in (t, naive.double() - t, ours.double() - t))
        for t, naive, ours in zip(*results, strict=True)
    ]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tau", "shift"), [(0.7, 0.0), (5.0, 0.0), (5.0, 4.0), (5.0, 20.0)])
def test_low_precision_is_as_good_as_the_naive_path(impl: str, dtype: torch.dtype, tau: float, shift: float) -> None:
    """Rows around words, as after k-means, and far from the origin; errors in the mean over seeds, as products and
    differences of the same numbers lose other digits."""
    found = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        codebook = torch.randn(2, 17, 8, generator=generator) + shift
        x = codebook[:, torch.randint(0, 17, (65,), generator=generator)].transpose(0, 1).flatten(1)
        x = x + 0.7 * torch.randn(x.shape, generator=generator)
        found.append(errors(impl, {"x": x.to(dtype), "codebook": codebook.to(dtype)}, tau, seed))
    eps = torch.finfo(dtype).eps
    for of_seeds in zip(*found, strict=True):
        size, theirs, ours = torch.tensor(of_seeds).mean(0).tolist()
        assert ours <= 2 * theirs + 4 * eps * size


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_a_row_with_nan_spoils_itself_alone(impl: str) -> None:
    arguments = case("distances", dtype=torch.float32)
    with torch.no_grad():
        arguments["x"][4, 5] = torch.nan  # in the second book
    result = soft_assign(**arguments, impl=impl)
    assert result.soft[4, 4:8].isnan().all()
    assert result.soft.isnan().sum() == 4
    assert ((result.codes >= 0) & (result.codes < 5)).all()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("hard", ["detached", "straight-through"])
def test_words_do_not_hide_nan(impl: str, source: str, hard: str) -> None:
    for name in ("x", "logits", "codebook", "keys", "bias"):
        arguments = case(source, n=4)
        if not isinstance(arguments.get(name), Tensor):
            continue
        with torch.no_grad():
            arguments[name].view(-1)[-1] = torch.nan
        for soft in (True, False):
            result = soft_assign(**arguments, soft=soft, hard=hard, impl=impl)
            assert result.hard[-1, -4:].isnan().any()
            if name in ("x", "logits"):
                assert result.hard.isnan().sum() == 4  # that part alone


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_a_logit_of_minus_infinity_is_a_word_that_is_not_taken(impl: str) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    result = soft_assign(None, torch.randn(1, 3, 2), logits=logits, hard="straight-through", usage=True, impl=impl)
    assert result.usage[0, 1] == 0
    assert result.hard.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_no_rows_use_no_word(impl: str) -> None:
    result = soft_assign(torch.zeros(0, 12), torch.randn(3, 5, 4), 1.0, **EVERYTHING, impl=impl)
    assert result.usage.tolist() == torch.zeros(3, 5).tolist()
    assert [t.shape for t in (result.soft, result.hard, result.codes, result.purity)] == [(0, 12)] * 2 + [(0, 3)] * 2


C, X = torch.randn(2, 3, 4), torch.randn(5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: soft_assign(X, C), ValueError, "tau, keys, logits: expected exactly one"),
        (lambda: soft_assign(X, C, 1.0, keys=C), ValueError, "tau, keys, logits: expected exactly one"),
        (lambda: soft_assign(None, C, 1.0), ValueError, "x, logits: expected exactly one"),
        (lambda: soft_assign(X, C, logits=X), ValueError, "x, logits: expected exactly one"),
        (lambda: soft_assign(X, C, 0.0), ValueError, "tau: expected a positive finite number, got 0.0"),
        (lambda: soft_assign(X, C, float("nan")), ValueError, "tau: expected a positive"),
        (lambda: soft_assign(X, C, torch.tensor(-1.0)), ValueError, "tau: expected a positive"),
        (lambda: soft_assign(X, C, "1"), TypeError, "tau: expected a number, got str"),
        (lambda: soft_assign(X[:, :7], C, 1.0), ValueError, "x: expected 8 columns for 2 books of width 4, got 7"),
        (lambda: soft_assign(X[0], C, 1.0), ValueError, r"x: expected shape \(rows, width\)"),
        (lambda: soft_assign(X.long(), C, 1.0), TypeError, "x: expected float32"),
        (lambda: soft_assign(X, C[0], 1.0), ValueError, r"codebook: expected shape \(books, words, width\)"),
        (lambda: soft_assign(X, C[:, :0], 1.0), ValueError, r"codebook: expected .* none of them 0"),
        (lambda: soft_assign(X, C.long(), 1.0), TypeError, "codebook: expected float32"),
        (lambda: soft_assign(X, [1], 1.0), TypeError, "codebook: expected a tensor"),
        (lambda: soft_assign(X[:, :1], C.new_empty(1, 65537, 1), 1.0), ValueError, "codebook: expected at most 65,536"),
        (lambda: soft_assign(X, C, keys=C[:1]), ValueError, r"keys: expected shape \(2, 3, width\)"),
        (lambda: soft_assign(X, C, 1.0, bias=C[:, :, 0]), ValueError, "bias: expected keys with it"),
        (lambda: soft_assign(X, C, keys=C, bias=C), ValueError, r"bias: expected shape \(2, 3\)"),
        (lambda: soft_assign(None, C, logits=X), ValueError, "logits: expected 6 columns for 2 books of 3 words"),
        (lambda: soft_assign(None, C, logits=C), ValueError, r"logits: expected shape \(N, 2, 3\), got \(2, 3, 4\)"),
        (lambda: soft_assign(X, C, 1.0, hard="yes"), ValueError, "hard: expected None or one of detached"),
        (lambda: soft_assign(X.to("meta"), C, 1.0), ValueError, "x: expected device cpu like the codebook, got meta"),
    ],
)
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("n", [6, 0])
def test_compiled_gradients_of_tensors_that_are_not_contiguous(impl: str, n: int) -> None:
    """Gradients are contiguous, as the compiler is told."""
    x = torch.randn(n, 8, requires_grad=True)
    codebook = torch.randn(2, 4, 5).transpose(1, 2).requires_grad_()
    keys, bias = torch.randn(2, 4, 5).transpose(1, 2).requires_grad_(), torch.randn(5, 2).t().requires_grad_()

    def loss(x: Tensor, codebook: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        return soft_assign(x, codebook, keys=keys, bias=bias, impl=impl).soft.square().sum()

    torch._dynamo.reset()
    given = [x, codebook, keys, bias]
    found, expected = (
        torch.autograd.grad(f(*given), given) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)
    )
    torch.testing.assert_close(found, expected)
    assert all(g.is_contiguous() for g in expected)
