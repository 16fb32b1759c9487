"""Supervised product quantization, DPQ: a head of soft and hard quantisations, and its losses.

Klein, Wolf: End-to-End Supervised Product Quantization for Image Search and Retrieval. CVPR 2019, arXiv 1711.08589.
Rows x of M parts; logits of the K words of a book by a linear layer a part, with keys w and biases b:

    p_m = softmax over k of <x_m, w_mk> + b_mk          code_m = the first k of the greatest logit
    soft_m = sum over k of p_mk c_mk                    hard_m = c_{m, code_m}, with soft's gradient (straight-through)

The loss of N rows of classes y, with a classifier W and centres O of the classes that soft and hard share:

    L = mean over i of CE(W soft_i, y_i) + CE(W hard_i, y_i)
      + center_weight mean over i of 1/2 (|soft_i - O_{y_i}|^2 + |hard_i - O_{y_i}|^2)         joint central loss
      + diversity_weight sum over m, k of (mean over i of p_imk)^2                             Gini, of the batch
      - sharpness_weight mean over i of sum over m, k of p_imk^2                               Gini, of each row

The first Gini term is least, M / K, where the batch takes all words equally; the second greatest, M, where each row
takes one word of a book.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastret.backends.pairs import Head, Indexed
from fastret.backends.rows import unit_rows
from fastret.losses.product_quantizer import ProductQuantizer
from fastret.losses.proxies import check_proxies
from fastret.losses.reduction import reduce_valid, row_weights
from fastret.ops import checks
from fastret.ops.masked_lse_sum import masked_lse_sum
from fastret.ops.soft_assign import SoftAssign, soft_assign


class DPQOutput(NamedTuple):
    """What ``DPQ`` returns.

    Attributes:
        soft, hard: (N, M L) in the dtype of the rows.
        codes: (N, M) int64.
        diversity: sum over m, k of (mean over i of p_imk)^2. sharpness: mean over i of sum over m, k of p_imk^2.
    """

    soft: Tensor
    hard: Tensor
    codes: Tensor
    diversity: Tensor
    sharpness: Tensor


class DPQ(ProductQuantizer):
    """Head of supervised product quantization: ``DPQ(in_features, num_books, num_words)(x)`` is soft, hard, codes and
    the Gini terms; formulas at the top of this file. Its loss is ``DPQLoss``.

    Cost: N M K (E + L) multiplications forward, three times as many backward. Kept for backward: O(N M); the N x M x K
    probabilities that the usual code returns are never stored.

    Args:
        in_features: M E, the columns of the rows.
        num_books: M, divides in_features. num_words: K from 1 to 65,536.
        word_dim: L; None: E.
        bias: whether logits have biases.
        intra_normalize: each part of soft, and each word, is divided by its L2 norm, as the paper does for retrieval
            across data sets.
        impl: "reference", "tiled", "cpu" or "triton" (E and L at most 128); None: the fastest.

    Attributes:
        keys: (M, K, E) parameter, and bias: (M, K) parameter or None, drawn as ``torch.nn.Linear``'s.
        codebook: (M, K, L) parameter.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    citation: ClassVar[str] = (
        "@inproceedings{klein2019end, "
        "title={End-to-End Supervised Product Quantization for Image Search and Retrieval}, "
        "author={Klein, Benjamin and Wolf, Lior}, "
        "booktitle={IEEE Conference on Computer Vision and Pattern Recognition}, year={2019}}"
    )

    def __init__(
        self,
        in_features: int,
        num_books: int = 8,
        num_words: int = 16,
        word_dim: int | None = None,
        *,
        bias: bool = True,
        intra_normalize: bool = False,
        impl: str | None = None,
    ) -> None:
        checks.check_integer(in_features, "in_features", 1)
        checks.check_integer(num_books, "num_books", 1)
        if in_features % num_books:
            raise ValueError(f"in_features: expected a multiple of num_books = {num_books}, got {in_features}")
        width = in_features // num_books
        super().__init__(num_books, num_words, width if word_dim is None else word_dim, impl)
        bound = 1 / math.sqrt(width)
        self.keys = nn.Parameter(torch.empty(num_books, num_words, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_books, num_words).uniform_(-bound, bound)) if bias else None
        self.intra_normalize = intra_normalize

    def _codes(self, x: Tensor) -> Tensor:
        return self._assign(x, soft=False).codes

    def _assign(self, x: Tensor, **wanted: Any) -> SoftAssign:
        return soft_assign(x, self.codebook, keys=self.keys, bias=self.bias, impl=self.impl, **wanted)

    def _words(self) -> Tensor:
        return self._normalized(self.codebook)

    def _normalized(self, words: Tensor) -> Tensor:
        """Stretches of L numbers over their norms, where that is asked for."""
        if not self.intra_normalize:
            return words
        return unit_rows(words.reshape(-1, self.word_dim)).view_as(words).to(words.dtype)

    def forward(self, x: Tensor) -> DPQOutput:
        """Soft and hard quantisation of rows ``x`` (N, in_features)."""
        found = self._assign(x, hard="straight-through", usage=True, purity=True)
        assert found.soft is not None
        assert found.hard is not None
        assert found.usage is not None
        assert found.purity is not None
        return DPQOutput(
            self._normalized(found.soft),
            self._normalized(found.hard),
            found.codes,
            found.usage.square().sum(),
            reduce_valid(found.purity.sum(1), None, "mean"),
        )

    def extra_repr(self) -> str:
        return f"in_features={self.num_books * self.keys.shape[2]}, {super().extra_repr()}"


