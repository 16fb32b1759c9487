"""soft_assign by Triton against its definition in float64: compiled where there is a GPU, else interpreted in tiles of
16 rows and 16 words, of which the shapes below have several and a rest."""

import math
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.triton import soft_assign as backend
from fastret.kernels.triton import config
from fastret.kernels.triton import soft_assign as kernels
from fastret.ops import soft_assign

F64 = torch.float64
COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
ROWS, BOOKS, WORDS = (333, 3, 300) if COMPILED else (19, 2, 21)
SEVERAL = WORDS + 16  # at least three tiles of words, which some tests need
EVERYTHING: dict[str, Any] = {"hard": "straight-through", "usage": True, "purity": True}
SOURCES = ("distances", "keys", "logits")

# numpy, which interprets, remarks on infinity less infinity, which are meant to be NaN
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract|divide):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(DEVICE)


def case(source: str, width: int, dtype: torch.dtype, n: int = ROWS, words: int = WORDS) -> dict[str, Any]:
    """Tensors of the dtype, which ask for gradients; keys are wider than words."""
    tensors = {"x": rows(n, BOOKS * width, seed=1), "codebook": rows(BOOKS, words, width, seed=2)}
    if source == "keys":
        tensors["x"] = rows(n, BOOKS * (width + 3), seed=1) / 2
        tensors |= {"keys": rows(BOOKS, words, width + 3, seed=3), "bias": rows(BOOKS, words, seed=4)}
    if source == "logits":
        tensors["logits"] = 2 * rows(n, BOOKS * words, seed=5)
        del tensors["x"]
    arguments: dict[str, Any] = {"x": None} | {k: t.to(dtype).requires_grad_() for k, t in tensors.items()}
    return arguments | ({"tau": 0.7} if source == "distances" else {})


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [t for t in arguments.values() if isinstance(t, Tensor)]


def outputs(arguments: dict[str, Any], impl: str, **wanted: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in soft_assign(**arguments, **wanted, impl=impl)[1:] if t is not None)


def gradients(arguments: dict[str, Any], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    total = sum((t.double() * rows(*t.shape, seed=9 + k)).sum() for k, t in enumerate(results))
    return torch.autograd.grad(total, leaves(arguments))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("width", "words"), [(5, WORDS), (16, 16), (33, 1)])
def test_equals_reference(source: str, width: int, words: int) -> None:
    """Widths that are padded and not, one tile of words and several, one word."""
    arguments = case(source, width, F64, words=words)
    mine, expected = (outputs(arguments, impl, **EVERYTHING) for impl in ("triton", "reference"))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(arguments, mine), gradients(arguments, expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.7, 5.0])
@pytest.mark.parametrize("shift", [0.0, 4.0, 20.0])
def test_distances_are_as_good_as_the_naive_path(dtype: torch.dtype, tau: float, shift: float) -> None:
    """At a large tau, and where words lie closer to each other than to the origin."""
    given = {k: (t.detach() + shift).to(dtype) for k, t in case("distances", 8, F64).items() if isinstance(t, Tensor)}
    truth, naive, mine = ({k: t.to(d).requires_grad_() for k, t in given.items()} for d in (F64, dtype, dtype))
    parts, codebook = naive["x"].unflatten(1, (BOOKS, -1)), naive["codebook"]
    p = (-tau * (parts[:, :, None] - codebook).square().sum(3)).softmax(2)
    dense = torch.einsum("nmk,mkl->nml", p, codebook).flatten(1)
    exact, values = (outputs(a, impl, tau=tau)[0] for a, impl in ((truth, "reference"), (mine, "triton")))
    assert values.dtype == dtype
    table = [
        (exact, dense, values),
        *zip(*(gradients(a, (v,)) for a, v in ((truth, exact), (naive, dense), (mine, values))), strict=True),
    ]
    for best, theirs, ours in table:
        assert (ours - best).norm() <= 2 * (theirs - best).norm() + 4 * torch.finfo(dtype).eps * best.norm()


