"""patchmix: a batch whose images are put together from patches of their neighbours in the batch, in one gather.

T patches an image, row by row; m images are mixed. One permutation of the T patches, shared by the batch, puts patch t
at inv_t of the permuted row, of which each S = floor(T / m) places are a group:

    group_t = floor(inv_t / S) where inv_t < S m, else 0              out[b, t] = x[(b + group_t) mod B, t]

So patches stay where they are in the image; image b gives group 0 and the T - S m patches that are left over, the
images b + 1 .. b + m - 1 the others. Gradient: dx[b, t] = dout[(b - group_t) mod B, t], the same op with groups turned
over. (The released code reaches the same result through five copies of the batch.)

Source: Shen, Liu, Tang, Qu, Wang: Inter-Instance Similarity Modeling for Contrastive Learning. arXiv 2306.12243.

Cost: the batch read once and written once. Memory: the result and T numbers.

The interface of an implementation, ``fastret.backends.*.patchmix``:

    forward(x, groups, patch) -> Tensor

with x (B, C, H, W), H and W multiples of patch, or (B, T, D) with patch = 1, of any dtype; groups (T,) int64, any
numbers, of which the sums with b count modulo B.
"""

from typing import Any

import torch
from torch import Tensor

from fastret.backends import registry
from fastret.backends.reference import patchmix as reference
from fastret.ops import checks
from fastret.ops.library import apply, define


def patch_groups(
    patches: int,
    m: int,
    *,
    permutation: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(T,) int64, the group of every patch; formula at the top of this file.

    Args:
        patches: T. m: images mixed, from 1 to T.
        permutation: (T,) integers, each number from 0 to T - 1 once; None: drawn.
        generator: of the draw, in place of a permutation; None: PyTorch's own. Dynamo takes no generator: it breaks the
            graph, and with fullgraph=True raises; there draw ``torch.randperm(T, generator=...)`` outside.
        device: of the result; None: that of the permutation, or the CPU.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_integer(patches, "patches")
    checks.check_integer(m, "m", 1)
    if permutation is not None and generator is not None:
        raise ValueError("permutation, generator: expected at most one of them")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if m > patches:
        raise ValueError(f"m: expected at most the {patches} patches of an image, got {m}")
    if permutation is None:
        where = "cpu" if generator is None else generator.device
        permutation = torch.randperm(patches, generator=generator, device=where)
    else:
        _check_permutation(permutation, patches)
    groups: Tensor = torch.ops.fastret.patch_groups.default(permutation, m)
    return groups.to(device or permutation.device)


def patchmix(
    x: Tensor,
    patch_size: int,
    m: int,
    *,
    permutation: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str | None = None,
) -> Tensor:
    """A batch of images, or of sequences of patches, mixed; formula and cost stand at the top of this file.

    Args:
        x: (B, C, H, W), or (B, T, D) where patches are the rows of a sequence.
        patch_size: side of a patch in pixels, which divides H and W; of sequences 1.
        m: images mixed into each, from 1 (none) to T. Labels: ``fastret.PatchMixTargets(kind, B, m)``.
        permutation, generator: as in ``fastret.ops.patch_groups``; one drawn permutation serves the whole batch.
        impl: "reference", "tiled", "cpu" or "triton"; None: ``fastret.backend``, FASTRET_IMPL, else the fastest.

    Returns:
        As x.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    patches = _patches(x, patch_size)
    groups = patch_groups(patches, m, permutation=permutation, generator=generator, device=x.device)
    # bytes are moved, whatever they mean
    chosen = registry.resolve("patchmix", x.device, torch.float32, impl)
    if chosen == "reference":
        return reference.patchmix(x, groups, patch_size)
    mixed: Tensor = apply(_PatchMix, x, groups, patch_size, chosen)
    return mixed


def _patches(x: Tensor, patch_size: int) -> int:
    """T, once x and the size of a patch are known to fit."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor of shape (B, C, H, W) or (B, T, D), got {type(x).__name__}")
    checks.check_integer(patch_size, "patch_size", 1)
    if x.dim() == 3:
        if patch_size != 1:
            raise ValueError(f"patch_size: expected 1 with sequences of patches (B, T, D), got {patch_size}")
        return x.shape[1]
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, H, W) or (B, T, D), got {tuple(x.shape)}")
    height, width = x.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"x: expected height and width that patches of {patch_size} divide, got {height} x {width}")
    return (height // patch_size) * (width // patch_size)


def _check_permutation(permutation: Tensor, patches: int) -> None:
    if not isinstance(permutation, Tensor) or permutation.dtype not in checks.INTEGERS:
        given = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise TypeError(f"permutation: expected an integer tensor, got {given}")
    if permutation.shape != (patches,):
        raise ValueError(f"permutation: expected shape ({patches},), a patch each, got {tuple(permutation.shape)}")


def _groups(permutation: Tensor, m: int) -> Tensor:
    ascending, inverse = permutation.to(torch.int64).sort()
    patches = len(permutation)
    right = (ascending == torch.arange(patches, device=ascending.device)).all()
    message = f"permutation: expected each number from 0 to {patches - 1} once"
    if right.device.type != "cpu":
        torch._assert_async(right, message)
    elif not right:
        raise ValueError(message)
    size = patches // m
    return torch.where(inverse < size * m, inverse // size, 0)


def _groups_fake(permutation: Tensor, m: int) -> Tensor:
    return torch.empty_like(permutation, dtype=torch.int64)


def _forward(x: Tensor, groups: Tensor, patch: int, impl: str) -> Tensor:
    mixed: Tensor = registry.IMPLEMENTATIONS[impl].module("patchmix").forward(x, groups, patch)
    return mixed


def _forward_fake(x: Tensor, groups: Tensor, patch: int, impl: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


define("patch_groups(Tensor permutation, SymInt m) -> Tensor", _groups, _groups_fake)
define("patchmix(Tensor x, Tensor groups, SymInt patch, str impl) -> Tensor", _forward, _forward_fake)

_operator = torch.ops.fastret.patchmix.default


class _PatchMix(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, groups: Tensor, patch: int, impl: str) -> Tensor:
        mixed: Tensor = _operator(x, groups, patch, impl)
        return mixed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, groups, ctx.patch, ctx.impl = inputs
        ctx.save_for_backward(groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (groups,) = ctx.saved_tensors
        # dynamo traces no Function inside a Function's backward; a compiled graph is not differentiated twice anyway
        move = _operator if torch.compiler.is_compiling() else _PatchMix.apply
        return move(grad, -groups, ctx.patch, ctx.impl), None, None, None
