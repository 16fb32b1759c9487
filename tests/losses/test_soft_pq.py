"""SoftPQ against the official formula written out densely, and what is done with its codes."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastret
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.functional import soft_pq
from fastret.losses import product_quantizer
from fastret.ops import soft_assign

F64 = torch.float64
FUSED = [
    impl
    for impl in ("tiled", "cpu", "triton")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("soft_assign", "cpu", torch.float32)) is None
]
IMPLS = ["reference", *FUSED]
M, K, L = 3, 5, 4


def official(x: Tensor, codebook: Tensor, books: int, tau_q: float | Tensor) -> Tensor:
    """SPQ's soft quantisation of (K, M L): all differences of a book at once."""
    width = codebook.shape[1] // books
    parts = []
    for own, words in zip(x.split(width, 1), codebook.split(width, 1), strict=True):
        distances = (own.unsqueeze(1) - words.unsqueeze(0)).pow(2).sum(2)
        parts.append(torch.softmax(distances * -tau_q, dim=1) @ words)
    return torch.cat(parts, 1)


def leaf(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["books, words, width", "words, books x width"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("n", "books", "words", "width"), [(1, 1, 1, 1), (7, 1, 2, 5), (33, 3, 5, 4), (65, 4, 63, 2)])
def test_equals_the_official_function(
    impl: str, layout: str, learned: bool, n: int, books: int, words: int, width: int
) -> None:
    x, codebook = leaf(n, books * width), leaf(words, books * width)
    tau = torch.tensor(0.8, dtype=F64, requires_grad=True) if learned else 0.8
    expected = official(x, codebook, books, tau)
    if layout == "words, books x width":
        z = soft_pq(x, codebook, tau, num_books=books, impl=impl)
    else:
        z = soft_pq(x, codebook.view(words, books, width).transpose(0, 1), tau, impl=impl)
    torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
    leaves = [x, codebook, tau] if learned else [x, codebook]
    upstream = torch.randn_like(z)
    mine, truth = (torch.autograd.grad((7 * upstream * t).sum(), leaves, retain_graph=True) for t in (z, expected))
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-10)
    once = torch.autograd.grad((upstream * z).sum(), leaves)
    torch.testing.assert_close([7 * t for t in once], list(mine))


@pytest.mark.parametrize("impl", IMPLS)
def test_hard_words_and_codes(impl: str) -> None:
    x, codebook = leaf(33, M * L), leaf(M, K, L)
    nearest = torch.cdist(x.view(33, M, L).transpose(0, 1), codebook).argmin(2).T
    words = codebook[torch.arange(M), nearest].flatten(1)
    soft, codes = soft_pq(x, codebook, 0.7, return_codes=True, impl=impl)
    detached, same = soft_pq(x, codebook, 0.7, hard="detached", return_codes=True, impl=impl)
    through = soft_pq(x, codebook, 0.7, hard="straight-through", impl=impl)
    assert torch.equal(codes, nearest)
    assert torch.equal(codes, same)
    assert torch.equal(detached, words)
    assert torch.equal(through, words)
    upstream = torch.randn_like(soft)
    of_soft, of_detached, of_through = (
        torch.autograd.grad((upstream * t).sum(), (x, codebook), retain_graph=True, materialize_grads=True)
        for t in (soft, detached, through)
    )
    assert not of_detached[0].any()
    torch.testing.assert_close(of_detached[1], torch.autograd.grad((upstream * words).sum(), codebook)[0])
    torch.testing.assert_close(of_through[0], of_soft[0])


@pytest.mark.parametrize("impl", FUSED)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
def test_order_of_books_words_and_rows(impl: str, n: int, books: int, words: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, books * width, dtype=F64, generator=generator)
    codebook = torch.randn(books, words, width, dtype=F64, generator=generator)
    rows, shelf, order = (torch.randperm(size, generator=generator) for size in (n, books, words))
    z, codes = soft_pq(x, codebook, return_codes=True, impl=impl)
    moved = x.view(n, books, width)[rows][:, shelf].flatten(1)
    again, renumbered = soft_pq(moved, codebook[shelf][:, order], return_codes=True, impl=impl)
    torch.testing.assert_close(again, z.view(n, books, width)[rows][:, shelf].flatten(1))
    assert torch.equal(order[renumbered], codes[rows][:, shelf])
    # z is a mean of words: within their bounds
    low, high = codebook.amin(1).flatten(), codebook.amax(1).flatten()
    assert ((z >= low - 1e-9) & (z <= high + 1e-9)).all()


