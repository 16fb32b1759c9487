"""PQIndex: encoding, search, files, FAISS, and what it refuses, against loops and FAISS itself."""

import copy
import json
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastret import SoftPQ, ops
from fastret.retrieval import PQIndex, pq_index, search
from fastret.retrieval.faiss_pq import from_index_pq, to_index_pq

M, L = 4, 3
CODEBOOK = torch.randn(M, 16, L, generator=torch.Generator().manual_seed(1))
X = torch.randn(90, M * L, generator=torch.Generator().manual_seed(2))
QUERY = torch.randn(20, M * L, generator=torch.Generator().manual_seed(3))


def filled(words: int = 16, count: int = 90, metric: str = "l2", books: int = M) -> PQIndex:
    codes = torch.randint(0, words, (count, books), dtype=torch.int32)
    return PQIndex(torch.randn(books, words, L), codes, metric=metric)


def nearest(x: Tensor, codebook: Tensor) -> list[list[int]]:
    """Words by direct distances in float64, one row and book after another."""
    result = []
    for row in x.double():
        parts = row.view(len(codebook), 1, -1)
        result.append([int((p - words.double()).square().sum(1).argmin()) for p, words in zip(parts, codebook)])  # noqa: B905
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_are_encoded_by_their_nearest_words(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    index = PQIndex(CODEBOOK)
    index.add(x[:50])
    index.add(x[50:])
    assert len(index) == 90
    assert index.codes.dtype == torch.uint8
    assert index.codes.tolist() == nearest(x, CODEBOOK)
    words = [[CODEBOOK[m, c] for m, c in enumerate(row)] for row in index.codes.tolist()]
    assert torch.equal(index.reconstruct(torch.arange(90)), torch.stack([torch.cat(row) for row in words]))


def test_of_equally_near_words_the_lower_is_taken() -> None:
    codebook = torch.tensor([[[5.0], [1.0], [-1.0], [1.0]]])
    index = PQIndex(codebook)
    index.add(torch.tensor([[0.0], [1.0], [3.0], [-9.0]]))
    assert index.codes.flatten().tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_far_from_the_origin_are_encoded_by_their_nearest_words(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pq_index, "_ROWS", 40)
    codebook, x = 1000 + 5 * CODEBOOK, (1000 + 5 * X).to(dtype)
    index = PQIndex(codebook)
    index.add(x)
    assert index.codes.tolist() == nearest(x, codebook)
    for quantizer in (SoftPQ.from_codebook(codebook), SoftPQ.from_codebook(codebook, tau_q=0.3)):
        assert torch.equal(quantizer.encode(x), index.codes)
    scores, _ = index.search(x, 1, symmetric=True)
    assert not scores.any()


def test_rows_are_encoded_in_the_wider_dtype() -> None:
    codebook = torch.tensor([[[0.0], [1.0], [1 + 2.0**-30]]], dtype=torch.float64)
    x = torch.tensor([[1.0], [3.0]])
    index = PQIndex(codebook)
    index.add(x)
    assert index.codes.flatten().tolist() == [1, 2]
    assert torch.equal(SoftPQ.from_codebook(codebook).encode(x), index.codes)


@pytest.mark.parametrize("words", [1, 2, 255, 256, 257, 1000])
def test_properties(words: int) -> None:
    index = filled(words)
    assert (index.num_books, index.num_words, index.word_dim, index.dim, len(index)) == (M, words, L, M * L, 90)
    assert index.codes.dtype == (torch.uint8 if words <= 256 else torch.int32)
    assert index.codebook.shape == (M, words, L)
    assert f"90 codes; num_books=4, num_words={words}, word_dim=3, metric='l2'" in repr(index)
    more = filled(words).codes
    before = index.codes.clone()
    index.add_codes(more.long())
    assert torch.equal(index.codes, torch.cat([before, more]))


def test_a_codebook_that_is_trained_on_does_not_change_the_index() -> None:
    codebook = torch.nn.Parameter(CODEBOOK.clone())
    index = PQIndex(codebook)
    with torch.no_grad():
        codebook.zero_()
    assert torch.equal(index.codebook, CODEBOOK)
    assert not index.codebook.requires_grad
    assert PQIndex(CODEBOOK.bfloat16()).codebook.dtype == torch.float32
    assert PQIndex(CODEBOOK.double()).codebook.dtype == torch.float64


@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_searches_are_those_of_the_op(metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    index, query = filled(metric=metric), QUERY.to(dtype)
    expected = ops.pq_topk(query, index.codebook, index.codes, k=7, metric=metric)
    torch.testing.assert_close(index.search(query, 7), expected, rtol=0, atol=0)
    other = PQIndex(index.codebook, index.codes)
    torch.testing.assert_close(other.search(query, 7, metric=metric, impl="tiled"), expected)
    monkeypatch.setattr(search, "_PRODUCTS", 1)
    monkeypatch.setattr(search, "_LEAST_ROWS", 6)
    torch.testing.assert_close(index.search(query, 7, progress=False), expected, rtol=0, atol=0)


@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
def test_symmetric_scores_are_those_between_words(metric: str) -> None:
    index = filled(metric=metric)
    scores, indices = index.search(QUERY, 90, symmetric=True)
    words = nearest(QUERY, index.codebook)
    for row, own in enumerate(words):
        for column in range(0, 90, 7):
            parts = [
                (index.codebook[m, own[m]].double(), index.codebook[m, c].double())
                for m, c in enumerate(index.codes[indices[row, column]].tolist())
            ]
            if metric == "dot":
                expected = sum(float(a @ b) for a, b in parts)
            else:
                power = 2 if metric == "l2" else 1
                expected = sum(float((a - b).norm()) ** power for a, b in parts)
            assert scores[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert index.search(QUERY.double(), 1, symmetric=True)[0].dtype == torch.float64


@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_nothing_to_search(metric: str) -> None:
    index = PQIndex(CODEBOOK, metric=metric)
    scores, indices = index.search(QUERY, 3)
    assert (indices == -1).all()
    assert scores.shape == (20, 3)
    assert scores.isinf().all()
    assert index.codes.shape == (0, M)
    index.add(X[:0])
    assert len(index) == 0
    assert [len(part) for part in index.search(QUERY[:0], 3)] == [0, 0]
    assert index.reconstruct(torch.empty(0, 5).long()).shape == (0, 5, M * L)
    index.add(X[:2])
    scores, indices = index.search(QUERY, 3)
    assert (indices.sort(1).values == torch.tensor([-1, 0, 1])).all()
    assert scores[:, 2].isinf().all()


def test_reconstructs_any_shape() -> None:
    index = filled(300)
    for narrow in (torch.int8, torch.uint8, torch.int16):  # 90 codes; then more than int8, and uint8, can number
        assert torch.equal(index.reconstruct(torch.tensor([89]).to(narrow)), index.reconstruct(torch.tensor([89])))
    large = filled(300, 300)
    for narrow in (torch.int8, torch.uint8):
        assert torch.equal(large.reconstruct(torch.tensor([100]).to(narrow)), large.reconstruct(torch.tensor([100])))
    with pytest.raises(ValueError, match="indices: expected numbers from 0 to 299, got -1"):
        large.reconstruct(torch.tensor([-1], dtype=torch.int8))
    _, indices = index.search(QUERY, 5)
    rows = index.reconstruct(indices)
    assert rows.shape == (20, 5, M * L)
    code = index.codes[indices[3, 2]].tolist()
    assert torch.equal(rows[3, 2], torch.cat([index.codebook[m, c] for m, c in enumerate(code)]))


@pytest.mark.parametrize("words", [16, 256, 1000, 65536])
@pytest.mark.parametrize("metric", ["l2", "l21", "dot"])
def test_files(words: int, metric: str, tmp_path: Path) -> None:
    index = filled(words, metric=metric)
    index.save(tmp_path / "index")
    again = PQIndex.load(str(tmp_path / "index"))
    assert torch.equal(again.codebook, index.codebook)
    assert torch.equal(again.codes, index.codes)
    assert again.codes.dtype == index.codes.dtype
    assert again.metric == metric
    torch.testing.assert_close(again.search(QUERY, 5), index.search(QUERY, 5), rtol=0, atol=0)
    again.add(X)
    again.save(tmp_path / "index")  # over the file it came from
    assert len(PQIndex.load(tmp_path / "index")) == 180
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("words", [16, 256, 300, 65536])
def test_pickles_and_copies(words: int, tmp_path: Path) -> None:
    index = filled(words, metric="l21")
    index.add(X)
    expected = index.search(QUERY, 5)
    torch.save(index, tmp_path / "index.pt")
    loaded = torch.load(tmp_path / "index.pt", weights_only=False)
    for again in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index), copy.copy(index), loaded):
        torch.testing.assert_close(again.search(QUERY, 5), expected, rtol=0, atol=0)
        again.add(X)
        assert torch.equal(again.codes, torch.cat([index.codes, index.codes[90:]]))
    assert len(index) == 180


def test_an_empty_index_and_float64_words_are_kept(tmp_path: Path) -> None:
    PQIndex(CODEBOOK.double()).save(tmp_path / "index")
    index = PQIndex.load(tmp_path / "index")
    assert len(index) == 0
    assert torch.equal(index.codebook, CODEBOOK.double())


GOOD = {"format": "fastret.PQIndex", "version": "1", "metric": "l2"}
TENSORS = {"codebook": CODEBOOK, "codes": torch.zeros(9, M, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (TENSORS, {**GOOD, "version": "2"}, "expected version 1 of the format, got '2'"),
        (TENSORS, {**GOOD, "format": "pt"}, "no index of fastret.retrieval.PQIndex"),
        (TENSORS, None, "no index of fastret.retrieval.PQIndex"),
        (TENSORS, {**GOOD, "metric": "cosine"}, "metric: expected one of l2, l21, dot, got 'cosine'"),
        (TENSORS, {"format": "fastret.PQIndex", "version": "1"}, "metric: expected one of l2, l21, dot, got ''"),
        ({"codes": TENSORS["codes"]}, GOOD, "no tensor codebook"),
        ({"a": CODEBOOK}, GOOD, "no tensor codebook and codes"),
        ({**TENSORS, "codes": TENSORS["codes"] + 16}, GOOD, "codes: expected numbers from 0 to 15, got 16"),
        (
            {**TENSORS, "codes": TENSORS["codes"][:, :3].contiguous()},
            GOOD,
            r"codes: expected shape \(N, 4\)",
        ),
        ({**TENSORS, "codes": torch.zeros(9, M)}, GOOD, "codes: expected an integer dtype"),
        ({**TENSORS, "codebook": CODEBOOK[0].clone()}, GOOD, "codebook: expected shape"),
        ({**TENSORS, "codebook": CODEBOOK.int()}, GOOD, "codebook: expected float32"),
        ({**TENSORS, "codebook": CODEBOOK / 0}, GOOD, "codebook: expected finite words"),
    ],
)
def test_files_that_are_no_index(tensors: dict, metadata: dict | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=message) as caught:
        PQIndex.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_damaged_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    filled().save(whole)
    content = whole.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["codes"]["shape"] = [90, 40]
    lying = json.dumps(header).encode()
    path = tmp_path / "damaged"
    for damaged in (
        b"",
        b"short",
        content[: size // 2],
        content[:-1],
        content[:8] + b"x" + content[9:],
        b"\xff" * 8 + content[8:],
        struct.pack("<Q", len(lying)) + lying + content[8 + size :],
        b"\x93NUMPY" + content,
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{path}: "):
            PQIndex.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PQIndex.load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        PQIndex.load(tmp_path)


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match=f"no directory to save in: '{parent}'"):
            filled().save(parent / "index")

    def fails(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match=f"^{tmp_path / 'index'}: I/O error: disk full"):
        filled().save(tmp_path / "index")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    filled().save(path)
    before = path.read_bytes()

    def fails(tensors: dict, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        filled().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("words", [16, 64, 256, 1024, 65536])
@pytest.mark.parametrize("metric", ["l2", "dot"])
@pytest.mark.parametrize("books", [1, 4, 5])
def test_to_faiss_and_back(words: int, metric: str, books: int) -> None:
    pytest.importorskip("faiss")
    index = filled(words, 700, metric, books)
    theirs = index.to_faiss()
    assert (theirs.ntotal, theirs.d, theirs.is_trained) == (700, books * L, True)
    query = torch.randn(30, books * L)
    values, places = (torch.from_numpy(t) for t in theirs.search(query.numpy(), 9))
    scores, indices = index.search(query, 9)
    torch.testing.assert_close(scores, values, rtol=1e-5, atol=1e-5)
    same = index.codes[places] == index.codes[indices]  # copies of a code in another order; near ones by rounding
    assert same.all(2).float().mean() > 0.99
    torch.testing.assert_close(torch.as_tensor(theirs.reconstruct_n(0, 700)), index.reconstruct(torch.arange(700)))
    again = PQIndex.from_faiss(theirs)
    assert again.metric == metric
    assert torch.equal(again.codebook, index.codebook)
    assert torch.equal(again.codes, index.codes)


@pytest.mark.parametrize("bits", [4, 6, 8, 10])
def test_an_index_that_faiss_trained(bits: int, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    x = torch.randn(3000, 12)
    theirs = faiss.IndexPQ(12, 4, bits)
    theirs.train(x.numpy())
    theirs.add(x.numpy())
    faiss.write_index(theirs, str(tmp_path / "theirs"))
    index = PQIndex.from_faiss(faiss.read_index(str(tmp_path / "theirs")))
    assert (index.num_books, index.num_words, index.word_dim, len(index)) == (4, 1 << bits, 3, 3000)
    ours = PQIndex(index.codebook)
    ours.add(x)
    assert (ours.codes == index.codes).float().mean() > 0.999  # rounding decides between words as near
    query = torch.randn(50, 12)
    values, places = (torch.from_numpy(t) for t in theirs.search(query.numpy(), 10))
    scores, indices = index.search(query, 10)
    torch.testing.assert_close(scores, values, rtol=1e-5, atol=1e-5)
    assert (index.codes[places] == index.codes[indices]).all(2).float().mean() > 0.99
    if bits == 8:  # FAISS' own symmetric search takes no other
        theirs.search_type = faiss.IndexPQ.ST_SDC
        theirs.pq.compute_sdc_table()
        values, places = (torch.from_numpy(t) for t in theirs.search(query.numpy(), 10))
        scores, indices = index.search(query, 10, symmetric=True)
        torch.testing.assert_close(scores, values, rtol=1e-5, atol=1e-5)
        assert (index.codes[places] == index.codes[indices]).all(2).float().mean() > 0.99


def test_an_empty_index_to_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    theirs = to_index_pq(torch.nn.Parameter(CODEBOOK.double()))
    assert (theirs.ntotal, theirs.is_trained, theirs.metric_type) == (0, True, faiss.METRIC_L2)
    theirs.add(X.numpy())
    ours = PQIndex(CODEBOOK)
    ours.add(X)
    assert torch.equal(from_index_pq(theirs)[1], ours.codes)
    assert len(PQIndex.from_faiss(PQIndex(CODEBOOK).to_faiss())) == 0


def test_what_faiss_has_no_index_for() -> None:
    faiss = pytest.importorskip("faiss")
    for words in (1, 12, 257):
        with pytest.raises(ValueError, match=rf"codebook: FAISS expects a power of two of words.* got K = {words}"):
            filled(words).to_faiss()
    with pytest.raises(ValueError, match=r"metric: FAISS has l2 and dot .* got 'l21'"):
        filled(metric="l21").to_faiss()
    with pytest.raises(ValueError, match="codes: expected numbers from 0 to 15, got 16"):
        to_index_pq(CODEBOOK, torch.full((2, M), 16))
    with pytest.raises(TypeError, match=r"index: expected a faiss.IndexPQ, got IndexFlatL2"):
        PQIndex.from_faiss(faiss.IndexFlatL2(4))
    with pytest.raises(TypeError, match=r"index: expected a faiss.IndexPQ, got str"):
        PQIndex.from_faiss("index")
    with pytest.raises(ValueError, match=r"index: expected a trained faiss.IndexPQ"):
        PQIndex.from_faiss(faiss.IndexPQ(4, 2, 8))
    other = filled().to_faiss()
    other.metric_type = faiss.METRIC_L1
    with pytest.raises(ValueError, match="index: expected METRIC_L2 or METRIC_INNER_PRODUCT, got metric_type 2"):
        PQIndex.from_faiss(other)
    wide = faiss.IndexPQ(2, 2, 17)
    wide.is_trained = True
    with pytest.raises(ValueError, match=r"index: expected at most 65536 words a book .* got 17 bits"):
        PQIndex.from_faiss(wide)


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (filled().to_faiss, lambda: PQIndex.from_faiss(None)):
        with pytest.raises(ImportError, match=r"pip install 'fastret\[faiss\]'"):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codebook": CODEBOOK[0]}, ValueError, "codebook: expected shape"),
        ({"codebook": CODEBOOK[:, :0]}, ValueError, "codebook: expected shape .* none of them 0"),
        (
            {"codebook": torch.zeros(1, 65537, 1)},
            ValueError,
            "codebook: expected at most 65,536 words a book",
        ),
        ({"codebook": CODEBOOK.long()}, TypeError, "codebook: expected float32"),
        ({"codebook": CODEBOOK * torch.nan}, ValueError, "codebook: expected finite words, got NaN"),
        (
            {"codes": torch.zeros(3, 5).byte()},
            ValueError,
            r"codes: expected shape \(N, 4\), .* got \(3, 5\)",
        ),
        ({"codes": torch.zeros(3, M)}, TypeError, "codes: expected an integer dtype, got torch.float32"),
        ({"codes": torch.full((3, M), 16)}, ValueError, "codes: expected numbers from 0 to 15, got 16"),
        ({"codes": torch.full((3, M), -1)}, ValueError, "codes: expected numbers from 0 to 15, got -1"),
        ({"metric": "cosine"}, ValueError, "metric: expected one of l2, l21, dot, got 'cosine'"),
    ],
)
def test_bad_codebooks_and_codes_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PQIndex(**{"codebook": CODEBOOK, **arguments})


def test_bad_rows_and_indices_are_named() -> None:
    index = filled()
    for call, name in ((index.add, "x"), (lambda x: index.search(x, 2), "query")):
        with pytest.raises(ValueError, match=rf"{name}: expected 4 x 3 = 12 columns for 4 books .* got 11"):
            call(X[:, :11])
        with pytest.raises(TypeError, match=f"{name}: expected float32"):
            call(X.long())
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            call(X[0])
        with pytest.raises(ValueError, match=f"{name}: expected device cpu, got meta"):
            call(X.to("meta"))
    bad = X.clone()
    bad[3, 5] = torch.nan
    with pytest.raises(ValueError, match="x: expected finite rows"):
        index.add(bad)
    with pytest.raises(ValueError, match="query: expected finite rows"):
        index.search(bad, 2, symmetric=True)
    with pytest.raises(ValueError, match="x: expected finite rows, got NaN, infinity or squares beyond the dtype"):
        index.add(1e19 * X)
    assert (index.search(bad, 2)[1][3] == -1).all()
    assert len(index) == 90
    for k, error in ((0, ValueError), (None, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="k: expected"):
            index.search(X, k)
    with pytest.raises(ValueError, match="metric: expected one of"):
        index.search(X, 1, metric="cosine")
    with pytest.raises(ValueError, match="codes: expected numbers from 0 to 15, got 200"):
        index.add_codes(torch.full((1, M), 200, dtype=torch.uint8))
    for wrong in (90, -1):
        with pytest.raises(ValueError, match=f"indices: expected numbers from 0 to 89, got {wrong}"):
            index.reconstruct(torch.tensor([0, wrong]))
    with pytest.raises(TypeError, match=r"indices: expected an integer tensor, got torch.float32"):
        index.reconstruct(torch.zeros(2))
    with pytest.raises(TypeError, match="indices: expected an integer tensor, got list"):
        index.reconstruct([1])
