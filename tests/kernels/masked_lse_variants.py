"""Variants of the kernels over all pairs that heads describe: masked_lse, pair sums and row extrema."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import triton.language as tl
from variant import Choices, Variant, accumulated, tile

from fastret.kernels.triton import masked_lse, pairs, row_extrema


def head(
    real: str, axis: str, mask: pairs.Mask, target: pairs.Target, extra: str | None = None, reduce: str = "lse"
) -> pairs.Head:
    """One with all upstream gradients; ``extra``: biases and smoothing."""
    constants = tl.constexpr(True), tl.constexpr(axis), tl.constexpr(reduce)
    return pairs.Head(real, extra, extra, mask, target, extra, extra, *constants, real, real, real)


def backwards(
    name: str,
    options: Mapping[str, int],
    heads: tuple[pairs.Head, ...],
    sides: Sequence[str],
    rare: Sequence[str] = (),
    **unwanted: None,
) -> Iterator[Variant]:
    """The gradient kernel on each of the sides: "rows", "columns", "both"; on the rare ones too."""
    for side in (*sides, *rare):
        rows, columns = side != "columns", side != "rows"
        launch = {"ROWS": rows, "COLUMNS": columns, "TRANSPOSED": not rows, "HEADS": len(heads), "SLOTS": len(heads)}
        given = {"heads": heads, **unwanted}
        yield Variant(masked_lse.masked_lse_gradient_kernel, {**options, **launch}, name, given, side in rare)


def masked_lse_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """One head and two, over rows and over columns, on either side and on both at once; and all that two can have."""
    real, labels = accumulated(dtype), ("*i64", "*i64")
    biases = {"row_sums": None, "column_sums": None}
    shifted = pairs.Target(shifts=("i32",))
    clip = tuple(head(real, axis, pairs.Mask(), shifted) for axis in ("row", "column"))
    negatives = head(real, "row", pairs.Mask(different=labels), pairs.Target())
    multi_similarity = head(real, "row", pairs.Mask(same=labels, offset="i32"), pairs.Target()), negatives
    proxy_anchor = tuple(
        head(real, "column", mask, pairs.Target()) for mask in (pairs.Mask(same=labels), pairs.Mask(different=labels))
    )
    multi_label = head(real, "row", pairs.Mask(), pairs.Target(offsets="*i64", entries=("*i64", real)))
    info_nce = head(real, "row", pairs.Mask(), pairs.Target(index="*i64"))
    positives = pairs.Target(mask=pairs.Mask(same=labels, offset="i32"), weight=real)
    sup_con = head(real, "row", pairs.Mask(offset="i32"), positives)
    every = pairs.Mask(labels, labels, labels, "i32", "i32", real, real)
    everything = head(real, "column", every, pairs.Target(mask=every, weight=real), real)
    proxies = info_nce._replace(mask=pairs.Mask(different=labels), norms=real)
    anchors = tuple(head._replace(norms=real) for head in proxy_anchor)
    for options in choices("lse"):
        yield forwards("InfoNCE", options, info_nce)
        yield forwards("InfoNCE, one part", options, info_nce, rare=True, parts=None, arrived=None)
        yield forwards("proxies in place", options, proxies, rare=True)
        yield forwards("SupCon", options, sup_con, rare=True)
        yield forwards("ProxyAnchor", options, proxy_anchor[0], rare=True)
    for options in choices("lse listed"):
        yield forwards("multi-label", options, multi_label, rare=True)
    for options in choices("lse two"):
        yield forwards("CLIP", options, *clip)
        yield forwards("CLIP, one part", options, *clip, rare=True, parts=None, arrived=None)
        yield forwards("MultiSimilarity", options, *multi_similarity, rare=True)
        yield forwards("ProxyAnchor", options, *proxy_anchor, rare=True)
        yield forwards("anchors in place", options, *anchors, rare=True)
    for options in choices("lse gradient"):
        yield from backwards("InfoNCE", options, (info_nce,), (), ("rows", "columns"), **biases)
        yield from backwards("SupCon", options, (sup_con,), ("both",))
        yield from backwards("CLIP", options, clip, ("rows", "columns"), **biases)
        yield from backwards("MultiSimilarity", options, multi_similarity, (), ("both",), **biases)
        yield from backwards("ProxyAnchor", options, proxy_anchor, ("columns",), ("rows",), **biases)
        yield from backwards("multi-label", options, (multi_label,), (), ("rows", "columns"), **biases)
        yield from backwards("proxies in place", options, (proxies,), ("columns",), ("rows",), **biases)
        yield from backwards("anchors in place", options, anchors, (), ("rows", "columns"), **biases)
    for options in choices("lse heavy"):
        yield forwards("everything", options, everything, transposed=True)
        yield from backwards("everything", options, (everything, everything), ("columns",), row_sums=None)
    stored = {"u": real, "v": None}
    for options in choices("strip"):
        for transposed in (True, False):
            launch, rare = {**options, "BLOCK_K": 0}, not transposed
            yield forwards("stored, everything", launch, everything, transposed=transposed, rare=rare, **stored)
        launch, given = {**options, "BLOCK_K": 0}, {**stored, "unit": None}
        yield stored_weights("stored, everything", launch, (everything, everything), given)
        yield stored_weights("stored, CLIP", launch, clip, {**given, **biases}, rare=True)
    unit = {} if dtype == "fp16" else {"unit": None}
    for options in choices("lse weights"):
        alone = {**unit, **NO_SUMS}
        yield stored_weights("InfoNCE", options, (info_nce,), alone)
        yield stored_weights("SupCon", options, (sup_con,), alone, rare=True)
        yield stored_weights("MultiSimilarity", options, multi_similarity, alone, rare=True)
        yield stored_weights("ProxyAnchor", options, proxy_anchor, alone, rare=True)
        yield stored_weights("proxies in place", options, (proxies,), alone, rare=dtype == "fp32")
        yield stored_weights("anchors in place", options, anchors, alone, rare=True)
    for options in choices("lse weights sums"):
        yield stored_weights("CLIP", options, clip, {**unit, **biases})
        yield stored_weights("SupCon", options, (sup_con,), {**unit, **biases}, rare=True)
    for options in choices("lse weights heavy"):
        for transposed in (True, False):
            yield forwards("everything", options, everything, transposed=transposed, rare=True)
        yield stored_weights("everything", options, (everything, everything), {**unit, "row_sums": None})
        yield stored_weights("multi-label", options, (multi_label,), {**unit, **biases}, rare=True)


NO_SUMS = {"row_sums": None, "column_sums": None, "score_sums": None}


def stored_weights(
    name: str,
    options: Mapping[str, int],
    heads: tuple[pairs.Head, ...],
    given: Mapping[str, Any],
    rare: bool = False,
) -> Variant:
    """The kernel that makes weights of rows."""
    launch = {"PIECES": 1, **options, "HEADS": len(heads)}
    return Variant(masked_lse.masked_lse_weights_kernel, launch, name, {"heads": heads, **given}, rare)


def forwards(
    name: str,
    options: Mapping[str, int],
    first: pairs.Head,
    second: pairs.Head | None = None,
    *,
    transposed: bool = False,
    rare: bool = False,
    **given: Any,
) -> Variant:
    """The forward kernel, of one head or of two."""
    launch = {"PIECES": 1, **tile(options), "TRANSPOSED": transposed}
    if transposed:
        launch |= {"BLOCK_M": launch["BLOCK_N"], "BLOCK_N": launch["BLOCK_M"], "PIECES": 1}
    where, none = "", {"second_lse": None, "second_t": None}
    if second is not None:
        where, none = "along" if first.axis.value == second.axis.value else "across", {}
    heads = {"head": first, "second": second or first, "SECOND": tl.constexpr(where)}
    return Variant(masked_lse.masked_lse_kernel, launch, name, {**heads, **none, **given}, rare)


def pair_sums_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """The longest phi with a row's statistic, and the distance with all that a head may have in the larger tiles."""
    real, labels = accumulated(dtype), ("*i64", "*i64")
    spreading = head(real, "row", pairs.Mask(distinct=labels), pairs.Target(), reduce="log1m_exp")
    spreading = spreading._replace(row_bias=real)
    centroids = head(real, "row", pairs.Mask(different=labels), pairs.Target(index="*i64"), reduce="distance")
    centroids = centroids._replace(row_bias=real, column_bias=real)
    named = {"InvariantSpreading": spreading, "CentroidTriplet": centroids}
    for options in choices("lse"):
        for name, one in named.items():
            yield forwards(name, options, one, rare=one is not spreading)
    for options in choices("lse weights sums"):
        spread = {"column_sums": None, "score_sums": None, "unit": None}
        yield stored_weights("InvariantSpreading", options, (spreading,), spread, rare=True)
        yield stored_weights("CentroidTriplet", options, (centroids,), {"unit": None}, rare=True)
    for options in choices("lse gradient"):
        yield from backwards("InvariantSpreading", options, (spreading,), (), ("rows", "columns"))
        yield from backwards("CentroidTriplet", options, (centroids,), ("columns",), ("rows",))


def row_extrema_variants(choices: Choices, dtype: str) -> Iterator[Variant]:
    """Under every condition at once."""
    labels, real = ("*i64", "*i64"), accumulated(dtype)
    every = pairs.Mask(labels, labels, labels, "i32", "i32", real, real)
    for kind in ("lse heavy", "lse weights heavy"):
        for options in choices(kind):
            launch = {k: v for k, v in {**tile(options), "GREATEST": False}.items() if k != "PIECES"}
            yield Variant(row_extrema.row_extrema_kernel, launch, "", {"mask": every}, kind != "lse heavy")
    for options in choices("strip"):
        given = {"x": real, "y": None, "mask": every}
        launch = {**options, "BLOCK_K": 0, "GREATEST": True}
        yield Variant(row_extrema.row_extrema_kernel, launch, "stored", given, rare=True)
