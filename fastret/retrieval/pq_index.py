"""An index of product-quantized vectors: M codes a vector, searched by tables; to and from safetensors and FAISS."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastret import ops
from fastret.backends.rows import accumulation_dtype, poison
from fastret.ops import checks
from fastret.ops.pq_topk import check_code_values, check_metric
from fastret.ops.soft_assign import nearest_words
from fastret.retrieval.faiss_pq import from_index_pq, to_index_pq
from fastret.retrieval.search import blocks, rows_at_once

_ROWS = 1 << 14  # encoded at once: what exists of them beside their codes

_FORMAT, _VERSION = "fastret.PQIndex", "1"


class PQIndex:
    """Vectors kept as codes, one word of each of M books, and searched without decoding them.

    ``fastret.ops.pq_topk`` says what the metrics are and how results are ranked: "l2", asymmetric distances as in
    FAISS; "l21", distances per book that are not squared (SPQ's evaluation); "dot".

    Memory: N M bytes of codes (K > 256: two each on the CPU, else four) and the codebook. A search adds its results
    and, a thread, the tables of as many queries as a vector has lanes. Cost of a search: Q N M lookups, of which one
    serves a vector of queries; see ``ops.pq_topk``.

    Args:
        codebook: (M, K, L) words, K from 1 to 65,536, finite; kept as a copy in float32, or float64 where it is that.
        codes: (N, M) integers below K, not copied where they are uint8 (K > 256: uint16, on the CPU); None: the index
            is empty. Their values are checked here, when more are added, and by every search.
        metric: of searches that do not say otherwise: "l2", "l21" or "dot".

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.

    Reference: Jegou, Douze, Schmid: Product Quantization for Nearest Neighbor Search, PAMI 2011.
    """

    def __init__(self, codebook: Tensor, codes: Tensor | None = None, *, metric: str = "l2") -> None:
        checks.check_codebook(codebook)
        check_metric(metric)
        if bool(poison(codebook).isnan()):
            raise ValueError("codebook: expected finite words, got NaN or infinity")
        self._codebook = codebook.detach().to(accumulation_dtype(codebook.dtype), copy=True).contiguous()
        # 16 bits are what the scan in C++ reads; on other devices PyTorch does little with uint16
        wide = torch.uint16 if codebook.device.type == "cpu" else torch.int32
        self._code_dtype = torch.uint8 if self.num_words <= 256 else wide
        self._pieces: list[Tensor] = []
        self.metric = metric
        if codes is not None:
            self.add_codes(codes)

    @property
    def codebook(self) -> Tensor:
        """(M, K, L)"""
        return self._codebook

    @property
    def codes(self) -> Tensor:
        """(N, M), uint8, or int32 where K > 256 (on the CPU a copy)."""
        return self._stored if self._code_dtype == torch.uint8 else self._stored.int()

    @property
    def num_books(self) -> int:
        """M"""
        return self._codebook.shape[0]

    @property
    def num_words(self) -> int:
        """K"""
        return self._codebook.shape[1]

    @property
    def word_dim(self) -> int:
        """L"""
        return self._codebook.shape[2]

    @property
    def dim(self) -> int:
        """M L, the width of what is indexed."""
        return self.num_books * self.word_dim

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def __repr__(self) -> str:
        return (
            f"PQIndex({len(self)} codes; num_books={self.num_books}, num_words={self.num_words}, "
            f"word_dim={self.word_dim}, metric={self.metric!r})"
        )

    def add(self, x: Tensor) -> None:
        """Encodes (n, M L) rows, each part by the nearest word of its book (of equals the lower), and adds them.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected; rows that are not finite.
        """
        self._pieces.append(self._encoded(x, "x"))

    def add_codes(self, codes: Tensor) -> None:
        """Adds (n, M) codes.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected.
        """
        checks.check_codes(codes, self._codebook)
        check_code_values(codes, self._codebook)
        self._pieces.append(codes.to(self._code_dtype).contiguous())

    def reconstruct(self, indices: Tensor) -> Tensor:
        """(..., M L): what the codes of these indices (any shape) stand for.

        Raises:
            TypeError, ValueError: indices that are no integers, or not in the index.
        """
        if not isinstance(indices, Tensor) or indices.dtype not in checks.INTEGERS:
            kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices: expected an integer tensor, got {kind}")
        if indices.device != self._codebook.device:
            raise ValueError(f"indices: expected device {self._codebook.device}, got {indices.device}")
        if indices.numel():
            checks.check_range(indices, len(self), "indices")
        return self._decoded(self._stored[indices.flatten().long()]).view(*indices.shape, self.dim)

    def search(
        self,
        query: Tensor,
        k: int,
        *,
        symmetric: bool = False,
        metric: str | None = None,
        table_dtype: torch.dtype = torch.float32,
        progress: bool = True,
        impl: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best codes of every query, exactly.

        Of equal scores the lower index comes first. Where there are fewer than k codes, or none, the rest has index -1
        and the worst score, as in ``fastret.retrieval.topk``. Results carry no gradient.

        Args:
            query: (Q, M L) rows of any floating dtype.
            k: results a query, at least 1; may be more than there are.
            symmetric: queries are quantized as well: distances between words.
            metric: "l2" or "l21", the least first; "dot", the greatest first; None: the index's.
            table_dtype: as in ``fastret.ops.pq_topk``: with torch.float16, distances are rounded, and the scan on CUDA
                moves half the bytes.
            progress: a bar where it takes more than a few seconds.
            impl: as in ``fastret.ops.pq_topk``.

        Returns:
            (scores, indices), both (Q, k): float32, or float64 where query or codebook is; int64.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected; where symmetric, queries
                that are not finite.
        """
        metric = self.metric if metric is None else metric
        self._check_rows(query, "query")
        codes = self._stored
        found = []
        for block in blocks(len(query), rows_at_once(codes), progress):
            rows = query[block]
            if symmetric:
                words = self._decoded(self._encoded(rows, "query"))
                rows = words.to(torch.promote_types(words.dtype, rows.dtype))
            found.append(
                ops.pq_topk(rows, self._codebook, codes, k=k, metric=metric, table_dtype=table_dtype, impl=impl)
            )
        return found[0] if len(found) == 1 else (torch.cat([s for s, _ in found]), torch.cat([i for _, i in found]))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: whole or not at all, in place of an older one.

        Tensors codebook (M, K, L) and codes (N, M) uint8, or uint16 where K > 256; metadata format, version, metric.

        Raises:
            OSError: it cannot be written; naming the path.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no directory to save in", str(path.parent))
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        metadata = {"format": _FORMAT, "version": _VERSION, "metric": self.metric}
        try:
            codes = self._stored.cpu().to(torch.uint8 if self.num_words <= 256 else torch.uint16)
            save_file({"codebook": self._codebook.cpu(), "codes": codes}, unfinished, metadata=metadata)
            os.replace(unfinished, path)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "PQIndex":
        """The index that ``save`` wrote, on the CPU.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, of another version, or something else; naming the path and what is wrong.
        """
        from safetensors import safe_open

        path = Path(path)
        with path.open("rb"):  # its errors name the path
            pass
        with _naming(path), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError("no index of fastret.retrieval.PQIndex")
            if metadata.get("version") != _VERSION:
                raise ValueError(f"expected version {_VERSION} of the format, got {metadata.get('version')!r}")
            missing = {"codebook", "codes"} - set(file.keys())
            if missing:
                raise ValueError(f"no tensor {' and '.join(sorted(missing))}")
            codes = file.get_tensor("codes").clone()  # the file may be mapped, and change
            return cls(file.get_tensor("codebook"), codes, metric=metadata.get("metric", ""))

    def to_faiss(self) -> Any:
        """A ``faiss.IndexPQ`` with these codes; metric "l2" or "dot", K a power of two, words rounded to float32.

        Raises:
            ImportError: FAISS is not installed.
            ValueError: FAISS has no such index.
        """
        return to_index_pq(self._codebook, self._stored, self.metric)

    @classmethod
    def from_faiss(cls, index: Any) -> "PQIndex":
        """The codes of a trained ``faiss.IndexPQ``, copied.

        Raises:
            ImportError: FAISS is not installed.
            TypeError, ValueError: another index, or one that is not trained, or has another metric.
        """
        codebook, codes, metric = from_index_pq(index)
        return cls(codebook, codes, metric=metric)

    def __getstate__(self) -> dict[str, Any]:
        pieces = [self._exchanged(piece, torch.uint16, torch.int16) for piece in self._pieces]
        return self.__dict__ | {"_pieces": pieces}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._pieces = [self._exchanged(piece, torch.int16, torch.uint16) for piece in self._pieces]

    @staticmethod
    def _exchanged(codes: Tensor, dtype: torch.dtype, other: torch.dtype) -> Tensor:
        """The same bits in the other dtype: PyTorch pickles uint16, but does not unpickle it."""
        return codes.view(other) if codes.dtype == dtype else codes

    @property
    def _stored(self) -> Tensor:
        """The codes, in one piece from now on."""
        if len(self._pieces) != 1:
            none = torch.empty(0, self.num_books, dtype=self._code_dtype, device=self._codebook.device)
            self._pieces = [torch.cat([none, *self._pieces])]
        return self._pieces[0]

    def _check_rows(self, x: Tensor, name: str) -> None:
        checks.check_rows(x, name)
        if x.shape[1] != self.dim:
            raise ValueError(
                f"{name}: expected {self.num_books} x {self.word_dim} = {self.dim} columns for {self.num_books} books "
                f"of {self.word_dim}-dimensional words, got {x.shape[1]}"
            )
        if x.device != self._codebook.device:
            raise ValueError(f"{name}: expected device {self._codebook.device}, got {x.device}")

    def _encoded(self, x: Tensor, name: str) -> Tensor:
        """(n, M) codes of rows."""
        self._check_rows(x, name)
        codes = torch.empty(len(x), self.num_books, dtype=self._code_dtype, device=x.device)
        for begin in range(0, len(x), _ROWS):
            rows = x[begin : begin + _ROWS].detach()
            if not self._comparable(rows):
                raise ValueError(f"{name}: expected finite rows, got NaN, infinity or squares beyond the dtype")
            codes[begin : begin + _ROWS] = nearest_words(rows, self._codebook).to(self._code_dtype)
        return codes

    def _comparable(self, rows: Tensor) -> bool:
        """Whether no score of these rows and the words overflows."""
        wide = torch.promote_types(accumulation_dtype(rows.dtype), self._codebook.dtype)
        reach = sum(float(torch.maximum(-low, high)) for low, high in (rows.aminmax(), self._codebook.aminmax()))
        # from the mean word features of rows are at most reach away, those of words twice that; NaN compares false
        return 8 * self.word_dim * reach * reach < torch.finfo(wide).max

    def _decoded(self, codes: Tensor) -> Tensor:
        """(n, M L) words of codes."""
        books = torch.arange(self.num_books, device=codes.device)
        return self._codebook[books, codes.long()].flatten(1)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a file's content name it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
