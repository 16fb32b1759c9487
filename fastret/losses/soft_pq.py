"""Soft product quantization, as SPQ trains it: every part of a row becomes a softmax over the words of its book.

Jang, Cho: Self-supervised Product Quantization for Deep Unsupervised Image Retrieval. ICCV 2021, arXiv 2109.02244. For
rows x of M parts x_m of length L, and K words c_mk a book,

    z_m = sum over k of p_mk c_mk,      p_m = softmax over k of -tau_q |x_m - c_mk|^2

tau_q multiplies, as in the official code; the paper divides by it, 0.2 for 5.0. Rows are taken as given, z is not
normalised: ``CQCLoss`` compares x and z by their cosine. Retrieval takes the nearest word of each part, the code.
"""

from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from fastret.losses.product_quantizer import ProductQuantizer
from fastret.ops import checks
from fastret.ops.soft_assign import HARD, nearest_words, soft_assign
from fastret.retrieval.kmeans import product_kmeans


@overload
def soft_pq(
    x: Tensor,
    codebook: Tensor,
    tau_q: float | Tensor = ...,
    *,
    num_books: int | None = ...,
    hard: str | None = ...,
    return_codes: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def soft_pq(
    x: Tensor,
    codebook: Tensor,
    tau_q: float | Tensor = ...,
    *,
    num_books: int | None = ...,
    hard: str | None = ...,
    return_codes: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def soft_pq(
    x: Tensor,
    codebook: Tensor,
    tau_q: float | Tensor = 5.0,
    *,
    num_books: int | None = None,
    hard: str | None = None,
    return_codes: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Soft quantisation z (N, M L) of rows, in their dtype; formula at the top of this file.

    The official call ``Soft_Quantization(X, C, N_books, tau_q)`` is ``soft_pq(X, C, tau_q, num_books=N_books)``.

    Cost: two products of N K M L forward, five backward. Kept for backward: O(N M), where the official code keeps
    differences of N x K x M L.

    Args:
        x: (N, M L), as given.
        codebook: (M, K, L), K from 1 to 65,536; or (K, M L) with num_books, as the official code has it.
        tau_q: > 0, multiplies squared distances; a 0-dim tensor receives a gradient.
        num_books: M, needed with (K, M L).
        hard: None: soft; "detached": the nearest words, whose gradient goes to them alone; "straight-through": the
            nearest words, and to x, tau_q and the codebook also soft's gradient.
        return_codes: whether (z, codes) is returned, codes (N, M) int64, ties to the lower word.
        impl: "reference", "tiled", "cpu" or "triton" (words of a width of at most 128); None: the fastest that serves
            the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
        NotImplementedError: words are too wide for the implementation that is asked for.
    """
    checks.check_positive(tau_q, "tau_q")
    codebook = split_books(codebook, num_books)
    result = soft_assign(x, codebook, tau_q, soft=hard is None, hard=hard, impl=impl)
    z = result.soft if hard is None else result.hard
    assert z is not None
    return (z, result.codes) if return_codes else z


def split_books(codebook: Tensor, num_books: int | None) -> Tensor:
    """(M, K, L), checked, of a codebook (M, K, L) or (K, M L)."""
    if num_books is not None:
        checks.check_integer(num_books, "num_books", 1)
    if isinstance(codebook, Tensor) and codebook.dim() == 2:
        if num_books is None:
            raise ValueError(f"num_books: expected with a codebook (words, books x width) {tuple(codebook.shape)}")
        if codebook.shape[1] % num_books:
            raise ValueError(
                f"codebook: expected a number of columns that num_books = {num_books} divides, got {codebook.shape[1]}"
            )
        codebook = codebook.unflatten(1, (num_books, codebook.shape[1] // num_books)).transpose(0, 1)
    checks.check_codebook(codebook)
    if num_books not in (None, codebook.shape[0]):
        raise ValueError(f"num_books: expected {codebook.shape[0]} like the codebook, got {num_books}")
    return codebook


class SoftPQ(ProductQuantizer):
    """Soft product quantizer: ``SoftPQ(num_books, num_words, word_dim, tau_q)(x)`` is the soft quantisation z.

    z_m = sum over k of p_mk c_mk,      p_m = softmax over k of -tau_q |x_m - c_mk|^2

    Train it with the network, for example ``CQCLoss()(xa, xb, quantizer(xa), quantizer(xb))``; then ``encode`` the
    gallery. A trained codebook of the official code comes in with
    ``SoftPQ.from_codebook(state["1.C"], num_books=8)``, "1.C" being its name in the official checkpoints; ``init_from``
    starts at k-means instead, of embeddings.

    Cost and memory: as ``fastret.functional.soft_pq``.

    Args:
        num_books: M >= 1. num_words: K from 1 to 65,536. word_dim: L; rows have M L columns.
        tau_q: > 0, multiplies squared distances.
        learn_tau: tau_q becomes a parameter, by its logarithm ``log_tau``, so that it stays positive.
        hard, impl: as in ``fastret.functional.soft_pq``, and so are the errors raised.

    Attributes:
        codebook: (M, K, L) parameter, Xavier uniform of a (K, M L) matrix, as the official code.
    """

    citation: ClassVar[str] = (
        "@inproceedings{jang2021self, "
        "title={Self-supervised Product Quantization for Deep Unsupervised Image Retrieval}, "
        "author={Jang, Young Kyun and Cho, Nam Ik}, "
        "booktitle={International Conference on Computer Vision}, year={2021}}"
    )

    def __init__(
        self,
        num_books: int = 8,
        num_words: int = 16,
        word_dim: int = 16,
        tau_q: float = 5.0,
        *,
        learn_tau: bool = False,
        hard: str | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(num_books, num_words, word_dim, impl)
        checks.check_positive(tau_q, "tau_q")
        if hard is not None and hard not in HARD:
            raise ValueError(f"hard: expected None or one of {', '.join(HARD)}, got {hard!r}")
        self._tau = float(tau_q)
        self.log_tau = nn.Parameter(torch.tensor(self._tau).log()) if learn_tau else None
        self.hard = hard

    @classmethod
    def from_codebook(
        cls, codebook: Tensor, num_books: int | None = None, tau_q: float = 5.0, **options: Any
    ) -> "SoftPQ":
        """A quantizer with a copy of a codebook (M, K, L), or (K, M L) with num_books, of its dtype and device.

        Args:
            options: learn_tau, hard, impl.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected.
        """
        codebook = split_books(codebook, num_books).detach()
        books, words, width = codebook.shape
        made = cls(books, words, width, tau_q, **options).to(codebook)
        with torch.no_grad():
            made.codebook.copy_(codebook)
        return made

    @torch.no_grad()
    def init_from(self, x: Tensor, *, iterations: int = 25, seed: int = 0, progress: bool = True) -> None:
        """Words at the centroids of k-means of each sub-space, as plain product quantization has them.

        Args:
            x: (N, M L) embeddings, N >= K; no more than 256 K rows, drawn at random, are trained on.
            iterations, seed, progress: as in ``fastret.retrieval.product_kmeans``.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is expected.
        """
        checks.check_rows(x, "x")
        books, words, width = self.codebook.shape
        if x.shape[1] != books * width:
            raise ValueError(
                f"x: expected {books * width} columns for {books} books of width {width}, got {x.shape[1]}"
            )
        self.codebook.copy_(product_kmeans(x, books, words, iterations=iterations, seed=seed, progress=progress))

    @property
    def tau_q(self) -> float | Tensor:
        return self._tau if self.log_tau is None else self.log_tau.exp()

    def _codes(self, x: Tensor) -> Tensor:
        return nearest_words(x, self.codebook, impl=self.impl)

    def forward(self, x: Tensor) -> Tensor:
        """z (N, M L) of rows ``x`` (N, M L), in their dtype."""
        return soft_pq(x, self.codebook, self.tau_q, hard=self.hard, impl=self.impl)

    def extra_repr(self) -> str:
        tau = "learned" if self.log_tau is not None else self._tau
        return f"{super().extra_repr()}, tau_q={tau}, hard={self.hard!r}"