@pytest.mark.parametrize("source", ["keys", "logits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_keep_their_digits(dtype: torch.dtype, source: str) -> None:
    """Of a codebook in float32, codes, statistics and gradients are those of exact scores; with all options at once."""
    given = case(source, 16, F64)
    mine = {
        k: t if t is None else t.detach().to(dtype if k in ("x", "logits") else torch.float32) for k, t in given.items()
    }
    mine, exact = (
        {k: t if t is None else t.to(d or t.dtype).detach().requires_grad_() for k, t in mine.items()}
        for d in (None, F64)
    )
    results, expected = (soft_assign(**a, **EVERYTHING, impl=i) for a, i in ((mine, "triton"), (exact, "reference")))
    assert torch.equal(results.codes, expected.codes)
    ulp = torch.finfo(dtype).eps
    for name in ("usage", "purity"):
        torch.testing.assert_close(getattr(results, name).double(), getattr(expected, name), rtol=2e-4, atol=1e-7)
    for name in ("soft", "hard"):
        torch.testing.assert_close(getattr(results, name).double(), getattr(expected, name), rtol=ulp, atol=2 * ulp)
    for ours, best in zip(gradients(mine, results[1:]), gradients(exact, expected[1:]), strict=True):
        assert (ours.double() - best).norm() <= 2 * ulp * best.norm()


@pytest.mark.parametrize("source", SOURCES)
def test_any_tile_gives_the_same_codes_and_ties_go_to_the_first_word(source: str) -> None:
    """Also where equal words stand in tiles far apart."""
    arguments = case(source, 4, torch.float32, words=SEVERAL)
    with torch.no_grad():
        for name in ("codebook", "keys", "bias", "logits"):
            if name in arguments:
                t = arguments[name].view(-1, BOOKS, SEVERAL) if name == "logits" else arguments[name][None]
                t[:, :, SEVERAL - 5 :] = t[:, :, 3:8]
                t[:, :, 20:24] = t[:, :, 3:7]
    codes = soft_assign(**arguments, impl="triton").codes
    assert codes.dtype == torch.int64
    assert torch.equal(codes, soft_assign(**arguments, impl="reference").codes)
    assert torch.equal(codes, soft_assign(**arguments, soft=False, impl="triton").codes)
    assert (codes < SEVERAL - 5).all()
    assert not ((codes >= 20) & (codes < 24)).any()
    assert ((codes >= 3) & (codes < 7)).any()


def test_equal_from_run_to_run_and_parts_are_added() -> None:
    arguments = case("keys", 6, torch.float32)
    assert config.parts(DEVICE, 2 * BOOKS, 2, resident=backend.RESIDENT) == 2, "several programs share the words"
    assert config.parts(DEVICE, 1 << 20, 2, resident=backend.RESIDENT) == 1
    first, second = (
        (*results, *gradients(arguments, results))
        for results in (outputs(arguments, "triton", **EVERYTHING) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", ["x", "codebook", "keys", "bias"])
def test_a_gradient_wanted_alone_is_that_among_all(wanted: str) -> None:
    arguments = case("keys", 6, torch.float32)
    every = dict(
        zip(
            (k for k, t in arguments.items() if t is not None),
            gradients(arguments, outputs(arguments, "triton", **EVERYTHING)),
            strict=True,
        )
    )
    alone = {k: t if t is None else t.detach().requires_grad_(k == wanted) for k, t in arguments.items()}
    total = sum((t * rows(*t.shape, seed=9 + k)).sum() for k, t in enumerate(outputs(alone, "triton", **EVERYTHING)))
    torch.testing.assert_close(torch.autograd.grad(total, alone[wanted])[0], every[wanted], rtol=1e-6, atol=0)


def test_words_that_logits_forbid_and_rows_without_any() -> None:
    logits = rows(ROWS, BOOKS * SEVERAL, seed=5)
    logits[:, 7] = logits[3, :SEVERAL] = -math.inf
    logits[4, :16] = logits[4, SEVERAL : SEVERAL + 33] = -math.inf  # whole tiles before the first word that is allowed
    arguments = {
        "x": None,
        "codebook": rows(BOOKS, SEVERAL, 4, seed=2).requires_grad_(),
        "logits": logits.requires_grad_(),
    }
    results, expected = (soft_assign(**arguments, impl=impl) for impl in ("triton", "reference"))
    assert results.soft[3, :4].isnan().all()
    assert results.soft.isnan().sum() == 4
    torch.testing.assert_close(results.soft, expected.soft, equal_nan=True)
    mine, theirs = (
        torch.autograd.grad(r.soft[4:].square().sum(), leaves(arguments)[1])[0] for r in (results, expected)
    )
    torch.testing.assert_close(mine[4:], theirs[4:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "keys", "bias", "codebook"])
def test_bad_values_are_never_hidden(bad: float, where: str) -> None:
    """What they reach is not finite: a part of a row, or a book; and nothing else."""
    arguments = case("keys", 4, F64)
    with torch.no_grad():
        arguments[where].view(-1)[0] = bad
    soft = soft_assign(**arguments, impl="triton").soft.unflatten(1, (BOOKS, -1))
    reached = soft[:1, 0] if where == "x" else soft[:, 0]
    if where == "keys" and bad == math.inf:
        reached = soft[arguments["x"][:, 0] > 0, 0]
    if where == "codebook":
        reached = soft[:, 0, :1]
    assert not reached.isfinite().any()
    assert soft.isfinite().sum() >= soft.numel() - soft[:, 0].numel()
    assert soft[:, 1:].isfinite().all()


def test_parts_wider_than_the_kernels_take_go_to_another_implementation() -> None:
    for width, key_width in ((129, 4), (4, 129)):
        arguments = {
            "x": rows(3, key_width, seed=1),
            "codebook": rows(1, 5, width, seed=2),
            "keys": rows(1, 5, key_width, seed=3),
        }
        with pytest.raises(NotImplementedError, match=r"impl='triton' cannot serve this call: .* width of at most 128"):
            soft_assign(**arguments, impl="triton")
        soft_assign(**arguments)
    wide = soft_assign(rows(3, 128, seed=1), rows(1, 5, 128, seed=2), 0.1, impl="triton").soft
    torch.testing.assert_close(wide, soft_assign(rows(3, 128, seed=1), rows(1, 5, 128, seed=2), 0.1, impl="tiled").soft)
    refusal = registry.IMPLEMENTATIONS["triton"].unsupported(Call("soft_assign", DEVICE.type, F64, ("wide parts",)))
    assert refusal is not None
    assert "128" in refusal


def test_kernels_are_compiled_on_a_gpu_and_only_there() -> None:
    for kernel in (
        *(kernels.soft_assign_kernel, kernels.soft_assign_row_gradient_kernel),
        kernels.soft_assign_word_sums_kernel,
    ):
        assert isinstance(kernel, triton.JITFunction) == COMPILED


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {k: t if t is None else t.detach() for k, t in case("keys", 6, torch.float32).items()}
    scores = (given["x"], given["keys"], given["bias"], None, given["codebook"])

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read on the host")

    if COMPILED:
        torch.cuda.set_sync_debug_mode("error")
    else:
        for name in ("item", "tolist", "nonzero", "__int__", "__bool__", "__float__", "__index__"):
            monkeypatch.setattr(Tensor, name, refuse)
    try:
        soft, lse, codes, usage, purity = backend.forward(*scores, soft=True, usage=True, purity=True)
        backend.backward(
            *(soft, soft, usage, purity, lse, codes, *scores),
            straight_through=True,
            need_scores=True,
            need_codebook=True,
        )
    finally:
        if COMPILED:
            torch.cuda.set_sync_debug_mode("default")
