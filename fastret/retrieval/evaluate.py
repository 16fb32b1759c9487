"""``fastret eval``: retrieval metrics of embeddings in .npy files, which are read where they lie."""

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastret._version import __version__
from fastret.retrieval.metrics import queries_without_match, rank_metrics
from fastret.retrieval.nmi import nmi

METRICS = ("recall", "r-precision", "map-at-r", "map", "nmi")
DEFAULT_METRICS = METRICS[:3]
DEFAULT_KS = (1, 10, 100, 1000)

_TITLES = {"r-precision": "R-precision", "map-at-r": "MAP@R", "map": "mAP", "nmi": "NMI"}


@dataclass(frozen=True)
class Evaluation:
    """What was found, as it is written.

    Attributes:
        metrics: shares in [0, 1], as `fastret.retrieval` defines them; recall@1 and so on.
        queries, gallery, classes: how many; without files of its own the gallery is the queries, each left out of its
            own result.
        queries_without_match: of the queries, those that the metrics of a ranking exclude.
        seconds: without reading the files' headers.
        version: of fastret.
    """

    metrics: dict[str, float]
    queries: int
    gallery: int
    classes: int
    queries_without_match: int
    seconds: float
    version: str = __version__

    def __str__(self) -> str:
        rows = [(_TITLES.get(name, name.replace("recall", "R")), value) for name, value in self.metrics.items()]
        width = max(len(title) for title, _ in rows)
        counts = f"{self.queries:,} queries, {self.gallery:,} in the gallery, {self.classes:,} classes"
        if self.queries_without_match:
            counts += f"; {self.queries_without_match:,} queries without a match are excluded"
        table = (f"{title:<{width}}  {value:7.2%}" for title, value in rows)
        return "\n".join([counts, *table, f"{self.seconds:.1f} s"])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    ks: Sequence[int] | None = None,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> Evaluation:
    """The metrics that are asked for, all but NMI from one ranking.

    NMI is that of the queries, with as many clusters as they have classes.

    Args:
        embeddings, labels, gallery, gallery_labels: as in ``fastret.retrieval.recall_at_k``.
        metrics: of ``METRICS``.
        ks: of recall; None: those of 1, 10, 100 and 1,000 that the gallery has rows for.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    begin = time.perf_counter()
    if ks is None:
        size = len(embeddings) - 1 if gallery is None else len(gallery)
        ks = [k for k in DEFAULT_KS if k <= size] or DEFAULT_KS[:1]
    found = {}
    ranked = [metric for metric in dict.fromkeys(metrics) if metric != "nmi"]
    if ranked:
        found = rank_metrics(embeddings, labels, ranked, ks, gallery, gallery_labels)
    if "nmi" in metrics:
        found["nmi"] = nmi(embeddings, labels)
    rows = labels if gallery_labels is None else torch.cat([labels, gallery_labels])
    return Evaluation(
        metrics=found,
        queries=len(labels),
        gallery=len(labels if gallery_labels is None else gallery_labels),
        classes=len(rows.unique()),
        queries_without_match=queries_without_match(labels, gallery_labels),
        seconds=time.perf_counter() - begin,
    )


def load_rows(path: Path, name: str) -> Tensor:
    """(N, D) float16, float32 or float64 rows of an .npy file, mapped, not read.

    Raises:
        OSError, TypeError, ValueError: naming the argument, what the file holds and what is expected.
    """
    array = _load(path, name)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected float16, float32 or float64 in {path}, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name}: expected shape (rows, width) in {path}, got {array.shape}")
    return _tensor(array, array.dtype.newbyteorder("="))


def load_labels(path: Path, name: str) -> Tensor:
    """(N,) int64 labels of an .npy file of any integers; errors as in ``load_rows``."""
    array = _load(path, name)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers in {path}, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape (rows,) in {path}, got {array.shape}")
    return _tensor(array, np.dtype(np.int64))


def _load(path: Path, name: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:  # names the file, and what is wrong with it
        raise
    except Exception as error:  # a file that is none of NumPy's can fail in any way
        raise ValueError(f"{name}: expected an .npy file in {path}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected an .npy file in {path}, got an archive of several")
    return array


def _tensor(array: np.ndarray, dtype: np.dtype) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nothing writes to it
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
