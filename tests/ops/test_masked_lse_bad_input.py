"""Every bad argument of masked_lse is an error that names it."""

from collections.abc import Callable

import pytest
import torch

from fastret.ops import Circulant, Dense, Head, Indexed, Listed, PairMask, Shifted, masked_lse, masked_lse_sum

X, L = torch.randn(6, 4), torch.arange(6)
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no heads": (lambda: masked_lse(X, heads=[]), ValueError, "heads: expected at least one Head"),
    "another axis": (lambda: masked_lse(X, heads=[Head(axis="both")]), ValueError, r"heads\[0\].axis: .*got 'both'"),
    "width of zero": (lambda: masked_lse(X, heads=[Head(width=0)]), ValueError, "width: expected 1 to 4.*got 0"),
    "width beyond": (lambda: masked_lse(X, heads=[Head(), Head(width=5)]), ValueError, r"heads\[1\].width: .*got 5"),
    "width as a float": (
        lambda: masked_lse(X, heads=[Head(width=2.0)]),
        TypeError,
        "width: expected an integer",
    ),
    "no target": (
        lambda: masked_lse(X, heads=[Head(target="x")]),
        TypeError,
        "target: expected None or .*got str",
    ),
    "period of zero": (
        lambda: masked_lse(X, heads=[Head(target=Shifted(0, 0))]),
        ValueError,
        "target.period: expected at least 1, got 0",
    ),
    "no period": (
        lambda: masked_lse(X, heads=[Head(target=Circulant((0,), (1.0,), 0))]),
        ValueError,
        "target.period: expected at least 1, got 0",
    ),
    "offset of a target": (
        lambda: masked_lse(X, heads=[Head(target=Shifted(1.5))]),
        TypeError,
        "target.offset: expected an integer, got float",
    ),
    "offset of a mask": (
        lambda: masked_lse(X, heads=[Head(mask=PairMask(offset=1.5))]),
        TypeError,
        "mask.offset: expected an integer, got float",
    ),
    "smoothing": (lambda: masked_lse(X, heads=[Head(smoothing=1.5)]), ValueError, "smoothing: .*0 to 1, got 1.5"),
    "scale per row": (lambda: masked_lse(X, heads=[Head(torch.ones(6))]), ValueError, r"scale: expected shape \(\)"),
    "integer scale": (lambda: masked_lse(X, heads=[Head(torch.tensor(1))]), TypeError, "scale: expected a floating"),
    "row bias": (
        lambda: masked_lse(X, heads=[Head(row_bias=torch.ones(5))]),
        ValueError,
        r"row_bias: expected.*\(6,\)",
    ),
    "labels": (
        lambda: masked_lse(X, heads=[Head(mask=PairMask(same=(L, L[:5])))]),
        ValueError,
        r"heads\[0\].mask.same\[1\]: expected shape \(6,\), got \(5,\)",
    ),
    "float labels": (
        lambda: masked_lse(X, heads=[Head(mask=PairMask(different=(L.float(), L)))]),
        TypeError,
        r"mask.different\[0\]: expected an integer dtype",
    ),
    "labels as a list": (
        lambda: masked_lse(X, heads=[Head(mask=PairMask(distinct=([1] * 6, L)))]),
        TypeError,
        r"mask.distinct\[0\]: expected a tensor.*got list",
    ),
    "threshold": (
        lambda: masked_lse(X, heads=[Head(mask=PairMask(above=torch.ones(3)))]),
        ValueError,
        r"mask.above: expected shape \(6,\)",
    ),
    "period without offset": (
        lambda: masked_lse(X, heads=[Head(mask=PairMask(period=4))]),
        ValueError,
        "mask.period: expected a positive number beside an offset",
    ),
    "condition twice": (lambda: PairMask(offset=0) & PairMask(offset=1), ValueError, "PairMask: offset stated twice"),
    "dense target": (
        lambda: masked_lse(X, heads=[Head(target=Dense(torch.ones(6, 5)))]),
        ValueError,
        r"target.weights: expected shape \(6, 6\), got \(6, 5\)",
    ),
    "index beyond": (
        lambda: masked_lse(X, heads=[Head(target=Indexed(L + 1))], impl="tiled"),
        ValueError,
        r"heads\[0\].target.index: expected numbers from 0 to 5, got 6",
    ),
    "index below": (
        lambda: masked_lse(X, heads=[Head(target=Indexed(L - 1))], impl="reference"),
        ValueError,
        "target.index: expected numbers from 0 to 5, got -1",
    ),
    "listed offsets": (
        lambda: masked_lse(X, heads=[Head(target=Listed(L, L, L.float()))]),
        ValueError,
        r"target.offsets: expected shape \(7,\), got \(6,\)",
    ),
    "listed weights": (
        lambda: masked_lse(X, heads=[Head(target=Listed(torch.arange(7), L, torch.ones(5)))]),
        ValueError,
        r"target.weight: expected shape \(6,\), got \(5,\)",
    ),
    "listed index": (
        lambda: masked_lse(X, heads=[Head(target=Listed(torch.arange(7), L + 1, torch.ones(6)))], impl="tiled"),
        ValueError,
        "target.index: expected numbers from 0 to 5, got 6",
    ),
    "listed index as a list": (
        lambda: masked_lse(X, heads=[Head(target=Listed(torch.arange(7), [0] * 6, torch.ones(6)))]),
        TypeError,
        "target.index: expected a tensor.*got list",
    ),
    "falling offsets": (
        lambda: masked_lse(
            X, heads=[Head(target=Listed(torch.tensor([0, 2, 1, 3, 4, 5, 6]), L, torch.ones(6)))], impl="tiled"
        ),
        ValueError,
        r"target.offsets: expected numbers that rise from 0 to 6, got \[0, 2, 1",
    ),
    "circulant": (
        lambda: masked_lse(X, heads=[Head(target=Circulant((0, 1), (1.0,), 6))]),
        ValueError,
        "target: expected a weight for each shift",
    ),
    "first_column": (lambda: masked_lse(X, heads=[Head()], first_column=-1), ValueError, "first_column: .*got -1"),
    "columns": (
        lambda: masked_lse(X, heads=[Head()], first_column=2, columns=7),
        ValueError,
        "columns: expected at least first_column [+] M = 8, got 7",
    ),
    "another width": (lambda: masked_lse(X, torch.ones(3, 5), heads=[Head()]), ValueError, "y: expected 4 columns"),
    "sum over columns": (
        lambda: masked_lse_sum(X, head=Head(axis="column"), row_weight=torch.ones(6)),
        ValueError,
        "head.axis: expected 'row'",
    ),
    "row weight": (
        lambda: masked_lse_sum(X, head=Head(), row_weight=torch.ones(5)),
        ValueError,
        r"row_weight: expected shape \(6,\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
