"""InfoNCE and SupCon over prefixes of the features: against the dense formula and against a call a width."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastret
from fastret import functional as F
from fastret.backends import registry
from fastret.backends.pairs import Head, Indexed, Masked, PairMask
from fastret.backends.registry import Call
from fastret.ops.heads import flatten

F64 = torch.float64
IMPLS = [
    impl
    for impl in ("reference", "tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]
N, D = 13, 11
WIDTHS = (2, 3, 8, D)
LABELS = torch.tensor([3, -1, 3, 8, 3, 100, -1, 8, 8, 7, 3, 5, 5])  # 100 and 7 are alone
INDEX, OTHERS = torch.arange(N) * 3 % 17, torch.arange(17) % 9
# a call with (x, y of as many rows, 17 rows, **options), values of "none"
CALLS: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, z, **o: F.info_nce(x, y, **o),
    "info_nce, index": lambda x, y, z, **o: F.info_nce(x, z, INDEX, **o),
    "info_nce, symmetric": lambda x, y, z, **o: F.info_nce(x, y, symmetric=True, **o),
    "sup_con": lambda x, y, z, **o: F.sup_con(x, LABELS, **o),
    "sup_con, gallery": lambda x, y, z, **o: F.sup_con(x, LABELS, ref_emb=z, ref_labels=OTHERS, **o),
}


def rows(dtype: torch.dtype = F64, features: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(n, features, generator=generator, dtype=F64).to(dtype).requires_grad_() for n in (N, N, 17)]


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    return torch.autograd.grad(loss, inputs, upstream, allow_unused=True, materialize_grads=True)


def one_by_one(call: Callable[..., Tensor], given: Sequence[Tensor], widths: Sequence[int], **options: Any) -> Tensor:
    """A call a width, on slices."""
    weights = options.pop("matryoshka_weights", None) or [1.0] * len(widths)
    parts = [c * call(*(t[:, :w] for t in given), **options) for w, c in zip(widths, weights, strict=True)]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(
    ("widths", "weights"), [(WIDTHS, None), ((1, 5), (0.5, 3)), ([4], None), ([D], [0.25])], ids=str
)
def test_sum_of_a_call_a_width(
    impl: str, name: str, reduction: str, unit: bool, widths: Sequence[int], weights: Sequence[float] | None
) -> None:
    given, tau = rows(), torch.tensor(0.3, dtype=F64, requires_grad=True)
    options = {"temperature": tau, "normalize": unit, "reduction": reduction, "matryoshka_weights": weights}
    loss = CALLS[name](*given, matryoshka=widths, impl=impl, **options)
    expected = one_by_one(CALLS[name], given, widths, impl="reference", **options)
    assert loss.shape == ((N,) if reduction == "none" else ())
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    inputs = [*given, tau]
    torch.testing.assert_close(gradients(loss, inputs), gradients(expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_formula_of_the_paper(impl: str) -> None:
    """Only the widths listed, each prefix over its own norm."""
    x, y, _ = rows()
    expected = sum(
        cross_entropy(normalize(x[:, :w]) @ normalize(y[:, :w]).T / 0.2, torch.arange(N)) for w in WIDTHS[:3]
    )
    module = fastret.InfoNCE(0.2, matryoshka=WIDTHS[:3], impl=impl)
    torch.testing.assert_close(module(x, y), expected, rtol=1e-11, atol=1e-11)
    dx, dy = gradients(module(x, y), [x, y])
    torch.testing.assert_close((dx, dy), gradients(expected, [x, y]), rtol=1e-9, atol=1e-10)
    assert not dx[:, 8:].any()


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.07, 0.3])
def test_low_precision_is_no_worse_than_dense_torch(
    impl: str, name: str, dtype: torch.dtype, temperature: float
) -> None:
    given = [t.detach().requires_grad_() for t in rows(dtype, 67)]
    widths = (8, 32, 67)

    def run(dtype: torch.dtype, impl: str) -> list[Tensor]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in given]
        loss = CALLS[name](*leaves, temperature=temperature, matryoshka=widths, impl=impl)
        return [r.detach().to(F64) for r in (loss, *gradients(loss, leaves))]

    exact, naive = run(F64, "reference"), run(dtype, "reference")
    wide = torch.finfo(torch.float32).eps
    for k, (ours, theirs, truth) in enumerate(zip(run(dtype, impl), naive, exact, strict=True)):
        ulp = (torch.finfo(dtype).eps if k else wide) * truth.abs().max()
        bound = 2 * (theirs - truth).abs().max() + 4 * ulp + 16 * wide * truth.abs().max()
        assert (ours - truth).abs().max() <= bound


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.skipif("cpu" not in IMPLS, reason="the C++ extension is not built")
def test_one_call_of_each_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastret import _C

    calls: list[str] = []

    def counted(kernel: str) -> Callable[..., None]:
        run = getattr(_C, kernel)

        def call(*arguments: Any) -> None:
            calls.append(kernel)
            run(*arguments)

        return call

    kernels = ["masked_lse_forward", "masked_lse_backward"]
    for kernel in kernels:
        monkeypatch.setattr(_C, kernel, counted(kernel))
    CALLS[name](*rows(), matryoshka=WIDTHS, impl="cpu").backward()
    assert calls == kernels


def test_heads_share_what_they_refer_to() -> None:
    labels, weight, index = LABELS.int(), torch.ones(N, dtype=F64), INDEX
    mask = PairMask(same=(labels, labels))
    heads = [Head(mask=mask, target=Masked(mask, weight), width=w) for w in WIDTHS]
    flat = flatten([*heads, Head(target=Indexed(index))], F64)
    assert [t.dtype for t in flat.tensors] == [torch.int64, F64, torch.int64]
    assert len({t.data_ptr() for t in flat.tensors}) == 3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["mean", "none"])
def test_anchors_without_candidates(impl: str, loss: str) -> None:
    x = torch.randn(1, D, requires_grad=True)
    value = F.sup_con(x, torch.tensor([4]), matryoshka=WIDTHS, reduction=loss, impl=impl)
    value.sum().backward()
    assert value.sum() == 0
    assert x.grad is not None
    assert not x.grad.any()
    empty = F.info_nce(x[:0], x[:0], matryoshka=WIDTHS, reduction=loss, impl=impl)
    assert empty.sum() == 0


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_compiles_without_a_graph_break(name: str, reduction: str, impl: str) -> None:
    torch._dynamo.reset()
    given, tau = rows(), torch.tensor(0.3, dtype=F64, requires_grad=True)
    options = {"reduction": reduction, "impl": impl, "matryoshka_weights": [1, 0.5, 2, 1]}

    def call(x: Tensor, y: Tensor, z: Tensor, tau: Tensor) -> Tensor:
        return CALLS[name](x, y, z, temperature=tau, matryoshka=WIDTHS, **options).sum()

    loss = torch.compile(call, fullgraph=True, backend="aot_eager")(*given, tau)
    expected = call(*given, tau)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, [*given, tau]), gradients(expected, [*given, tau]))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_functional_transforms(name: str, impl: str) -> None:
    given = [t.detach() for t in rows()]

    def call(x: Tensor) -> Tensor:
        return CALLS[name](x, *given[1:], matryoshka=WIDTHS, impl=impl)

    x = given[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(x), x)
    torch.testing.assert_close(torch.func.grad(call)(given[0]), expected)
    batch = torch.stack([given[0], given[0] * torch.linspace(0.5, 2, D, dtype=F64)])
    torch.testing.assert_close(torch.func.vmap(call)(batch), torch.stack([call(b) for b in batch]))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(call))(batch)[0], expected)


def test_modules_hand_it_on_and_copy() -> None:
    x, y, _ = rows()
    options: dict[str, Any] = {"matryoshka": [2, 5], "matryoshka_weights": (1, 0.5)}
    for module, expected in (
        (fastret.InfoNCE(0.2, **options), F.info_nce(x, y, temperature=0.2, **options)),
        (fastret.SupCon(0.2, **options), F.sup_con(x, LABELS, temperature=0.2, **options)),
    ):
        assert "matryoshka=[2, 5]" in repr(module)
        assert repr(copy.deepcopy(module)) == repr(pickle.loads(pickle.dumps(module))) == repr(module)
        assert torch.equal(module(x, y) if isinstance(module, fastret.InfoNCE) else module(x, LABELS), expected)


@pytest.mark.parametrize("at", ["call", "module"])
@pytest.mark.parametrize(
    ("widths", "weights", "error", "message"),
    [
        ([], None, ValueError, "matryoshka: expected at least one width, got none"),
        ([2, 5.0], None, TypeError, r"matryoshka: expected a sequence of integers, got \[2, 5.0\]"),
        ([True, 5], None, TypeError, "matryoshka: expected a sequence of integers"),
        (5, None, TypeError, "matryoshka: expected a sequence of integers, got 5"),
        ("25", None, TypeError, "matryoshka: expected a sequence of integers, got '25'"),
        ([5, 2], None, ValueError, r"matryoshka: expected widths that strictly increase.*got \[5, 2\]"),
        ([2, 2], None, ValueError, "matryoshka: expected widths that strictly increase"),
        ([0, 2], None, ValueError, "matryoshka: expected widths that strictly increase from at least 1"),
        ([2, 5], [1.0], ValueError, r"matryoshka_weights: expected one a width, 2, got \[1.0\]"),
        ([2, 5], [1.0, -1.0], ValueError, r"matryoshka_weights\[1\]: expected a positive finite number, got -1.0"),
        ([2, 5], [0, 1], ValueError, r"matryoshka_weights\[0\]: expected a positive finite number, got 0"),
        ([2, 5], [math.nan, 1], ValueError, r"matryoshka_weights\[0\]: expected a positive finite number, got nan"),
        ([2, 5], ["1", 1], TypeError, r"matryoshka_weights\[0\]: expected a number, got str"),
        ([2, 5], 1.0, TypeError, "matryoshka_weights: expected a sequence of numbers, got 1.0"),
        (None, [1.0], ValueError, r"matryoshka_weights: expected None without matryoshka, got \[1.0\]"),
    ],
)
def test_bad_input_names_the_argument(at: str, widths: Any, weights: Any, error: type[Exception], message: str) -> None:
    x, y, _ = rows()
    options = {"matryoshka": widths, "matryoshka_weights": weights}
    calls: tuple[Callable[[], object], ...] = (
        (lambda: F.info_nce(x, y, **options), lambda: F.sup_con(x, LABELS, **options))
        if at == "call"
        else (lambda: fastret.InfoNCE(**options), lambda: fastret.SupCon(**options))
    )
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_widths_beyond_the_rows() -> None:
    x, y, _ = rows()
    message = r"matryoshka: expected widths up to 11, that of the rows, got \[2, 12\]"
    with pytest.raises(ValueError, match=message):
        fastret.InfoNCE(matryoshka=[2, 12])(x, y)
    with pytest.raises(ValueError, match=message):
        fastret.SupCon(matryoshka=[2, 12])(x, LABELS)
