"""patchmix against a loop over patches and against the released code's five steps, and what PyTorch expects of it."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastret
from fastret.backends import registry
from fastret.backends.registry import Call
from fastret.backends.tiled import patchmix as tiled
from fastret.ops import patch_groups, patchmix

FUSED = [
    impl
    for impl in ("tiled", "cpu", "triton")
    if registry.IMPLEMENTATIONS[impl].unsupported(Call("patchmix", "cpu", torch.float32)) is None
]
SIZES = [  # batch, channels, height, width, patch, m
    (5, 3, 8, 12, 4, 2),
    (4, 1, 6, 6, 2, 4),  # 9 patches: one is left over
    (3, 2, 5, 7, 1, 5),  # images come round
    (1, 3, 4, 4, 2, 3),
    (6, 2, 4, 4, 4, 1),
    (2, 1, 4, 6, 2, 6),  # a patch a group
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "BUDGET", 50)


def five_steps(x: Tensor, patch: int, m: int, permutation: Tensor) -> Tensor:
    """Patches in a row, shuffled, cut into groups, groups moved between images, and back."""
    b, c, h, w = x.shape
    rows = x.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    rows = rows.reshape(b, (h // patch) * (w // patch), c * patch * patch)
    patches = rows.shape[1]
    size = patches // m
    shuffled = rows[:, permutation]
    groups = shuffled[:, : size * m].reshape(b * m, size, -1)
    number = torch.arange(b * m)
    moved = groups[(number + (number % m) * m) % (b * m)].reshape(b, m * size, -1)
    mixed = torch.cat([moved, shuffled[:, size * m :]], 1)[:, permutation.argsort()]
    mixed = mixed.reshape(b, h // patch, w // patch, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return mixed.reshape(b, c, h, w)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.usefixtures("small_blocks")
def test_equals_the_released_code_bit_for_bit(impl: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    b, c, h, w, patch, m = size
    x = (100 * torch.rand(b, c, h, w)).to(dtype)
    permutation = torch.randperm((h // patch) * (w // patch))
    mixed = patchmix(x, patch, m, permutation=permutation, impl=impl)
    assert torch.equal(mixed, five_steps(x, patch, m, permutation))
    groups = patch_groups(len(permutation), m, permutation=permutation)
    for i in range(b):
        for t, g in enumerate(groups.tolist()):
            down, across = divmod(t, w // patch)
            place = (slice(None), slice(down * patch, (down + 1) * patch), slice(across * patch, (across + 1) * patch))
            assert torch.equal(mixed[i][place], x[(i + g) % b][place])
    sequence = x.flatten(2).transpose(1, 2)  # pixels as patches
    permutation = torch.randperm(h * w)
    mixed = patchmix(sequence, 1, m, permutation=permutation, impl=impl)
    assert torch.equal(mixed.transpose(1, 2).reshape(x.shape), five_steps(x, 1, m, permutation))


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize("shape", [(5, 3, 8, 4), (5, 8, 3)])
def test_gradient_goes_back_where_each_patch_came_from(impl: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    patch = 2 if len(shape) == 4 else 1
    permutation = torch.randperm(8)

    def mix(a: Tensor, impl: str = impl) -> Tensor:
        return patchmix(a, patch, 3, permutation=permutation, impl=impl)

    fast = impl == "triton"  # where it is interpreted, every element takes minutes
    assert torch.autograd.gradcheck(mix, x, fast_mode=fast)
    assert torch.autograd.gradgradcheck(mix, x, fast_mode=fast)
    # a gather that takes every element once: its transpose is its inverse
    (back,) = torch.autograd.grad(mix(x), x, mix(x).detach())
    assert torch.equal(back, x)


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck_compile_and_torch_func(impl: str) -> None:
    x, groups = torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, 1])
    torch.library.opcheck(torch.ops.fastret.patchmix.default, (x, groups, 2, impl))
    permutation = torch.randperm(4)

    def value(a: Tensor, impl: str = impl) -> Tensor:
        return patchmix(a, 2, 2, permutation=permutation, impl=impl).sin().sum()

    expected = torch.func.grad(lambda a: value(a, "reference"))(x)
    assert torch.equal(torch.func.grad(value)(x), expected)
    batch = torch.randn(3, *x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        many = torch.vmap(torch.func.grad(value))(batch)
    assert torch.equal(many, torch.stack([torch.func.grad(value)(a) for a in batch]))
    torch._dynamo.reset()
    torch.library.opcheck(torch.ops.fastret.patch_groups.default, (permutation, 2))
    wrong = torch.compile(
        lambda a: patchmix(a, 2, 2, permutation=torch.zeros(4, dtype=torch.int64), impl=impl),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match="permutation: expected each number from 0 to 3 once"):
        wrong(x)
    torch._dynamo.reset()
    drawn = torch.compile(
        lambda a: patchmix(a, 2, 2, generator=torch.default_generator, impl=impl), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Generator"):
        drawn(x)
    torch._dynamo.reset()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x.requires_grad_()), x)[0], expected)


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_views_empty_batches_and_seeds(impl: str) -> None:
    x = torch.randn(6, 4, 4, 10)
    permutation = torch.randperm(8)
    for view in (x[::2, :, :, 1:9], x.permute(0, 3, 1, 2)[:, :3, :, :].transpose(2, 3).repeat(1, 1, 2, 1)[..., :4]):
        assert torch.equal(
            patchmix(view, 2, 2, permutation=permutation, impl=impl),
            patchmix(view.contiguous(), 2, 2, permutation=permutation, impl=impl),
        )
    assert patchmix(x[:0, :, :, :4], 2, 2, impl=impl).shape == (0, 4, 4, 4)
    first, again, other = (
        patchmix(x[..., :8], 1, 3, generator=torch.Generator().manual_seed(seed), impl=impl) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_groups_are_of_equal_size_and_the_rest_stays() -> None:
    groups = patch_groups(23, 4, generator=torch.Generator().manual_seed(0))
    assert groups.bincount().tolist() == [8, 5, 5, 5]
    assert patch_groups(7, 1).tolist() == [0] * 7


X = torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: patchmix(X, 3, 2), ValueError, "x: expected height and width that patches of 3 divide, got 8 x 8"),
        (lambda: patchmix(X, 4, 0), ValueError, "m: expected at least 1, got 0"),
        (lambda: patchmix(X, 4, 5), ValueError, "m: expected at most the 4 patches of an image, got 5"),
        (lambda: patchmix(X, 4, 2.0), TypeError, "m: expected an integer"),
        (lambda: patchmix(X, 0, 2), ValueError, "patch_size: expected at least 1"),
        (lambda: patchmix(X[0], 4, 2), ValueError, "patch_size: expected 1 with sequences"),
        (lambda: patchmix(X[0, 0], 4, 2), ValueError, r"x: expected shape \(B, C, H, W\) or \(B, T, D\)"),
        (lambda: patchmix([1], 4, 2), TypeError, "x: expected a tensor"),
        (lambda: patchmix(X, 4, 2, permutation=torch.arange(3)), ValueError, r"permutation: expected shape \(4,\)"),
        (lambda: patchmix(X, 4, 2, permutation=torch.tensor([0, 1, 1, 2])), ValueError, "permutation: .* once"),
        (lambda: patchmix(X, 4, 2, permutation=torch.rand(4)), TypeError, "permutation: expected an integer tensor"),
        (lambda: patchmix(X, 4, 2, generator=3), TypeError, "generator: expected a torch.Generator, got int"),
        (
            lambda: patchmix(X, 4, 2, permutation=torch.arange(4), generator=torch.Generator()),
            ValueError,
            "permutation, generator: expected at most one",
        ),
        (lambda: patch_groups(4.0, 1), TypeError, "patches: expected an integer, got float"),
        (lambda: fastret.PatchMixTargets("mix-to-mix", 4, 3), ValueError, "batch: expected at least 2m - 1 = 5"),
    ],
)
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("impl", ["reference", *FUSED])
def test_one_element_of_any_stride(impl: str) -> None:
    """A tensor of one element is contiguous whatever its strides are, as those of an expanded gradient."""
    x = torch.ones(1, 1, 1, dtype=torch.float16, requires_grad=True)
    out = patchmix(x, 1, 1, impl=impl)
    (gradient,) = torch.autograd.grad(out, x, torch.full((), 3.0, dtype=torch.float16).expand(1, 1, 1))
    assert gradient.item() == 3
