"""soft_assign: rows assigned to the words of a product codebook, by softmax; attention with a head a book.

A row is M parts, one for each book m of K words c_mk. With scores u_nmk of the words,

    p_nmk = softmax over k of u_nmk                          soft_nm = sum over k of p_nmk c_mk
    code_nm = the first k of the greatest u_nmk              hard_nm = c_{m, code_nm}
    usage_mk = mean over n of p_nmk                          purity_nm = sum over k of p_nmk^2

The scores are one of

    u_nmk = -tau |x_nm - c_mk|^2                             the soft product quantizer of SPQ (Jang, Cho, ICCV 2021)
    u_nmk = <x_nm, w_mk> + b_mk                              that of DPQ (Klein, Wolf, CVPR 2019): keys w and biases b
    u_nmk given

Gradients, with p' the derivative of what follows with respect to p and G that with respect to soft:

    b = p (p' - sum over k of p p')        p'_nmk = <G_nm, c_mk> + usage'_mk / N + 2 purity'_nm p_nmk
    du = b                                 dc_mk = sum over n of p_nmk G_nm

A distance is a score with keys: with r the mean word of the book, u = 2 tau <x - r, c - r> - tau |c - r|^2 up to a
constant of the row, which loses fewer digits than <x, c> and |c|^2 where words lie far from the origin (rows of half
precision stay as they are, and the product with r is in the bias). So kernels know keys only, and the gradients of tau
and of the codebook as keys are PyTorch's, of tensors of the size of the codebook. Products lose digits that differences
keep where |x - r| and |c - r| are large beside |x - c|: in float32 gradients were measured 1.1 to 2.7 times as far off.

``hard``: "detached": its gradient goes to the words that were taken; "straight-through": also to the scores, as if it
were soft's (Bengio et al., 2013).

Cost: 2 products of N M K L forward, 5 backward, and N M K exponentials each. Kept for backward: the arguments, and a
log-sum-exp and a code a part. Nothing of size N M K is stored (unless scores are given, and then their gradient).

The interface of an implementation, ``fastret.backends.*.soft_assign``:

    forward(x, keys, bias, logits, codebook, *, soft, usage, purity) -> (soft, lse, codes, usage, purity)
    backward(grad_soft, grad_hard, grad_usage, grad_purity, lse, codes, x, keys, bias, logits, codebook, *,
             straight_through, need_scores, need_codebook) -> (dx, dkeys, dbias, dlogits, dcodebook)

with x (N, M E), keys (M, K, E) and bias (M, K) or None; or logits (N, M K) and none of these; codebook (M, K, L). keys,
bias, codebook, lse (N, M), usage (M, K), purity (N, M) and all gradients of these in the accumulation dtype; x, logits,
soft (N, M L) and their gradients in the dtype of the rows; codes (N, M) int64. None stands for what is not asked for: a
gradient that is nought, a result that is not wanted; lse is None where neither soft, usage nor purity is, and in
backward where grad_hard alone is given without straight_through. Where a score is NaN its part is NaN, its code any.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.reference import soft_assign as reference
from fastret.backends.rows import accumulation_dtype, poison
from fastret.ops import checks
from fastret.ops.library import apply, define, refuse

HARD = ("detached", "straight-through")
WIDE = 128  # features of a key or a word; not every implementation takes more


class SoftAssign(NamedTuple):
    """What ``soft_assign`` returns; None where not asked for.

    Attributes:
        codes: (N, M) int64, the word of each part.
        soft: (N, M L) in the dtype of the rows.
        hard: likewise.
        usage: (M, K) float32, or float64 for float64 rows; each book sums to 1.
        purity: (N, M), between 1 / K and 1, where one word has all.
    """

    codes: Tensor
    soft: Tensor | None
    hard: Tensor | None
    usage: Tensor | None
    purity: Tensor | None


def soft_assign(
    x: Tensor | None,
    codebook: Tensor,
    tau: float | Tensor | None = None,
    *,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    soft: bool = True,
    hard: str | None = None,
    usage: bool = False,
    purity: bool = False,
    impl: str | None = None,
) -> SoftAssign:
    """Soft and hard assignment to a product codebook; formulas, gradients and cost stand at the top of this file.

    Args:
        x: (N, M L) rows, or (N, M E) with keys; None: logits are given.
        codebook: (M, K, L), K from 1 to 65,536.
        tau: multiplies the squared distances; a number > 0 or a 0-dim tensor, which may ask for its gradient.
        keys: (M, K, E) instead of tau. bias: (M, K), with keys.
        logits: (N, M K) or (N, M, K) instead of x.
        soft: whether soft is wanted.
        hard: None: it is not wanted; "detached"; "straight-through".
        usage, purity: whether these are wanted.
        impl: "reference", "tiled", "cpu" or "triton" (keys and words of a width of at most 128); None:
            ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
        NotImplementedError: keys or words are too wide for the implementation that is asked for.
    """
    if hard is not None and hard not in HARD:
        raise ValueError(f"hard: expected None or one of {', '.join(HARD)}, got {hard!r}")
    checks.check_codebook(codebook)
    x, logits = _checked_rows(x, codebook, tau, keys, bias, logits)
    rows = _rows(x, logits)
    wide_parts = max(codebook.shape[2], 0 if keys is None else keys.shape[2]) > WIDE
    options = ("wide parts",) if wide_parts else ()
    chosen = registry.resolve("soft_assign", rows.device, rows.dtype, impl, options)
    wide = accumulation_dtype(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        if chosen == "reference":
            values, words, codes, used, squares = reference.soft_assign(
                x, codebook, tau, keys=keys, bias=bias, logits=logits, straight_through=hard == "straight-through"
            )
        else:
            codebook = codebook.to(wide)
            keys, bias = (None if t is None else t.to(wide) for t in (keys, bias))
            if x is not None and tau is not None:
                x, keys, bias = _keys(x, codebook, tau)
            codes, values, words, used, squares, _ = apply(
                _SoftAssign, x, keys, bias, logits, codebook, soft, hard or "", usage, purity, chosen
            )
    return SoftAssign(
        codes,
        values if soft else None,
        words if hard else None,
        used if usage else None,
        squares if purity else None,
    )


def nearest_words(x: Tensor, codebook: Tensor, *, impl: str | None = None) -> Tensor:
    """(N, M) int64: for each part of rows (N, M L) its nearest word, the first of equals; of a part with NaN: any.

    Rows and words are compared about the mean word of the book, and in the wider of their dtypes, to which they are
    copied: it is exact where they lie far from the origin as well, but for words as near as rounding.
    """
    checks.check_codebook(codebook)
    checks.check_rows(x, "x")
    wide = torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(codebook.dtype))
    # any tau has these codes, and a power of two no rounding
    return soft_assign(x.to(wide), codebook.to(wide), 1.0, soft=False, impl=impl).codes


def _rows(x: Tensor | None, logits: Tensor | None) -> Tensor:
    rows = x if logits is None else logits
    assert rows is not None
    return rows


def _checked_rows(
    x: Tensor | None,
    codebook: Tensor,
    tau: float | Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """x, or logits as (N, M K)."""
    books, words, width = codebook.shape
    if sum(t is not None for t in (tau, keys, logits)) != 1:
        raise ValueError("tau, keys, logits: expected exactly one of them")
    if bias is not None and keys is None:
        raise ValueError("bias: expected keys with it, got none")
    if (x is None) != (logits is not None):
        raise ValueError("x, logits: expected exactly one of them")
    if tau is not None:
        checks.check_positive(tau, "tau")
    if logits is not None:
        if isinstance(logits, Tensor) and logits.dim() == 3:
            if logits.shape[1:] != (books, words):
                raise ValueError(f"logits: expected shape (N, {books}, {words}), got {tuple(logits.shape)}")
            logits = logits.flatten(1)
        _check_parts(logits, "logits", books * words, f"{books} books of {words} words", codebook)
        return None, logits
    assert x is not None
    if keys is not None:
        _check_like(keys, "keys", (books, words, None), codebook)
        width = keys.shape[2]
    if bias is not None:
        _check_like(bias, "bias", (books, words), codebook)
    _check_parts(x, "x", books * width, f"{books} books of width {width}", codebook)
    return x, None


def _check_parts(rows: Tensor, name: str, width: int, what: str, codebook: Tensor) -> None:
    checks.check_rows(rows, name)
    if rows.shape[1] != width:
        raise ValueError(f"{name}: expected {width} columns for {what}, got {rows.shape[1]}")
    if rows.device != codebook.device:
        raise ValueError(f"{name}: expected device {codebook.device} like the codebook, got {rows.device}")


def _check_like(t: Tensor, name: str, shape: tuple[int | None, ...], codebook: Tensor) -> None:
    expected = ", ".join("width" if size is None else str(size) for size in shape)
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape ({expected}), got {type(t).__name__}")
    if t.dtype not in checks.FLOATS:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {t.dtype}")
    right = t.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, t.shape, strict=True))
    if not right or 0 in t.shape:
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(t.shape)}")
    if t.device != codebook.device:
        raise ValueError(f"{name}: expected device {codebook.device} like the codebook, got {t.device}")


def _keys(x: Tensor, codebook: Tensor, tau: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, keys and biases whose scores are -tau |x - c|^2 up to a constant of the row; differentiable."""
    if isinstance(tau, Tensor):
        tau = tau.to(codebook)
    middle = codebook.detach().mean(1, keepdim=True)
    away = codebook - middle
    if x.dtype == codebook.dtype:
        return x - middle.flatten(), 2 * tau * away, -tau * away.square().sum(2)
    # rows of half precision would be rounded once more, or widened
    return x, 2 * tau * away, -tau * (away.square() + 2 * middle * away).sum(2)


