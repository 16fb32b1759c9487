"""What only large tensors show: index arithmetic beyond 2^31, and memory that does not grow with pairs.

Results are checked where they are known: rows that are all alike, rows planted at the far end of a tensor, a few rows
against the definition. Without a GPU the same code runs on small tensors, whose memory is not looked at.
"""

import math
from collections.abc import Callable

import pytest
import torch
from gpu_cases import DEVICE, F64, ON_GPU
from torch import Tensor

from fastret import functional as F
from fastret import ops
from fastret.backends import registry
from fastret.ops import Head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning"),
]

MANY = 65_536 if ON_GPU else 64  # rows, of which all pairs are 2^32
BANK = (1 << 24) + 1000 if ON_GPU else 300  # rows of 128 features: over 2^31 numbers
WIDTH = 128 if ON_GPU else 16
ROOM = 40 << 30  # bytes of GPU memory that the largest tests need
MIB = 1 << 20
PROBED = 16
WORKSPACE = 128 * MIB  # FASTRET_WORKSPACE's default: blocks of scores that are not O(N), but bounded

needs_room = pytest.mark.skipif(
    ON_GPU and torch.cuda.mem_get_info()[0] < ROOM, reason=f"needs {ROOM >> 30} GiB of free GPU memory"
)


def implementations(op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """With kernels; where there is none yet, the tiles that serve."""
    call = registry.Call(op, DEVICE, dtype)
    found = [name for name in ("triton", "cuda") if name in registry.IMPLEMENTATIONS]
    return [name for name in found if registry.IMPLEMENTATIONS[name].unsupported(call) is None] or ["tiled"]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Made on the device, where it may be large."""
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=dtype)


def bank_of(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Filled a part at a time: float32 numbers of all of it would take as much memory again."""
    bank = torch.zeros(BANK, WIDTH, device=DEVICE, dtype=dtype)
    for k, part in enumerate(bank.split(1 << 20)):
        part.copy_(random(*part.shape, seed=k))
    return bank


def far_rows(count: int) -> Tensor:
    """Places at the far end of the bank and at its beginning."""
    places = torch.arange(count, device=DEVICE)
    return torch.where(places % 2 == 0, BANK - 1 - places, places)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.to(F64) - expected.to(F64)).norm() / expected.to(F64).norm()).item()


@pytest.mark.parametrize("impl", implementations("masked_lse"))
def test_log_sum_exp_of_rows_that_are_all_alike(impl: str) -> None:
    """lse = log N + 1 / tau in every row; the gradient of a unit row is along it, so that nothing is left of it."""
    x = torch.ones(MANY, WIDTH, device=DEVICE).requires_grad_()
    loss = F.info_nce(x, x.detach(), temperature=0.1, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(MANY)), rtol=1e-5, atol=1e-5)
    assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("impl", implementations("masked_lse"))