@pytest.mark.parametrize("impl", FUSED)
def test_nothing_of_size_rows_times_words_is_kept(impl: str) -> None:
    n, books, words, width = 128 if impl == "triton" else 512, 4, 256, 4  # interpreted kernels are slow
    x, codebook = leaf(n, books * width, dtype=torch.float32), leaf(books, words, width, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in (x.data_ptr(), codebook.data_ptr()):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = soft_pq(x, codebook, impl=impl)
    codes_and_sums, copies_of_the_codebook = 12 * n * books, 6 * 4 * books * words * width
    assert sum(kept.values()) <= codes_and_sums + copies_of_the_codebook < n * books * words
    z.sum().backward()
    assert codebook.grad.isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_official_function(impl: str, dtype: torch.dtype) -> None:
    given_x, given_codebook = torch.randn(65, 16).to(dtype), torch.randn(17, 16).to(dtype)
    results = []
    for name, working in (("truth", F64), ("naive", dtype), ("mine", dtype)):
        x, codebook = (t.to(working).requires_grad_() for t in (given_x, given_codebook))
        mine = name == "mine"
        z = soft_pq(x, codebook, 0.7, num_books=2, impl=impl) if mine else official(x, codebook, 2, 0.7)
        assert z.dtype == working
        results.append([z, *torch.autograd.grad(z.double().square().sum(), (x, codebook))])
    for truth, naive, ours in zip(*results, strict=True):
        theirs, error = ((t.double() - truth).norm() for t in (naive, ours))
        assert error <= 2 * theirs + 4 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("options", [{}, {"learn_tau": True}, {"hard": "straight-through"}], ids=str)
def test_module_compiles_and_runs_under_autocast(impl: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    module = fastret.SoftPQ(M, K, L, 0.7, impl=impl, **options)
    x = leaf(9, M * L, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [x, *module.parameters()]
    of_both = [torch.autograd.grad(f(x).sin().sum(), leaves) for f in (compiled, module)]
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(*of_both)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.nn.functional.linear(x, torch.eye(M * L))
        z = module(half)
        assert half.dtype == z.dtype == torch.bfloat16
        assert torch.equal(module(x), module(x.detach()))
        assert module(x).dtype == torch.float32
    exact = module(half.float()).bfloat16()
    if impl == "triton":  # probabilities are rounded too: tensor cores multiply bfloat16
        bound = float(torch.finfo(torch.bfloat16).eps * module.codebook.detach().abs().max())
        torch.testing.assert_close(z, exact, rtol=0, atol=bound)
    else:
        torch.testing.assert_close(z, exact)


@pytest.mark.parametrize("options", [{}, {"learn_tau": True}], ids=str)
def test_module_is_copied_saved_and_moved(options: dict[str, Any]) -> None:
    module = fastret.SoftPQ(M, K, L, 0.7, **options)
    x = torch.randn(9, M * L)
    other = fastret.SoftPQ(M, K, L, 0.2 if options else 0.7, **options)
    other.load_state_dict(module.state_dict())
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x), module(x))
        assert repr(same) == repr(module)
    torch.testing.assert_close(module(x), soft_pq(x, module.codebook, 0.7))
    assert list(module.state_dict()) == ["codebook", *(["log_tau"] if options else [])]
    assert module.double()(x.double()).dtype == F64
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert "title=" in module.citation


def test_initialisation_is_the_official_one() -> None:
    module = fastret.SoftPQ()
    assert module.codebook.shape == (8, 16, 16)
    assert (module.num_books, module.num_words, module.word_dim, module.tau_q) == (8, 16, 16, 5.0)
    bound = math.sqrt(6 / (16 + 8 * 16))  # as torch.nn.init.xavier_uniform_ of (16, 128)
    assert 0.98 * bound < module.codebook.abs().max() <= bound
    torch.testing.assert_close(module.codebook.std().item(), bound / math.sqrt(3), rtol=0.05, atol=0)


def test_an_official_codebook_comes_in() -> None:
    state = {"1.C": torch.randn(K, M * L, dtype=F64)}
    module = fastret.SoftPQ.from_codebook(state["1.C"], num_books=M, tau_q=0.7)
    x = torch.randn(9, M * L, dtype=F64)
    torch.testing.assert_close(module(x), official(x, state["1.C"], M, 0.7))
    state["1.C"].zero_()
    assert module.codebook.all()
    again = fastret.SoftPQ.from_codebook(module.codebook, hard="detached", learn_tau=True)
    assert torch.equal(again.codebook, module.codebook)
    assert again.hard == "detached"
    torch.testing.assert_close(again.tau_q.item(), 5.0)


@pytest.mark.parametrize(("words", "dtype"), [(2, torch.uint8), (256, torch.uint8), (257, torch.int32)])
@pytest.mark.parametrize("n", [0, 1, 7, 65])
def test_codes(monkeypatch: pytest.MonkeyPatch, words: int, dtype: torch.dtype, n: int) -> None:
    module = fastret.SoftPQ(M, words, L)
    with torch.no_grad():
        module.codebook[:, -1] = module.codebook[:, 0]  # a tie
    x = torch.randn(n, M * L)
    codes = module.encode(x)
    assert codes.dtype == dtype
    assert codes.shape == (n, M)
    expected = soft_assign(x, module.codebook, 5.0).codes
    assert torch.equal(codes.long(), expected)
    assert not (codes.long() == words - 1).any()
    if n:
        distances = (x.view(n, M, 1, L) - module.codebook.detach()).square().sum(3)
        assert torch.equal(expected, distances.argmin(2))
    decoded = module.decode(codes)
    assert not decoded.requires_grad
    assert torch.equal(decoded, soft_pq(x, module.codebook, hard="detached").detach())
    assert torch.equal(module.encode(decoded), codes)
    # a block at a time
    sizes = []
    whole = module._codes

    def spy(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return whole(rows)

    monkeypatch.setattr(product_quantizer, "ROWS", 7)
    monkeypatch.setattr(module, "_codes", spy)
    assert torch.equal(module.encode(x), codes)
    assert torch.equal(module.decode(codes), decoded)
    assert max(sizes) <= 7


def test_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_quantizer, "ROWS", 3)
    module = fastret.SoftPQ(2, 4, L)
    codes = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3], [0, 3], [1, 3], [2, 3], [3, 3]], dtype=torch.uint8)
    used = module.usage(codes)
    assert used.counts.tolist() == [[2, 2, 2, 2], [0, 0, 0, 8]]
    torch.testing.assert_close(used.perplexity, torch.tensor([4.0, 1.0]))
    assert used.dead_words.tolist() == [0, 3]
    x = torch.randn(20, 2 * L)
    used = module.usage(x)
    assert torch.equal(used.counts, module.usage(module.encode(x).int()).counts)
    shares = used.counts.double() / 20
    entropy = torch.tensor([-sum(p * math.log(p) for p in row if p) for row in shares.tolist()])
    torch.testing.assert_close(used.perplexity, entropy.exp())
    nothing = module.usage(codes[:0])
    assert nothing.counts.sum() == 0
    assert nothing.perplexity.isnan().all()


