"""How many kernels a proxy loss launches, and that parts of a sum merge alike whichever program finishes last."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastret
from fastret.backends.pairs import Head, Need, PairMask, Shifted
from fastret.backends.triton import masked_lse as backend
from fastret.backends.triton import plans
from fastret.kernels.triton import config
from fastret.kernels.triton import masked_lse as kernels
from fastret.kernels.triton import rows as row_kernels
from fastret.ops import masked_lse

COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
KERNELS = {
    kernels: ("masked_lse_kernel", "masked_lse_gradient_kernel", "masked_lse_weights_kernel"),
    row_kernels: ("pack_kernel", "unpack_kernel"),
}
ROWS, CLASSES, WIDTH = 18, 100, 24  # so many classes that their gradient is not divided, as 20,000 are

# What PyTorch makes without a launch: views, and memory that nothing is written to but by the tests, which poison it.
FREE = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "fill_"),
    *("new_empty", "permute", "select", "slice", "t", "transpose", "unbind", "unsqueeze", "view"),
}

# log2(0) is meant, and numpy, which interprets, remarks on it
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of kernels of ours, by name."""
    found: Counter[str] = Counter()

    class Watched:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                found[self.name] += 1
                with torch.utils._python_dispatch._disable_current_modes():  # the interpreter copies with PyTorch
                    self.kernel[grid](*arguments, **options)

            return launch

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Watched(getattr(module, name), name))
    return found


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        same = isinstance(result, Tensor) and any(result is a for a in args)
        if name not in FREE and not (same and not name.endswith("_")):
            self.count[name] += 1
        return result


def proxies(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("loss", [fastret.ProxyNCA, fastret.NormalizedSoftmax])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_of_a_step(launched: Counter[str], loss: Any, reduction: str) -> None:
    """Forward and backward, though the rows are so few that parts of the columns are summed apart: three for the loss;
    rows and proxies on their way in, once where the loss is one number, and gradients on their way out."""
    block = config.lookup("lse", DEVICE, torch.float32)["BLOCK_M"]
    assert COMPILED or config.parts(DEVICE, -(-ROWS // block), CLASSES // 16) > 1
    module = loss(CLASSES, WIDTH, reduction=reduction, impl="triton").to(DEVICE)
    x = proxies(ROWS, 5).requires_grad_()
    module(x, torch.arange(ROWS, device=DEVICE)).sum().backward()
    assert x.grad is not None
    laid_out = {"pack_kernel": 2 if reduction == "mean" else 4, "unpack_kernel": 2}
    assert launched == {"masked_lse_kernel": 1, "masked_lse_gradient_kernel": 2, **laid_out}


def test_two_kernels_a_step_of_two_heads(monkeypatch: pytest.MonkeyPatch, launched: Counter[str]) -> None:
    """One product forward for rows and columns, one backward for their weights, of scores once each."""
    monkeypatch.setattr(plans, "_chosen", "weights")
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    x, y = proxies(ROWS, 5).requires_grad_(), proxies(ROWS, 6).requires_grad_()
    fastret.CLIPLoss(impl="triton")(x, y, scale).backward()
    loss = {"masked_lse_kernel": 1, "masked_lse_weights_kernel": 1}
    assert launched == {**loss, "pack_kernel": 4, "unpack_kernel": 2}


def test_rows_are_laid_out_once_a_step(launched: Counter[str]) -> None:
    """What PyTorch launches beside them, for loss and gradients of a weighted sum."""
    head = Head(18.0, target=Shifted())
    options = {"normalize": True, "first_column": 0, "columns": CLASSES}
    x, y, weight = proxies(ROWS, 5), proxies(CLASSES, 6), torch.ones(ROWS, device=DEVICE)
    with Operators() as operators:
        backend.sweep(x, y, head, weight, **options, need=Need(True, True, False, False, False))
    assert launched.total() == 7
    assert launched["pack_kernel"] == 2, "one normalisation a side"
    assert operators.count.total() <= 13, operators.count


def test_proxies_are_not_copied(launched: Counter[str]) -> None:
    """Their norms take the place of a copy, and no launch more."""
    x, y, weight = torch.randn(ROWS, 32), torch.randn(CLASSES, 32), torch.ones(ROWS)
    x, y, weight = (t.to(DEVICE) for t in (x, y, weight))
    options = {"normalize": True, "first_column": 0, "columns": CLASSES}
    with Operators() as operators:
        need = Need(True, True, False, False, False)
        _, gradients = backend.sweep(x, y, Head(18.0, target=Shifted()), weight, **options, need=need)
    assert gradients.y is not None
    assert launched == {
        **{"masked_lse_kernel": 1, "masked_lse_gradient_kernel": 2},
        **{"pack_kernel": 2, "unpack_kernel": 2},
    }
    assert operators.count.total() <= 13, operators.count


def orders() -> dict[str, Callable[[int], Sequence[int]]]:
    def shuffled(count: int) -> Sequence[int]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()

    return {"backwards": lambda count: range(count)[::-1], "shuffled": shuffled}


@pytest.mark.skipif(COMPILED, reason="the order in which a GPU runs programs is its own")
@pytest.mark.parametrize("order", orders())
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("reduce", ["lse", "hinge"])
def test_parts_merge_alike_whichever_is_last(
    monkeypatch: pytest.MonkeyPatch, order: str, axis: str, reduce: str
) -> None:
    from triton.runtime.interpreter import interpreter_builder

    x, y = proxies(ROWS, 5), proxies(CLASSES, 6)
    if axis == "column":
        x, y = y, x
    labels = torch.arange(CLASSES) % 7
    mask = PairMask(different=(labels[: len(x)], labels[: len(y)]))
    heads = [Head(9.0, mask, Shifted() if reduce == "lse" else None, axis=axis, reduce=reduce)]
    expected = masked_lse(x, y, heads=heads, impl="triton")[0]
    original, ranks, last = interpreter_builder.set_grid_idx, [], []

    def elsewhere(*place: int) -> None:
        ranks[:] = [orders()[order](size) for size in interpreter_builder.grid_dim]
        last[:] = [rank[k] for rank, k in zip(ranks, place, strict=True)]
        original(*last)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", elsewhere)
    found = masked_lse(x, y, heads=heads, impl="triton")[0]
    assert len(ranks[1]) > 1
    assert last[1] < len(ranks[1]) - 1, "another part than before came last"
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
