"""PatchMixLoss against the released code's contrasts, one after another, with dense labels."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastret

F64 = torch.float64
B, D, M = 7, 5, 3


def labels(kind: str, columns: int, smoothing: float, offset: int) -> Tensor:
    """(B, columns), by loops."""
    result = torch.full((B, columns), smoothing / columns, dtype=F64)
    for i in range(B):
        if kind == "origin":
            shares = {0: 1.0}
        elif kind == "mix-to-origin":
            shares = dict.fromkeys(range(M), 1 / M)
        else:
            shares = {d: (1 - abs(d) / M) / M for d in range(1 - M, M)}
        for d, share in shares.items():
            result[i, offset + (i + d) % B] += (1 - smoothing) * share
    return result


def contrast(q: Tensor, k: Tensor, kind: str, temperature: Any, smoothing: float, offset: int) -> Tensor:
    logits = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(k).T / temperature
    return -(labels(kind, len(k), smoothing, offset) * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("crops", [0, 1, 3])
@pytest.mark.parametrize(("smoothing", "offset", "columns"), [(0.0, 0, B), (0.1, 4, B + 6)])
@pytest.mark.parametrize("impl", ["reference", "tiled", None])
def test_equals_the_released_code(crops: int, smoothing: float, offset: int, columns: int, impl: str | None) -> None:
    q1, mixed_q2 = (torch.randn(B, D, dtype=F64).requires_grad_() for _ in range(2))
    k1, k2, mixed_k1 = (torch.randn(columns, D, dtype=F64).requires_grad_() for _ in range(3))
    temperature = torch.tensor(0.2, dtype=F64).requires_grad_()
    leaves = [q1, mixed_q2, temperature]
    rest = (temperature, smoothing, offset)
    expected = contrast(q1, k2.detach(), "origin", *rest)
    expected = expected + contrast(mixed_q2, k1.detach(), "mix-to-origin", *rest) / 2
    expected = expected + contrast(mixed_q2, mixed_k1.detach(), "mix-to-mix", *rest) / 2
    extra: dict[str, Tensor] = {}
    if crops:
        extra = {name: torch.randn(crops * B, D, dtype=F64).requires_grad_() for name in ("crops", "mixed_crops")}
        leaves += extra.values()
        for name, kind in (("crops", "origin"), ("mixed_crops", "mix-to-origin")):
            for crop in extra[name].chunk(crops):
                for key in (k1, k2):
                    expected = expected + contrast(crop, key.detach(), kind, *rest) / crops
    loss = fastret.PatchMixLoss(M, temperature, smoothing=smoothing, impl=impl)(
        q1, k1, k2, mixed_q2, mixed_k1, **extra, offset=offset
    )
    torch.testing.assert_close(loss, expected)
    keys = [k1, k2, mixed_k1]
    assert torch.autograd.grad(loss, keys, retain_graph=True, allow_unused=True) == (None, None, None)
    mine, theirs = (torch.autograd.grad(7 * v, leaves) for v in (loss, expected))
    torch.testing.assert_close(mine, theirs)


def test_weights_and_a_real_mixture() -> None:
    """The loss is lowest where queries and keys are the images' own, mixed as the images are."""
    images = torch.randn(B, 1, 4, 4)
    permutation = torch.randperm(16)
    mixed = fastret.functional.patchmix(images, 1, 2, permutation=permutation).flatten(1)
    rows = images.flatten(1)
    loss = fastret.PatchMixLoss(2, weights=(0.0, 1.0, 0.0))
    right = loss(rows, rows, rows, mixed, mixed)
    wrong = loss(rows, rows, rows, mixed.roll(3, 0), mixed)
    assert right < wrong
    only = fastret.SoftTargetInfoNCE(0.2)(mixed, rows, fastret.PatchMixTargets("mix-to-origin", B, 2))
    torch.testing.assert_close(right, only)


@pytest.mark.parametrize("impl", ["reference", "tiled", None])
def test_dot_products_of_the_rows_as_given(impl: str | None) -> None:
    rows = [torch.randn(B, D, dtype=F64) for _ in range(5)]
    raw, cosine = (fastret.PatchMixLoss(M, normalize=normalize, impl=impl) for normalize in (False, True))
    unit = [torch.nn.functional.normalize(part) for part in rows]
    torch.testing.assert_close(raw(*unit), cosine(*rows))
    assert abs(float(raw(*rows) - cosine(*rows))) > 0.1


Q = torch.randn(B, D)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastret.PatchMixLoss(0), ValueError, "m: expected at least 1"),
        (lambda: fastret.PatchMixLoss(2, -1.0), ValueError, "temperature: expected a positive"),
        (lambda: fastret.PatchMixLoss(2, weights=(1.0, 2.0)), ValueError, "weights: expected three, got 2"),
        (lambda: fastret.PatchMixLoss(5)(Q, Q, Q, Q, Q), ValueError, "batch: expected at least 2m - 1 = 9"),
        (lambda: fastret.PatchMixLoss(2)(Q, Q[:3], Q, Q, Q), ValueError, "k1: expected at least offset"),
        (lambda: fastret.PatchMixLoss(2)(Q, Q, Q, Q, Q, offset=1), ValueError, "k1: expected at least offset . B = 8"),
        (lambda: fastret.PatchMixLoss(2)(Q, Q, Q, Q[:2], Q), ValueError, "mixed_q2: expected 7 rows like q1, got 2"),
        (lambda: fastret.PatchMixLoss(2)(Q, Q, Q, Q, Q, crops=Q[:3]), ValueError, "crops: expected a multiple"),
        (lambda: fastret.PatchMixLoss(2)(Q, Q, Q, Q, Q, crops=Q[:0]), ValueError, "crops: expected a multiple"),
        (lambda: fastret.PatchMixLoss(2)(Q, Q[:, :2], Q, Q, Q), ValueError, "k1: expected 5 columns like q1, got 2"),
        (lambda: fastret.PatchMixLoss(2)(Q[:0], Q, Q, Q[:0], Q), ValueError, "batch: expected at least 1"),
    ],
)
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