@pytest.mark.parametrize(("books", "words", "bits"), [(8, 16, 32), (4, 256, 32), (3, 4, 6), (5, 1, 0), (2, 17, 10)])
def test_bits(books: int, words: int, bits: int) -> None:
    assert fastret.SoftPQ(books, words, 2).num_bits == bits


def test_training_lowers_the_quantisation_error() -> None:
    x = torch.randn(4, 8).repeat_interleave(50, 0) + 0.1 * torch.randn(200, 8)
    module = fastret.SoftPQ(2, 4, 4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)

    def error() -> float:
        return (module.decode(module.encode(x)) - x).square().mean().item()

    before = error()
    for _ in range(150):
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
    assert error() < 0.1 * before


def test_trains_with_cqc() -> None:
    network = torch.nn.Linear(6, 8)
    module = fastret.SoftPQ(2, 4, 4)
    xa, xb = network(torch.randn(16, 6)), network(torch.randn(16, 6))
    fastret.CQCLoss(tau_cqc=0.5)(xa, xb, module(xa), module(xb)).backward()
    assert module.codebook.grad.abs().sum() > 0
    assert network.weight.grad.abs().sum() > 0


C, X = torch.randn(2, 3, 4), torch.randn(5, 8)
QUANTIZER = fastret.SoftPQ(2, 3, 4)
LARGE = fastret.SoftPQ(2, 300, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: soft_pq(X, C[0]), ValueError, r"num_books: expected with a codebook .* \(3, 4\)"),
        (lambda: soft_pq(X, C[0], num_books=3), ValueError, "codebook: expected .* num_books = 3 divides, got 4"),
        (lambda: soft_pq(X, C, num_books=3), ValueError, "num_books: expected 2 like the codebook, got 3"),
        (lambda: soft_pq(X, C, num_books=0), ValueError, "num_books: expected at least 1, got 0"),
        (lambda: soft_pq(X, C, num_books=2.0), TypeError, "num_books: expected an integer, got float"),
        (lambda: soft_pq(X[:, :7], C), ValueError, "x: expected 8 columns for 2 books of width 4, got 7"),
        (lambda: soft_pq(X, C[:, :0]), ValueError, "codebook: expected .* none of them 0"),
        (lambda: soft_pq(X, C[0, :0], num_books=2), ValueError, "codebook: expected .* none of them 0"),
        (lambda: soft_pq(X[:, :1], C.new_empty(65537, 1), num_books=1), ValueError, "codebook: .* at most 65,536"),
        (lambda: soft_pq(X, [1.0]), TypeError, "codebook: expected a tensor"),
        (lambda: soft_pq(X, C, 0.0), ValueError, "tau_q: expected a positive finite number, got 0.0"),
        (lambda: soft_pq(X, C, float("nan")), ValueError, "tau_q: expected a positive"),
        (lambda: soft_pq(X, C, torch.tensor(-1.0)), ValueError, "tau_q: expected a positive"),
        (lambda: soft_pq(X, C, hard="yes"), ValueError, "hard: expected None or one of detached"),
        (lambda: soft_pq(X.to("meta"), C), ValueError, "x: expected device cpu like the codebook, got meta"),
        (lambda: fastret.SoftPQ(0), ValueError, "num_books: expected at least 1, got 0"),
        (lambda: fastret.SoftPQ(8, 0), ValueError, "num_words: expected at least 1, got 0"),
        (lambda: fastret.SoftPQ(1, 65537, 1), ValueError, "num_words: expected at most 65,536, got 65,537"),
        (lambda: fastret.SoftPQ(8, 16, 1.5), TypeError, "word_dim: expected an integer, got float"),
        (lambda: fastret.SoftPQ(tau_q=-1), ValueError, "tau_q: expected a positive finite number, got -1"),
        (lambda: fastret.SoftPQ(hard="yes"), ValueError, "hard: expected None or one of detached"),
        (lambda: fastret.SoftPQ(2, 3, 4, impl="cuda")(X), ValueError, "impl"),
        (lambda: fastret.SoftPQ.from_codebook(C[0]), ValueError, "num_books: expected with a codebook"),
        (lambda: QUANTIZER.encode(X[:, 1:]), ValueError, "x: expected 8 columns for 2 books of width 4, got 7"),
        (lambda: QUANTIZER.encode(X[:0, 1:]), ValueError, "x: expected 8 columns"),
        (lambda: QUANTIZER.encode(X.long()), TypeError, "x: expected float32"),
        (lambda: QUANTIZER.decode(X), TypeError, "codes: expected an integer dtype, got torch.float32"),
        (lambda: QUANTIZER.decode([[0, 1]]), TypeError, r"codes: expected an integer tensor \(N, 2\), got list"),
        (lambda: QUANTIZER.decode(torch.zeros(5, 3).int()), ValueError, r"codes: expected shape \(N, 2\)"),
        (lambda: QUANTIZER.decode(torch.tensor([[0, 3]])), ValueError, "codes: expected numbers from 0 to 2, got 3"),
        (lambda: QUANTIZER.decode(torch.tensor([[0, -1]])), ValueError, "codes: expected numbers from 0 to 2, got -1"),
        (lambda: LARGE.decode(torch.tensor([[0, -1]]).char()), ValueError, "codes: expected numbers from 0 to 299"),
        (lambda: QUANTIZER.usage(torch.tensor([[9, 0]]).byte()), ValueError, "codes: expected numbers from 0 to 2"),
        (lambda: QUANTIZER.usage("x"), TypeError, "codes: expected an integer tensor"),
        (lambda: QUANTIZER.decode(torch.zeros(1, 2).int().to("meta")), ValueError, "codes: expected device cpu"),
    ],
)
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