def test_a_few_of_many_rows(impl: str) -> None:
    """Of N x N pairs: losses of the first and last rows, and the gradient that reaches them as rows and as columns."""
    x = random(MANY, 32, seed=1).requires_grad_()
    probed = torch.cat([torch.arange(PROBED // 2), torch.arange(MANY - PROBED // 2, MANY)]).to(DEVICE)
    weight = torch.zeros(MANY, device=DEVICE).index_fill(0, probed, 1.0)
    loss = F.info_nce(x, x.detach().roll(1, 0), temperature=0.2, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(loss @ weight, x)
    few = x.detach()[probed].to(F64).requires_grad_()
    exact = F.info_nce(few, x.detach().roll(1, 0).to(F64), probed, temperature=0.2, reduction="none", impl="reference")
    (expected,) = torch.autograd.grad(exact.sum(), few)
    assert relative(loss.detach()[probed], exact.detach()) < 1e-5
    assert relative(gradient[probed], expected) < 1e-4
    others = weight == 0
    assert not gradient[others].any()


@pytest.mark.parametrize("impl", implementations("rank_sums"))
def test_ranks_among_many_rows(impl: str) -> None:
    """All scores of a query are alike: it ranks in the middle, half a step behind each competitor."""
    x = torch.ones(MANY, 32, device=DEVICE).requires_grad_()
    labels = torch.arange(MANY, device=DEVICE) // 4
    ranks = ops.rank_sums(x, labels, temperature=0.05, samples_per_class=4, impl=impl)
    torch.testing.assert_close(ranks.rank_all, torch.full_like(ranks.rank_all, 1 + (MANY - 1) / 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(ranks.rank_pos, torch.full_like(ranks.rank_pos, 1 + 3 / 2), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad((ranks.rank_pos / ranks.rank_all).sum(), x)
    assert gradient.abs().max() < 1e-3


@pytest.mark.parametrize("impl", implementations("rank_sums"))
def test_ranks_of_a_few_of_many_rows(impl: str) -> None:
    x = random(MANY, 32, seed=2)
    labels = torch.arange(MANY, device=DEVICE) // 4
    ranks = ops.rank_sums(x, labels, temperature=0.2, samples_per_class=4, impl=impl)
    last = torch.arange(MANY - 4, MANY, device=DEVICE)
    exact = ops.rank_sums(
        x[last].to(F64), labels[last], x.to(F64), labels, temperature=0.2, samples_per_class=4, impl="reference"
    )
    assert relative(ranks.rank_all.view(MANY, 4)[last], exact.rank_all.view(4, 4)) < 1e-4


@needs_room
@pytest.mark.parametrize("impl", implementations("masked_lse", torch.bfloat16))
def test_log_sum_exp_over_a_bank_beyond_32_bits(impl: str) -> None:
    """The target is far behind the 2^31st number; the sum is compared with that of pieces of the bank."""
    bank, index = bank_of(), far_rows(PROBED)
    x = bank[index] + random(PROBED, WIDTH, seed=99).to(bank.dtype)
    ((lse, t),) = ops.masked_lse(x, bank, heads=[Head(0.3, target=ops.Indexed(index))], normalize=False, impl=impl)
    wide = x.to(F64)
    exact = torch.stack([(0.3 * wide @ part.to(F64).T).logsumexp(1) for part in bank.split(1 << 18)]).logsumexp(0)
    torch.testing.assert_close(lse.to(F64), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.to(F64), 0.3 * (wide * bank[index].to(F64)).sum(1), rtol=1e-4, atol=1e-4)


@needs_room
@pytest.mark.parametrize("impl", implementations("sampled_dot", torch.bfloat16))
def test_rows_of_a_bank_beyond_32_bits(impl: str) -> None:
    bank, index = bank_of(), far_rows(PROBED * 8).view(PROBED, 8)
    x = random(PROBED, WIDTH, seed=98, dtype=torch.bfloat16).requires_grad_()
    scores = ops.sampled_dot(x, bank, index=index, impl=impl)
    exact = (x.detach().to(F64)[:, None] * bank[index].to(F64)).sum(2)
    assert relative(scores.detach(), exact) < 1e-5
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert relative(gradient, bank[index].to(F64).sum(1)) < 2**-7


@needs_room
@pytest.mark.parametrize("impl", implementations("topk", torch.bfloat16))
def test_neighbours_in_a_gallery_beyond_32_bits(impl: str) -> None:
    """A planted copy at the far end is found; 16 rows, since tiles of PyTorch may serve."""
    gallery, index = bank_of(), far_rows(PROBED)
    _, found = ops.topk(gallery[index], gallery, k=1, metric="l2", impl=impl)
    assert torch.equal(found[:, 0], index)


@needs_room
@pytest.mark.parametrize("impl", implementations("soft_assign", torch.bfloat16))
def test_more_than_2_to_the_31_numbers_are_assigned(impl: str) -> None:
    x = bank_of()
    codebook = random(WIDTH // 16, 16, 16, seed=97)
    result = ops.soft_assign(x, codebook, 0.5, impl=impl)
    last = slice(BANK - PROBED, BANK)
    exact = ops.soft_assign(x[last].to(F64), codebook.to(F64), 0.5, impl="reference")
    assert result.soft is not None
    assert exact.soft is not None
    assert relative(result.soft[last], exact.soft) < 2**-7


def peak(run: Callable[[], object]) -> int:
    """Bytes at the peak of a call, beyond what was there before; 0 without a GPU."""
    run()
    if not ON_GPU:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("impl", implementations("masked_lse"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["InfoNCE", "SupCon", "CLIP"])
def test_memory_of_contrastive_losses(loss: str, dtype: torch.dtype, impl: str) -> None:
    """Rows and their gradients a few times over; a matrix of scores would take 4 GiB."""
    n = MANY // 2
    x, y = (random(n, WIDTH, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    labels = torch.arange(n, device=DEVICE) // 8
    calls: dict[str, Callable[[], Tensor]] = {
        "InfoNCE": lambda: F.info_nce(x, y, impl=impl),
        "SupCon": lambda: F.sup_con(x, labels, impl=impl),
        "CLIP": lambda: F.clip(x, y, 0.1, impl=impl),
    }
    leaves = (x,) if loss == "SupCon" else (x, y)
    used = peak(lambda: torch.autograd.grad(calls[loss](), leaves))
    assert used <= WORKSPACE + 16 * n * WIDTH * 4, f"{used / MIB:.0f} MiB"


@pytest.mark.parametrize("impl", implementations("rank_sums"))
def test_memory_of_smooth_ap(impl: str) -> None:
    n, labels = MANY // 4, torch.arange(MANY // 4, device=DEVICE) // 4
    x = random(n, WIDTH, seed=1).requires_grad_()
    used = peak(
        lambda: torch.autograd.grad(F.smooth_ap(x, labels, temperature=0.05, samples_per_class=4, impl=impl), x)
    )
    assert used <= WORKSPACE + 16 * n * WIDTH * 4, f"{used / MIB:.0f} MiB"


@pytest.mark.parametrize("impl", implementations("masked_lse"))
def test_memory_of_proxies(impl: str) -> None:
    """No B x C logits, which are 32 times as large as the proxies. Counted, in copies of the proxies (256 MiB): their
    gradient, and without kernels of ours unit rows, their gradient, what projects it and its result: 1 or 5, and
    numbers a class, 1/4. With the workspace, another copy would be too much."""
    batch, count = (2048, 1 << 20) if ON_GPU else (32, 64)
    x, proxies = random(batch, 64, seed=1).requires_grad_(), random(count, 64, seed=2).requires_grad_()
    labels = torch.arange(batch, device=DEVICE) % count
    used = peak(lambda: torch.autograd.grad(F.proxy_nca(x, proxies, labels, impl=impl), (x, proxies)))
    copies = 1.25 if impl == "triton" else 5.25
    assert used <= WORKSPACE + copies * count * 64 * 4, f"{used / MIB:.0f} MiB"


@pytest.mark.parametrize("impl", implementations("soft_assign"))
def test_memory_of_assignment(impl: str) -> None:
    """No scores of all words: 8 books of 256 words would take 512 MiB."""
    n = MANY
    x = random(n, 128, seed=1).requires_grad_()
    codebook = random(8, 256 if ON_GPU else 16, 16, seed=2).requires_grad_()
    used = peak(lambda: torch.autograd.grad(F.soft_pq(x, codebook, 0.5, impl=impl).sum(), (x, codebook)))
    assert used <= 4 * n * 128 * 4 + 64 * MIB, f"{used / MIB:.0f} MiB"
