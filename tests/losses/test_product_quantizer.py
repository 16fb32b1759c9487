"""Where product quantizers come from and go to: k-means, and FAISS."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastret
from fastret.retrieval.kmeans import product_kmeans


def clustered(n: int, width: int) -> Tensor:
    return torch.randn(12, width)[torch.randint(12, (n,))] + 0.2 * torch.randn(n, width)


def error(module: fastret.SoftPQ, x: Tensor) -> float:
    return (module.decode(module.encode(x)) - x).square().mean().item()


def test_init_from_is_k_means_of_each_sub_space() -> None:
    x = clustered(400, 12)
    module = fastret.SoftPQ(3, 8, 4)
    module.init_from(x, seed=3, iterations=10)
    assert torch.equal(module.codebook, product_kmeans(x, 3, 8, seed=3, iterations=10))
    assert module.codebook.requires_grad
    assert error(module, x) < 0.5 * error(fastret.SoftPQ(3, 8, 4), x)
    assert not module.usage(x).dead_words.any()
    half = fastret.SoftPQ(3, 8, 4).bfloat16()
    half.init_from(x, seed=3, iterations=10)
    assert torch.equal(half.codebook, module.codebook.bfloat16())
    start = error(module, x)  # the soft reconstruction goes on from there, towards less than k-means' error
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
    assert (module(x) - x).square().mean() < start


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda q: q.init_from(torch.randn(99, 10)),
            ValueError,
            "x: expected 12 columns for 3 books of width 4, got 10",
        ),
        (lambda q: q.init_from(torch.randn(7, 12)), ValueError, "expected at most the 7 rows, got 8"),
        (lambda q: q.init_from(torch.randn(99, 12).long()), TypeError, "x: expected float32"),
    ],
)
def test_bad_rows_to_start_from(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(fastret.SoftPQ(3, 8, 4))


@pytest.mark.parametrize(("books", "words"), [(4, 16), (3, 256), (2, 8)])
def test_faiss_serves_the_codebook(books: int, words: int) -> None:
    pytest.importorskip("faiss")
    module = fastret.SoftPQ(books, words, 4)
    gallery, query = torch.randn(300, books * 4), torch.randn(9, books * 4)
    index = module.to_faiss()
    assert index.is_trained
    assert index.ntotal == 0
    index.add(gallery.numpy())
    codes = module.encode(gallery)
    np.testing.assert_allclose(index.reconstruct_n(0, 300), module.decode(codes).numpy(), rtol=1e-6)
    distances, found = index.search(query.numpy(), 5)
    exact = (query[:, None] - module.decode(codes)).square().sum(2)
    np.testing.assert_allclose(distances, exact.topk(5, largest=False).values.numpy(), rtol=1e-4)
    np.testing.assert_allclose(distances, exact.gather(1, torch.from_numpy(found)).numpy(), rtol=1e-4)


def test_faiss_serves_hard_rows_of_dpq() -> None:
    pytest.importorskip("faiss")
    head = fastret.DPQ(12, 3, 16, intra_normalize=True)
    x = torch.randn(50, 12)
    index = head.to_faiss()
    hard = head.decode(head.encode(x))
    index.add(hard.numpy())
    np.testing.assert_allclose(index.reconstruct_n(0, 50), hard.numpy(), rtol=1e-6)


def test_words_that_faiss_cannot_number() -> None:
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="power of two"):
        fastret.SoftPQ(2, 12, 4).to_faiss()


def test_readme() -> None:
    """The README's product quantizer runs as it stands."""
    pytest.importorskip("faiss")
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (snippet,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "SoftPQ" in block]
    images = torch.randn(64, 10)
    names: dict[str, Any] = {
        "torch": torch,
        "fastret": fastret,
        "network": torch.nn.Linear(10, 128),
        "loader": [(images, images + 0.1 * torch.randn(64, 10))] * 2,
        "gallery": torch.randn(500, 10),
        "query": torch.randn(3, 10),
    }
    before = names["network"].weight.detach().clone()
    exec(snippet, names)
    assert names["found"].shape == (3, 10)
    assert not torch.equal(names["network"].weight, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_codes_of_any_integer_dtype(dtype: torch.dtype) -> None:
    module = fastret.SoftPQ(3, 300, 4)
    codes = torch.randint(0, 128, (50, 3))
    expected = torch.stack([torch.cat([module.codebook[m, c] for m, c in enumerate(row)]) for row in codes.tolist()])
    assert torch.equal(module.decode(codes.to(dtype)), expected)
    assert torch.equal(module.usage(codes.to(dtype)).counts, module.usage(codes).counts)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_a_code_that_is_no_word_is_refused(backend: str) -> None:
    torch._dynamo.reset()
    module = fastret.SoftPQ(2, 5, 4)
    decode = torch.compile(module.decode, fullgraph=True, backend=backend)
    codes = torch.tensor([[4, 0], [2, 1]])
    assert torch.equal(decode(codes), module.decode(codes))
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=f"codes: expected numbers from 0 to 4, got {wrong}"):
            decode(torch.tensor([[4, 0], [wrong, 1]]))


@pytest.mark.parametrize("words", [16, 257])
def test_codes_go_into_an_index(words: int) -> None:
    module = fastret.SoftPQ(3, words, 4)
    gallery, query = torch.randn(400, 12), torch.randn(5, 12)
    index = fastret.retrieval.PQIndex(module.codebook, module.encode(gallery))
    scores, found = index.search(query, 7)
    exact = (query[:, None] - module.decode(module.encode(gallery))).square().sum(2)
    torch.testing.assert_close(scores, exact.topk(7, largest=False).values)
    torch.testing.assert_close(scores, exact.gather(1, found))
    index.add(gallery)
    assert torch.equal(index.codes[400:], index.codes[:400])
