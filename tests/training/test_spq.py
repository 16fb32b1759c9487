"""Training without labels and retrieval by codes: the loss, its start, what is measured, whole runs."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastret
from fastret.data import ImageSet, load_glyphs
from fastret.training import TrainOptions, codes, train
from fastret.training.augment import GLYPHS
from fastret.training.codes import evaluate_codes, pixels
from fastret.training.evaluation import embed
from fastret.training.model import EmbeddingNet
from fastret.training.sources import RetrievalData, open_data
from fastret.training.spq import BITS, SPQ, WORDS
from fastret.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_memory_process")
Build = Callable[..., TrainOptions]


def _silent(line: str) -> None:
    pass


def _glyphs(classes: int, *, gallery: bool = False) -> RetrievalData:
    """Of the shipped set: its first classes to train on, others held out; or one image of a class among the others."""
    whole = load_glyphs().train()
    train_set = ImageSet(whole.images, whole.labels, whole.class_names, classes).train()
    rest = ImageSet(whole.images, whole.labels, whole.class_names, len(whole.class_names) - classes).held_out()
    if not gallery:
        return RetrievalData(train_set, rest, None, GLYPHS)
    query = torch.arange(len(rest.labels)) % 4 == 3
    parts = (ImageSet(rest.images[rows], rest.labels[rows], rest.class_names, 0) for rows in (query, ~query))
    return RetrievalData(train_set, *parts, GLYPHS)


def _average_precision(scores: list[float], relevant: list[bool], n: int) -> float:
    order = sorted(range(len(scores)), key=lambda row: (scores[row], row))[:n]
    hits, total = 0, 0.0
    for rank, row in enumerate(order, 1):
        if relevant[row]:
            hits += 1
            total += hits / rank
    return total / hits if hits else 0.0


def _by_loop(queries: Tensor, gallery: Tensor, codebook: Tensor, data: RetrievalData, power: float, n: int) -> float:
    """mAP@n by codes, a query and a book at a time, in float64."""
    books, _, width = codebook.shape
    queries, gallery, codebook = queries.double(), gallery.double(), codebook.double()
    parts = gallery.view(-1, books, width)
    code = torch.stack([torch.cdist(parts[:, m], codebook[m]).argmin(1) for m in range(books)], 1)
    rows = data.queries if data.gallery is None else data.gallery
    values = []
    for i, query in enumerate(queries.view(-1, books, width)):
        distances = torch.stack([(query[m] - codebook[m][code[:, m]]).norm(dim=1) ** power for m in range(books)])
        kept = [j for j in range(len(rows.labels)) if data.gallery is not None or j != i]
        scores = distances.sum(0)[kept].tolist()
        values.append(_average_precision(scores, (rows.labels[kept] == data.queries.labels[i]).tolist(), n))
    return sum(values) / len(values)


def test_loss_is_the_contrast_of_views_and_their_quantisations() -> None:
    loss = SPQ(32, 16, 0.3)
    views = torch.randn(20, 16, requires_grad=True)
    first, second = views.chunk(2)
    z = loss.quantizer
    expected = fastret.CQCLoss(tau_cqc=0.3)(first, second, z(first), z(second))
    found = loss(views, torch.zeros(20))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert views.grad is not None
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_bytes_of_books(bits: int) -> None:
    quantizer = SPQ(bits, 128, 0.3).quantizer
    assert quantizer.codebook.shape == (bits // 8, WORDS, 128 * 8 // bits)


def test_words_start_where_the_untrained_networks_embeddings_lie() -> None:
    """And the network knows how bright images are: in evaluation embeddings are as long as in training."""
    data = _glyphs(80)
    torch.manual_seed(0)
    model, loss = EmbeddingNet(1, 16), SPQ(16, 16, 0.3)
    loss.initialise(model, data.train.images.split(100))
    embeddings = embed(model, data.train.images, "cpu")
    assert model.training
    length = model(data.train.images).detach().norm(dim=1).mean()
    assert embeddings.norm(dim=1).mean() == pytest.approx(float(length), rel=0.1)
    parts = embeddings.view(len(embeddings), 2, 8)
    error = sum(
        torch.cdist(parts[:, m], loss.quantizer.codebook[m].detach()).min(1).values.square().sum() for m in range(2)
    )
    assert error < 0.2 * embeddings.square().sum()


@pytest.mark.parametrize("gallery", [False, True])
def test_codes_are_judged_as_a_loop_judges_them(gallery: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "N", 40)
    data = _glyphs(430, gallery=gallery)
    torch.manual_seed(0)
    model, loss = EmbeddingNet(1, 16), SPQ(16, 16, 0.3)
    loss.initialise(model, data.train.images.split(400))
    with torch.no_grad():
        loss.quantizer.codebook.add_(0.1 * torch.randn_like(loss.quantizer.codebook))
    found = evaluate_codes(model, loss, data, "cpu")
    queries = embed(model, data.queries.images, "cpu")
    rows = queries if data.gallery is None else embed(model, data.gallery.images, "cpu")
    codebook = loss.quantizer.codebook.detach()
    assert found.spq == pytest.approx(_by_loop(queries, rows, codebook, data, 1, 40), abs=2e-3)
    assert found.spq_squared == pytest.approx(_by_loop(queries, rows, codebook, data, 2, 40), abs=2e-3)
    plain = fastret.retrieval.product_kmeans(rows, 2, WORDS)
    assert found.plain == pytest.approx(_by_loop(queries, rows, plain, data, 1, 40), abs=2e-3)
    # A book whose words are the rows themselves quantises nothing.
    exact = _by_loop(queries, rows, rows[None], data, 2, 40)
    assert found.embeddings == pytest.approx(exact, abs=2e-3)
    assert list(found.named()) == [
        *("SPQ, sum of distances", "SPQ, squared distances"),
        *("plain PQ, sum of distances", "plain PQ, squared distances", "embeddings, no codes"),
    ]


def test_pixels_need_no_network() -> None:
    data = _glyphs(430)
    found = pixels(data, 64)
    assert list(found) == ["pixels, plain PQ"]
    assert pixels(data, 16)["pixels, plain PQ"] < found["pixels, plain PQ"]
    rows = torch.nn.functional.normalize(data.queries.images.flatten(1).float())
    nearest = fastret.retrieval.topk(rows, rows, 1001)[1]
    exact = fastret.retrieval.mean_average_precision_at_n(nearest, data.queries.labels)
    assert exact - 0.2 < found["pixels, plain PQ"] < exact + 0.05


@pytest.fixture
def spq_options(options: Build) -> Build:
    """Options of a short run on the shipped set."""

    def build(**changed: Any) -> TrainOptions:
        return options(**{"loss": "spq", "data": "glyphs", "batch_classes": 256, "filters": 8, **changed})

    return build


def test_learns_codes_without_labels(spq_options: Build) -> None:
    lines: list[str] = []
    chosen = spq_options(iterations=40)
    report = train(chosen, say=lines.append)
    assert sum(report.history[-5:]) < sum(report.history[:5]) - 5
    before, after = report.before.named(), report.after.named()
    assert after["SPQ, sum of distances"] > before["SPQ, sum of distances"] + 0.05
    assert report.batch_classes == 256
    metrics = json.loads((chosen.folder() / "metrics.json").read_text())
    assert metrics["options"]["bits"] == 32
    assert metrics["gallery"] is None
    assert metrics["after"]["spq"] == after["SPQ, sum of distances"]
    assert 0 < metrics["yardsticks"]["pixels, plain PQ"] < 1
    assert metrics["seconds"]["initialising"] > 0
    said = "\n".join(lines)
    for part in ("40 batches of 512 images (256 x 2 views)", "pixels, plain PQ", "at 2N = 512, D = 128"):
        assert part in said
    assert (chosen.folder() / "plot.png").is_file()


def test_too_few_images_for_a_book_are_named(options: Build) -> None:
    with pytest.raises(ValueError, match="data: expected at least 256 images to search, one a word of a book, got 160"):
        train(options(loss="spq"), say=_silent)
    data = _glyphs(60)
    with pytest.raises(
        ValueError, match="data: expected at least 256 images to train on, one a word of a book, got 240"
    ):
        SPQ(16, 16, 0.3).initialise(EmbeddingNet(1, 16), [data.train.images])


def test_labels_are_not_looked_at(spq_options: Build) -> None:
    chosen = spq_options()
    data = open_data(chosen.data)
    blind = ImageSet(data.train.images, torch.zeros_like(data.train.labels), data.train.class_names, 500)
    seeing = Trainer(data, chosen)
    unseeing = Trainer(RetrievalData(blind, data.queries, None, data.views), chosen)
    for trainer in (seeing, unseeing):
        trainer.initialise()
    assert [seeing.step() for _ in range(2)] == [unseeing.step() for _ in range(2)]


def _write_fashion(folder: Path, train_images: int, test_images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for part, count in (("train", train_images), ("t10k", test_images)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        for kind, values in (("images-idx3", images), ("labels-idx1", (torch.arange(count) % 10).to(torch.uint8))):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.numpy().tobytes()))


@pytest.mark.parametrize("loss", ["spq", "smooth-ap"])
def test_fashion_is_searched_among_its_training_images(
    loss: str, options: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRET_DATA", str(tmp_path))
    _write_fashion(tmp_path / "fashion-mnist", 300, 20)
    data = open_data("fashion")
    assert data.gallery is data.train
    assert data.views.flip == 0.5
    lines: list[str] = []
    chosen = options(loss=loss, data="fashion", iterations=2, filters=4)
    report = train(chosen, say=lines.append)
    assert (report.held_out.images, report.gallery.images if report.gallery else 0) == (20, 300)
    assert "held out 10 classes, 20 images, searched among 10 classes, 300 images" in lines[0]
    assert "never trained on; searched among 10 classes, 300 images" in report.table()
    assert json.loads((chosen.folder() / "metrics.json").read_text())["gallery"] == {"classes": 10, "images": 300}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 24}, "bits: expected one of 16, 32, 64, got 24"),
        ({"loss": "smooth-ap", "bits": 32}, "bits: expected none, as smooth-ap has no codes, got 32"),
        ({"samples_per_class": 3}, "samples_per_class: expected at most 2, got 3"),
        ({"samples_per_class": 1}, "samples_per_class: expected at least 2, got 1"),
    ],
)
def test_bad_options_are_named(changed: dict[str, Any], message: str, spq_options: Build) -> None:
    with pytest.raises(ValueError, match=message):
        spq_options(**changed)
