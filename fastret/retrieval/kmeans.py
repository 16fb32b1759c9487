"""k-means, and k-means of every sub-space, which trains a product quantizer.

    assignment_i = argmin over s of |x_i - c_s|^2,      c_s = mean of the x_i with assignment_i = s      (Lloyd)
    inertia = sum over i of |x_i - c_{assignment_i}|^2

in turn, by ``fastret.ops.topk`` with k = 1 (of equal distances the lower cluster) and ``fastret.ops.segment_mean``, on
the device of x. Under metric "cosine" (spherical k-means) rows and centroids are unit vectors, and |x - c|^2 is
2 - 2 cos. Equal seeds give equal results wherever those two do: on the CPU whatever the number of threads.

A cluster without rows takes over the row that is farthest from its centroid, several the farthest ones, and the means
are taken after that: inertia does not rise. Where no row is away from its centroid, for there are fewer distinct rows
than clusters, a centroid without rows stays where it was. Results carry no gradient.

Distances are of one product, |x|^2 + |c|^2 - 2 <x, c>, with x and c taken from the mean of the rows: there are digits
left where rows are far from 0 beside their distances, and few in float32 where clusters are far apart beside their own
extent.

Product quantization is from Jegou, Douze, Schmid: Product Quantization for Nearest Neighbor Search, PAMI 2011; the
k-means++ start from Arthur, Vassilvitskii, SODA 2007.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastret import ops
from fastret.backends.rows import accumulation_dtype, unit_rows
from fastret.backends.selection import best
from fastret.ops import checks
from fastret.retrieval.search import BUDGET, bar, check_finite, serving

if TYPE_CHECKING:
    from tqdm import tqdm

METRICS = ("l2", "cosine")
INITS = ("random", "k-means++")

_LEAST_ROWS = 1 << 10  # compared with centroids at once


@dataclass(frozen=True)
class KMeans:
    """Clusters of rows.

    Attributes:
        centroids: (k, D) float32, or float64 where x is.
        assignment: (N,) int64, the nearest centroid of every row.
        inertia: sum of the squared distances of all rows from it, added in float64.
        iterations: how many times centroids were moved.
    """

    centroids: Tensor
    assignment: Tensor
    inertia: float
    iterations: int


def kmeans(
    x: Tensor,
    k: int,
    *,
    iterations: int = 25,
    tolerance: float = 1e-4,
    seed: int | torch.Generator = 0,
    init: str | Tensor = "random",
    max_points_per_centroid: int | None = None,
    metric: str = "l2",
    progress: bool = True,
    impl: str | None = None,
) -> KMeans:
    """Clusters of the rows of x; what is done and promised stands at the top of this file.

    Cost: N k D products an iteration. Memory: O(N + k D); under "cosine", and with fewer points than rows, a copy of
    those in use.

    Args:
        x: (N, D) rows, floating point, finite.
        k: clusters, between 1 and N.
        iterations: most moves of the centroids, at least 0.
        tolerance: stop where inertia falls by no more than this share of it; 0: where it falls no more.
        seed: a number, or a CPU generator to draw from.
        init: "random", k distinct rows; "k-means++", k passes over the rows for a better start; or (k, D) centroids.
        max_points_per_centroid: centroids are moved by so many rows a cluster at most, drawn at random (faiss: 256);
            all rows are assigned in the end.
        metric: "l2" or "cosine".
        progress: a bar where it takes more than a few seconds.
        impl: as in ``fastret.ops.topk``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    _check(x, k, iterations, tolerance, max_points_per_centroid, metric)
    x = x.detach()
    start = _checked_init(init, x, k)
    generator = _generator(seed)
    run = _Lloyd(_sampled(x, k, max_points_per_centroid, generator), metric, impl)
    centroids = run.start(k, start, generator)
    with bar(iterations, "k-means", "iteration", progress) as shown:
        centroids, distances, assignment, moves = run.run(centroids, iterations, tolerance, shown)
    if len(run.rows) < len(x):
        distances, assignment = _Lloyd(x, metric, impl).assign(centroids)
    return KMeans(centroids, assignment, float(distances.double().sum()), moves)


