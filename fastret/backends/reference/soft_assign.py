"""soft_assign as it is defined: scores and probabilities of all rows, books and words at once."""

import torch
from torch import Tensor

from fastret.backends.rows import accumulation_dtype


def soft_assign(
    x: Tensor | None,
    codebook: Tensor,
    tau: float | Tensor | None,
    *,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    straight_through: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(soft, hard, codes, usage, purity). Differentiable by autograd, twice."""
    rows = logits if x is None else x
    assert rows is not None
    wide = accumulation_dtype(rows.dtype)
    codebook = codebook.to(wide)
    scores = _scores(x, codebook, tau, keys, bias, logits)
    p = scores.softmax(2)
    codes = scores.argmax(2)  # the first of equals, as documented
    chosen = torch.nn.functional.one_hot(codes, scores.shape[2]).to(wide)
    nothing = 0 * p.detach().sum(2, keepdim=True)  # NaN has no word
    hard = _words(chosen + nothing, codebook)
    if straight_through:  # the value of the word, and the gradient of p as if the word had come from p
        hard = hard + _words(p - p.detach(), codebook.detach())
    return (
        _words(p, codebook).to(rows.dtype),
        hard.to(rows.dtype),
        codes,
        p.sum(0) / max(p.shape[0], 1),
        p.square().sum(2),
    )


def _words(weights: Tensor, codebook: Tensor) -> Tensor:
    """(N, M L): in each book the words weighted by (N, M, K)."""
    return torch.einsum("nmk,mkl->nml", weights, codebook).flatten(1)


def _scores(
    x: Tensor | None,
    codebook: Tensor,
    tau: float | Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
) -> Tensor:
    """(N, M, K)."""
    books, words, _ = codebook.shape
    if logits is not None:
        given: Tensor = logits.to(codebook.dtype).unflatten(1, (books, words))
        return given
    assert x is not None
    parts: Tensor = x.to(codebook.dtype).unflatten(1, (books, -1))
    if keys is None:
        assert tau is not None
        distances: Tensor = (parts[:, :, None] - codebook).square().sum(3)
        return -tau * distances
    scores = torch.einsum("nme,mke->nmk", parts, keys.to(codebook.dtype))
    return scores if bias is None else scores + bias