def dpq_loss(
    quantized: DPQOutput,
    labels: Tensor,
    weight: Tensor,
    centers: Tensor,
    *,
    bias: Tensor | None = None,
    center_weight: float = 0.1,
    diversity_weight: float = 0.1,
    sharpness_weight: float = 0.1,
    impl: str | None = None,
) -> Tensor:
    """Loss of supervised product quantization, a mean over rows; formula at the top of this file.

    Args:
        quantized: what ``DPQ`` returned for N rows.
        labels: (N,) integers from 0 to C - 1.
        weight: (C, M L), the classifier. centers: (C, M L). bias: (C,) of the classifier, or None.
        center_weight, diversity_weight, sharpness_weight: >= 0. Their defaults are ours, not the paper's.
        impl: "reference", "tiled", "cpu" or "triton"; None: the fastest that serves the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    soft, hard = quantized.soft, quantized.hard
    labels = check_proxies(soft, weight, labels, "weight")
    for t, name, like in ((hard, "hard", soft), (centers, "centers", weight)):
        checks.check_rows(t, name, like=soft)
        if t.shape[0] != like.shape[0]:
            raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(t.shape)}")
    _check_weights(center_weight, diversity_weight, sharpness_weight)
    head = Head(target=Indexed(labels.repeat(2)), column_bias=bias)
    rows = torch.cat([soft, hard])  # one matrix: the classifier has one gradient
    row_weight = row_weights(soft, None, "mean").repeat(2)
    classified = masked_lse_sum(rows, weight, head=head, row_weight=row_weight, normalize=False, impl=impl)
    own = centers[labels]
    distances = ((soft - own).square().sum(1) + (hard - own).square().sum(1)) / 2
    gini = diversity_weight * quantized.diversity - sharpness_weight * quantized.sharpness
    return classified + center_weight * reduce_valid(distances, None, "mean") + gini


def _check_weights(center_weight: float, diversity_weight: float, sharpness_weight: float) -> None:
    for value, name in (
        (center_weight, "center_weight"),
        (diversity_weight, "diversity_weight"),
        (sharpness_weight, "sharpness_weight"),
    ):
        checks.check_number(value, name)
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")


class DPQLoss(nn.Module):
    """Loss of supervised product quantization: ``DPQLoss(num_classes, dim)(DPQ(...)(x), labels)``.

    L = mean over i of CE(W soft_i, y_i) + CE(W hard_i, y_i)
      + center_weight mean over i of 1/2 (|soft_i - O_{y_i}|^2 + |hard_i - O_{y_i}|^2)
      + diversity_weight diversity - sharpness_weight sharpness

    Cost: three products of 2N C D for loss and gradients. Memory: O(N D) and the gradients; no N x C logits.

    Args:
        num_classes: C >= 2. dim: M L, the width of soft and hard.
        bias: whether the classifier has one; the paper's formula has none.
        center_weight, diversity_weight, sharpness_weight, impl: as in ``fastret.functional.dpq_loss``, and so are the
            errors raised.

    Attributes:
        weight: (C, D) parameter, the classifier W. centers: (C, D) parameter, O. Both Xavier uniform.
        bias: (C,) parameter, 0 at first, or None.
    """

    citation: ClassVar[str] = DPQ.citation

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        bias: bool = False,
        center_weight: float = 0.1,
        diversity_weight: float = 0.1,
        sharpness_weight: float = 0.1,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer(num_classes, "num_classes", 2)
        checks.check_integer(dim, "dim", 1)
        _check_weights(center_weight, diversity_weight, sharpness_weight)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_classes, dim)))
        self.centers = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_classes, dim)))
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None
        self.center_weight = center_weight
        self.diversity_weight = diversity_weight
        self.sharpness_weight = sharpness_weight
        self.impl = impl

    def forward(self, quantized: DPQOutput, labels: Tensor) -> Tensor:
        """Loss of what ``DPQ`` returned for N rows of the classes ``labels`` (N,)."""
        return dpq_loss(
            quantized,
            labels,
            self.weight,
            self.centers,
            bias=self.bias,
            center_weight=self.center_weight,
            diversity_weight=self.diversity_weight,
            sharpness_weight=self.sharpness_weight,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"{', '.join(map(str, self.weight.shape))}, center_weight={self.center_weight}, "
            f"diversity_weight={self.diversity_weight}, sharpness_weight={self.sharpness_weight}"
        )