def _nothing(
    x: Tensor | None, keys: Tensor | None, bias: Tensor | None, logits: Tensor | None, codebook: Tensor
) -> Tensor:
    """(N, M, 1) zeros, NaN where a part's scores are: a word, which is taken by comparison, would hide it."""
    rows = _rows(x, logits).unflatten(1, (codebook.shape[0], -1))
    # a logit of -inf is a word that is not to be taken
    bad = rows.isnan() | (rows == torch.inf) if x is None else ~rows.isfinite()
    words = poison(*(t for t in (keys, bias, codebook) if t is not None))
    return torch.where(bad.any(2, keepdim=True), torch.nan, words.to(codebook.dtype))


def _forward(
    x: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    codebook: Tensor,
    soft: bool,
    usage: bool,
    purity: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = registry.IMPLEMENTATIONS[impl].module("soft_assign")
    values, lse, codes, used, squares = module.forward(
        x, keys, bias, logits, codebook, soft=soft, usage=usage, purity=purity
    )
    values, lse, used, squares = (codebook.new_empty(0) if t is None else t for t in (values, lse, used, squares))
    return values, lse, codes, used, squares


def _forward_fake(
    x: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    codebook: Tensor,
    soft: bool,
    usage: bool,
    purity: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = _rows(x, logits)
    n, (books, words, width) = rows.shape[0], codebook.shape
    nothing = codebook.new_empty(0)
    return (
        rows.new_empty(n, books * width) if soft else nothing,
        codebook.new_empty(n, books) if soft or usage or purity else nothing.clone(),
        codebook.new_empty(n, books, dtype=torch.int64),
        codebook.new_empty(books, words) if usage else nothing.clone(),
        codebook.new_empty(n, books) if purity else nothing.clone(),
    )


def _backward(
    grad_soft: Tensor | None,
    grad_hard: Tensor | None,
    grad_usage: Tensor | None,
    grad_purity: Tensor | None,
    lse: Tensor | None,
    codes: Tensor,
    x: Tensor | None,
    keys: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    codebook: Tensor,
    straight_through: bool,
    need_scores: bool,
    need_codebook: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = registry.IMPLEMENTATIONS[impl].module("soft_assign")
    gradients = module.backward(
        grad_soft,
        grad_hard,
        grad_usage,
        grad_purity,
        lse,
        codes,
        x,
        keys,
        bias,
        logits,
        codebook,
        straight_through=straight_through,
        need_scores=need_scores,
        need_codebook=need_codebook,
    )
    dx, dkeys, dbias, dlogits, dcodebook = (codebook.new_empty(0) if g is None else g for g in gradients)
    return dx, dkeys, dbias, dlogits, dcodebook


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *scores, codebook, _, need_scores, need_codebook, _ = arguments[6:]
    wanted = [t if need_scores else None for t in scores] + [codebook if need_codebook else None]
    dx, dkeys, dbias, dlogits, dcodebook = (
        codebook.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted
    )
    return dx, dkeys, dbias, dlogits, dcodebook


define(
    "soft_assign(Tensor? x, Tensor? keys, Tensor? bias, Tensor? logits, Tensor codebook, bool soft, bool usage, "
    "bool purity, str impl) -> (Tensor soft, Tensor lse, Tensor codes, Tensor usage, Tensor purity)",
    _forward,
    _forward_fake,
)
define(
    "soft_assign_backward(Tensor? grad_soft, Tensor? grad_hard, Tensor? grad_usage, Tensor? grad_purity, Tensor? lse, "
    "Tensor codes, Tensor? x, Tensor? keys, Tensor? bias, Tensor? logits, Tensor codebook, bool straight_through, "
    "bool need_scores, bool need_codebook, str impl) "
    "-> (Tensor dx, Tensor dkeys, Tensor dbias, Tensor dlogits, Tensor dcodebook)",
    _backward,
    _backward_fake,
)

_forward_operator = torch.ops.fastret.soft_assign.default
_backward_operator = torch.ops.fastret.soft_assign_backward.default


class _SoftAssign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor | None,
        keys: Tensor | None,
        bias: Tensor | None,
        logits: Tensor | None,
        codebook: Tensor,
        soft: bool,
        hard: str,
        usage: bool,
        purity: bool,
        impl: str,
    ) -> tuple[Tensor, ...]:
        # a log-sum-exp makes p in backward, which straight-through needs as well
        statistics = soft or hard == "straight-through"
        values, lse, codes, used, squares = _forward_operator(
            x, keys, bias, logits, codebook, statistics, usage, purity, impl
        )
        words = codebook.new_empty(0)
        if hard:
            place = codes + torch.arange(codebook.shape[0], device=codes.device) * codebook.shape[1]
            nothing = _nothing(x, keys, bias, logits, codebook)
            words = (codebook.flatten(0, 1)[place] + nothing).flatten(1).to(_rows(x, logits).dtype)
        return codes, values, words, used, squares, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, keys, bias, logits, codebook, ctx.soft, ctx.hard, ctx.usage, ctx.purity, ctx.impl = inputs
        codes, *_, lse = output
        ctx.mark_non_differentiable(codes, lse)
        ctx.save_for_backward(x, keys, bias, logits, codebook, codes, lse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, g_soft, g_hard, g_usage, g_purity, _ = grads
        x, keys, bias, logits, codebook, codes, lse = ctx.saved_tensors
        smooth = ctx.soft or ctx.usage or ctx.purity or ctx.hard == "straight-through"
        need_scores, need_codebook = smooth and any(ctx.needs_input_grad[:4]), ctx.needs_input_grad[4]
        compute = _backward_operator if torch.compiler.is_compiling() else _SoftAssignBackward.apply
        gradients = compute(
            g_soft if ctx.soft else None,
            g_hard if ctx.hard else None,
            g_usage if ctx.usage else None,
            g_purity if ctx.purity else None,
            lse if smooth else None,
            codes,
            x,
            keys,
            bias,
            logits,
            codebook,
            ctx.hard == "straight-through",
            need_scores,
            need_codebook,
            ctx.impl,
        )
        needed = [need and need_scores for need in ctx.needs_input_grad[:4]] + [need_codebook]
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *[None] * 5


class _SoftAssignBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = refuse("soft_assign", "a second differentiation")