def product_kmeans(
    x: Tensor,
    num_books: int,
    num_words: int,
    *,
    iterations: int = 25,
    tolerance: float = 1e-4,
    seed: int | torch.Generator = 0,
    init: str = "random",
    max_points_per_word: int | None = 256,
    progress: bool = True,
    impl: str | None = None,
) -> Tensor:
    """The codebook of a product quantizer: k-means of each of M sub-spaces of L consecutive features.

    Args:
        x: (N, M * L) rows, floating point, finite; N at least ``num_words``.
        num_books: M, divides the number of features.
        num_words: K, words of each book.
        iterations, tolerance, seed, init, impl: as in ``kmeans``.
        max_points_per_word: rows a word that are trained on at most, the same for all books, drawn at random; None:
            all of them.
        progress: a bar of the books where they take more than a few seconds.

    Returns:
        (M, K, L) float32, or float64 where x is.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(x, "x")
    checks.check_integer(num_books, "num_books", 1)
    checks.check_integer(num_words, "num_words", 1)
    checks.check_count(max_points_per_word, "max_points_per_word")
    if x.shape[1] % num_books:
        raise ValueError(f"num_books: expected a divisor of the {x.shape[1]} features, got {num_books}")
    if num_words > len(x):
        raise ValueError(f"num_words: expected at most the {len(x)} rows, got {num_words}")
    if not isinstance(init, str):
        raise TypeError(f"init: expected one of {', '.join(INITS)}, got {type(init).__name__}")
    generator = _generator(seed)
    rows = _sampled(x, num_words, max_points_per_word, generator)
    length = x.shape[1] // num_books
    codebook = []
    with bar(num_books, "codebook", "book", progress) as shown:
        for book in rows.split(length, 1):
            found = kmeans(
                book.contiguous(),
                num_words,
                iterations=iterations,
                tolerance=tolerance,
                seed=generator,
                init=init,
                progress=False,
                impl=impl,
            )
            codebook.append(found.centroids)
            shown.update()
    return torch.stack(codebook)


class _Lloyd:
    """The rows that move centroids."""

    def __init__(self, x: Tensor, metric: str, impl: str | None) -> None:
        self.spherical = metric == "cosine"
        self.rows = unit_rows(x) if self.spherical else x
        self.topk_impl = serving("topk", x) if impl is None else impl
        self.mean_impl = serving("segment_mean", x) if impl is None else impl
        self.middle = self._means(torch.zeros(len(x), dtype=torch.int64, device=x.device), 1)[0]

    def start(self, k: int, init: str | Tensor, generator: torch.Generator) -> Tensor:
        """(k, D) centroids, before any move."""
        if isinstance(init, Tensor):
            centroids = init
        else:
            drawn = (
                self._plus_plus(k, generator)
                if init == "k-means++"
                else torch.randperm(len(self.rows), generator=generator)[:k].to(self.rows.device)
            )
            centroids = self.rows[drawn]
        return self._of_metric(centroids.to(accumulation_dtype(self.rows.dtype)))

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) squared distances of the rows from their nearest centroids, and which those are."""
        distances, nearest = self._nearest(centroids)
        if bool((nearest < 0).any()):
            raise ValueError(f"x: expected rows whose squared distances {distances.dtype} holds, got larger ones")
        return distances, nearest

    def _nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """As ``assign``; of rows whose distances overflow -1."""
        columns = centroids - self.middle
        found = [
            ops.topk(rows - self.middle, columns, k=1, metric="l2", impl=self.topk_impl)
            for rows in self.rows.split(max(_LEAST_ROWS, BUDGET // self.rows.shape[1]))
        ]
        return torch.cat([d for d, _ in found])[:, 0], torch.cat([n for _, n in found])[:, 0]

    def move(self, centroids: Tensor, distances: Tensor, assignment: Tensor) -> Tensor:
        """Centroids where inertia is least for this assignment, but for clusters without rows."""
        k = len(centroids)
        means, counts = self._means(assignment, k)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            far = best(distances[None], min(len(empty), len(distances)))[0]
            far = far[distances[far] > 0]
            if len(far):
                assignment = assignment.clone()
                assignment[far] = empty[: len(far)]
                means, counts = self._means(assignment, k)
        return torch.where((counts > 0)[:, None], self._of_metric(means), centroids)

    def run(
        self, centroids: Tensor, iterations: int, tolerance: float, shown: "tqdm[int]"
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Centroids, distances from them, the assignment to them, and how many times they were moved."""
        distances, assignment = self.assign(centroids)
        inertia = distances.double().sum()
        for move in range(iterations):
            centroids = self.move(centroids, distances, assignment)
            distances, assignment = self.assign(centroids)
            before, inertia = inertia, distances.double().sum()
            shown.update()
            if before - inertia <= tolerance * before:
                return centroids, distances, assignment, move + 1
        return centroids, distances, assignment, iterations

    def _means(self, assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return ops.segment_mean(self.rows, assignment, k, impl=self.mean_impl)

    def _of_metric(self, centroids: Tensor) -> Tensor:
        return unit_rows(centroids) if self.spherical else centroids

    def _plus_plus(self, k: int, generator: torch.Generator) -> Tensor:
        """(k,) rows, each drawn with a probability in proportion to the squared distance from those before."""
        rows = self.rows
        chosen = torch.randint(len(rows), (k,), generator=generator).to(rows.device)  # kept where all distances are 0
        draws = torch.rand(k, generator=generator, dtype=torch.float64).to(rows.device)
        nearest = torch.full((len(rows),), math.inf, dtype=self.middle.dtype, device=rows.device)
        for j in range(1, k):
            nearest = torch.minimum(nearest, self._nearest(rows[chosen[j - 1]][None])[0])
            total = nearest.double().cumsum(0)
            place = torch.searchsorted(total, draws[j] * total[-1], right=True)
            chosen[j] = torch.where(total[-1] > 0, place.clamp_max(len(rows) - 1), chosen[j])
        return chosen


def _generator(seed: int | torch.Generator) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        return seed
    checks.check_integer(seed, "seed")
    return torch.Generator().manual_seed(seed)


def _sampled(x: Tensor, k: int, most: int | None, generator: torch.Generator) -> Tensor:
    """x, or ``most`` of its rows a cluster, in ascending order."""
    if most is None or len(x) <= k * most:
        return x
    return x[torch.randperm(len(x), generator=generator)[: k * most].sort().values.to(x.device)]


def _check(x: Tensor, k: int, iterations: int, tolerance: float, most: int | None, metric: str) -> None:
    checks.check_rows(x, "x")
    checks.check_integer(k, "k", 1)
    if k > len(x):
        raise ValueError(f"k: expected at most the {len(x)} rows, got {k}")
    checks.check_integer(iterations, "iterations", 0)
    checks.check_number(tolerance, "tolerance")
    if tolerance < 0:
        raise ValueError(f"tolerance: expected at least 0, got {tolerance}")
    checks.check_count(most, "max_points_per_centroid")
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    check_finite(x, "x")


def _checked_init(init: str | Tensor, x: Tensor, k: int) -> str | Tensor:
    if isinstance(init, Tensor):
        checks.check_rows(init, "init", like=x)
        if len(init) != k:
            raise ValueError(f"init: expected {k} centroids, got {len(init)}")
        check_finite(init, "init")
        return init.detach()
    if init not in INITS:
        raise ValueError(f"init: expected {', '.join(INITS)} or (k, D) centroids, got {init!r}")
    return init
