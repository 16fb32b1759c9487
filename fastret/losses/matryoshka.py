"""One loss for several prefixes of the features, so that a row cut to any of those widths still retrieves.

Kusupati et al.: Matryoshka Representation Learning. NeurIPS 2022, arXiv 2205.13147, eq. 1. With widths w_1 < ... < w_K
and weights c_k, all 1 in the paper,

    L = sum over k of c_k L(x[:, :w_k], y[:, :w_k])

where normalised rows are prefixes over their own norms. The losses take ``matryoshka`` = (w_1, ..., w_K), the full
width only where it is listed, and ``matryoshka_weights``. All widths are heads of one masked_lse, which in C++ takes
their scores from prefix sums of one product: 4 N M w_K in all, and K exponentials a pair in each direction, where a
call a width takes 3 N M sum(w). The other implementations multiply each width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastret.ops import checks


def check_matryoshka(
    widths: Sequence[int] | None, weights: Sequence[float] | None, features: int | None = None
) -> None:
    """Widths that ascend from 1 to at most ``features``, and a positive weight for each, or None.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    if widths is None:
        if weights is not None:
            raise ValueError(f"matryoshka_weights: expected None without matryoshka, got {weights!r}")
        return
    if not isinstance(widths, Sequence) or not all(_is_integer(w) for w in widths):
        raise TypeError(f"matryoshka: expected a sequence of integers, got {widths!r}")
    if not widths:
        raise ValueError("matryoshka: expected at least one width, got none")
    if widths[0] < 1 or list(widths) != sorted(set(widths)):
        raise ValueError(f"matryoshka: expected widths that strictly increase from at least 1, got {widths!r}")
    if features is not None and widths[-1] > features:
        raise ValueError(f"matryoshka: expected widths up to {features}, that of the rows, got {widths!r}")
    if weights is None:
        return
    if not isinstance(weights, Sequence):
        raise TypeError(f"matryoshka_weights: expected a sequence of numbers, got {weights!r}")
    if len(weights) != len(widths):
        raise ValueError(f"matryoshka_weights: expected one a width, {len(widths)}, got {weights!r}")
    for k, weight in enumerate(weights):
        checks.check_positive(weight, f"matryoshka_weights[{k}]")


def _is_integer(width: object) -> bool:
    return isinstance(width, (int, torch.SymInt)) and not isinstance(width, bool)


def prefixes(
    widths: Sequence[int] | None, weights: Sequence[float] | None, features: int
) -> tuple[list[int | None], list[float]]:
    """Width and weight of each term; one of the full width, None, where no widths are given. Checks as above."""
    check_matryoshka(widths, weights, features)
    if widths is None:
        return [None], [1.0]
    return list(widths), [1.0] * len(widths) if weights is None else list(weights)


def weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum over k of c_k values_k."""
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total
