"""Several classes a row: sequences of labels, against dense targets written out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

import fastret
from fastret import functional as F
from fastret.backends import registry
from fastret.backends.registry import Call

F64 = torch.float64
B, C, D = 5, 9, 4
IMPLS = [
    impl
    for impl in ("reference", "tiled", "cpu")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("masked_lse", "cpu", torch.float32)) is None
]
LABELS = [[3], [0, 8, 4], [], [2, 2, 5], torch.tensor([7, 1])]
LOSSES: dict[str, tuple[Callable[..., Tensor], float, float]] = {  # a loss, its scale of cosines, its smoothing
    "normalized_softmax": (lambda *a, **o: F.normalized_softmax(*a, temperature=0.2, **o), 5.0, 0.0),
    "proxy_nca": (lambda *a, **o: F.proxy_nca(*a, **o), 18.0, 0.0),
    "smoothed": (lambda *a, **o: F.proxy_nca(*a, smoothing=0.2, **o), 18.0, 0.2),
    "proxy_nca_plus_plus": (lambda *a, **o: F.proxy_nca_plus_plus(*a, scale=2.0, **o), 8.0, 0.0),
}


def shares() -> Tensor:
    target = torch.zeros(B, C, dtype=F64)
    for row, own in enumerate(LABELS):
        for label in own:
            target[row, int(label)] += 1 / len(own)
    return target


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_classes_share_the_target(impl: str, name: str, reduction: str) -> None:
    loss, scale, smoothing = LOSSES[name]
    x, proxies = (torch.randn(n, D, dtype=F64, requires_grad=True) for n in (B, C))
    log_share = log_softmax(scale * normalize(x) @ normalize(proxies).T, 1)
    target = shares()
    if smoothing:
        eps = smoothing * C / (C - 1)
        target = (1 - eps) * target + eps / C
    rows = -(target * log_share).sum(1) * torch.tensor([len(own) > 0 for own in LABELS])
    expected = {"mean": rows.sum() / 4, "sum": rows.sum(), "none": rows}[reduction]
    mine = loss(x, proxies, LABELS, reduction=reduction, impl=impl)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(7 * value.sum(), (x, proxies)) for value in (mine, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_label_a_row_is_the_loss_of_a_tensor(impl: str) -> None:
    labels = torch.randint(C, (B,))
    x = torch.randn(B, D)
    for module in (fastret.ProxyNCA(C, D, impl=impl), fastret.NormalizedSoftmax(C, D, impl=impl)):
        torch.testing.assert_close(module(x, [[int(label)] for label in labels]), module(x, labels))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_labels_at_all(impl: str) -> None:
    x, proxies = torch.randn(B, D, requires_grad=True), torch.randn(C, D)
    loss = F.proxy_nca(x, proxies, [[]] * B, impl=impl)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert F.proxy_nca(x * math.nan, proxies, [[]] * B, impl=impl).isnan()


X, P = torch.randn(B, D), torch.randn(C, D)
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "beyond": (lambda: F.proxy_nca(X, P, [[0], [9], [], [], []]), ValueError, "labels: expected numbers from 0 to 8"),
    "below": (lambda: F.proxy_nca(X, P, [[0], [-1], [], [], []]), ValueError, "labels: expected numbers from 0 to 8"),
    "too few": (lambda: F.proxy_nca(X, P, [[0]]), ValueError, "labels: expected 5 sequences, one a row, got 1"),
    "floats": (lambda: F.proxy_nca(X, P, [[0.5]] * B), TypeError, "labels: expected an integer dtype"),
    "numbers": (lambda: F.proxy_nca(X, P, [0] * B), TypeError, "labels: expected a tensor .* or a sequence of seq"),
    "without the positive": (
        lambda: F.proxy_nca(X, P, LABELS, include_positive=False),
        ValueError,
        "labels: expected one class a row with include_positive=False",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
