"""NPID: the loss, its gradient, Z and the bank as the released code computes them, its state, and its errors."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastret
from fastret.backends.sampling import Draws
from fastret.ops import update_rows_

F64 = torch.float64
C, B, D, K = 23, 6, 5, 9


class Official:
    """One step of the released code, in float64, given what it drew."""

    def __init__(self, memory: Tensor, temperature: float = 0.07, momentum: float = 0.5, eps: float = 1e-7) -> None:
        self.memory, self.temperature, self.momentum, self.eps = memory.double().clone(), temperature, momentum, eps
        self.Z = -1.0

    def step(self, x: Tensor, index: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, gradient of x); the bank is updated."""
        x = x.detach().double().requires_grad_()
        columns = torch.cat([index[:, None], noise], 1)
        weight = self.memory[columns]
        out = torch.bmm(weight, x[:, :, None])[:, :, 0] / self.temperature
        out = out.exp()
        if self.Z < 0:
            self.Z = float(out.detach().mean() * len(self.memory))
        P = out / self.Z
        c0 = K / len(self.memory)
        ln_pmt = (P[:, 0] / (P[:, 0] + c0 + self.eps)).log()
        ln_pon = (c0 / (P[:, 1:] + c0 + self.eps)).log()
        loss = -(ln_pmt.sum() + ln_pon.sum()) / len(x)
        (gradient,) = torch.autograd.grad(loss, x)
        row = self.momentum * self.memory[index] + (1 - self.momentum) * x.detach()
        self.memory[index] = row / row.norm(dim=1, keepdim=True)
        return loss.detach(), gradient


def noise_of(npid: fastret.NPID, rows: int) -> Tensor:
    return Draws(npid.num_noise, npid.draws.clone()).columns(rows, npid.bank.size)


def batch(seed: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(B, D, generator=generator, dtype=dtype))
    return x.requires_grad_(), torch.randperm(C, generator=generator)[:B]


@pytest.mark.parametrize("impl", ["reference", "tiled", None])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_three_steps_of_the_released_code(impl: str | None, temperature: float) -> None:
    npid = fastret.NPID(C, D, num_noise=K, temperature=temperature, dtype=F64, seed=5, impl=impl)
    official = Official(npid.bank.memory, temperature)
    drawn = []
    for step in range(3):
        x, index = batch(step)
        drawn.append(noise_of(npid, B))
        loss, gradient = official.step(x, index, drawn[-1])
        mine = npid(x, index)
        mine.backward()
        torch.testing.assert_close(mine.detach(), loss)
        torch.testing.assert_close(x.grad, gradient)
        torch.testing.assert_close(npid.bank.memory, official.memory)
        torch.testing.assert_close(float(npid.log_Z), math.log(official.Z), rtol=1e-7, atol=0)
        official.Z = float(npid.log_Z.double().exp())  # which is kept in float32
    assert not torch.equal(drawn[0], drawn[1])


def test_conventions_of_articles() -> None:
    """One Z a place in the batch, no eps, weights exchanged, updated by hand."""
    npid = fastret.NPID(
        C, D, num_noise=K, momentum=0.2, convention="new", eps=0.0, update="manual", Z_rows=B, init="normal", dtype=F64
    )
    torch.testing.assert_close(npid.bank.memory.norm(dim=1), torch.ones(C, dtype=F64))
    memory = npid.bank.memory.clone()
    Z = None
    for step in range(2):
        x, index = batch(step)
        scores = (memory[torch.cat([index[:, None], noise_of(npid, B)], 1)] @ x[:, :, None])[:, :, 0]
        likelihood = (scores / 0.07).exp()
        if Z is None:
            Z = (likelihood.mean(1, keepdim=True) * C).detach()
        P, c = likelihood / Z, K / C
        expected = -((P[:, 0] / (P[:, 0] + c)).log().sum() + (c / (P[:, 1:] + c)).log().sum()) / B
        loss = npid(x, index)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)  # Z is kept in float32
        loss.backward()
        assert torch.equal(npid.bank.memory, memory)
        npid.update_(x, index)
        row = 0.2 * x.detach() + 0.8 * memory[index]
        memory[index] = row / row.norm(dim=1, keepdim=True)
        torch.testing.assert_close(npid.bank.memory, memory)
    with pytest.raises(ValueError, match=r"x: expected 6 rows, one for each Z .*got 4"):
        npid(x[:4], index[:4])


def test_functional_form_with_noise_given_and_a_bank_that_learns() -> None:
    x, index = batch(0)
    bank, noise = torch.randn(C, D, dtype=F64).requires_grad_(), torch.randint(0, C, (B, K))

    for Z in (12.5, torch.tensor(12.5, dtype=F64), torch.rand(B, dtype=F64) + 1):
        expected = _dense(x, bank, index, noise, torch.as_tensor(Z, dtype=F64).expand(B))
        losses = fastret.functional.nce(x, bank, index, noise, temperature=0.3, Z=Z, reduction="none")
        torch.testing.assert_close(losses, expected)
        mine, theirs = (torch.autograd.grad(7 * v.sum(), (x, bank), retain_graph=True) for v in (losses, expected))
        torch.testing.assert_close(mine, theirs)
        module = fastret.NCELoss(0.3, Z=Z)
        assert list(module.state_dict()) == (["Z"] if isinstance(Z, Tensor) else [])
        torch.testing.assert_close(module(x, bank, index, noise), expected.mean())


def _dense(x: Tensor, bank: Tensor, index: Tensor, noise: Tensor, Z: Tensor) -> Tensor:
    losses = []
    for i in range(B):
        P = ((bank[torch.cat([index[i : i + 1], noise[i]])] @ x[i]) / 0.3).exp() / Z[i]
        c = K / C + 1e-7
        losses.append(-(P[0] / (P[0] + c)).log() - (K / C / (P[1:] + c)).log().sum())
    return torch.stack(losses)


def test_far_scores_neither_overflow_nor_lose_their_slope() -> None:
    x = torch.full((1, 4), 1.0).requires_grad_()
    bank = torch.full((3, 4), 1.0)
    loss = fastret.functional.nce(x, bank, torch.tensor([0]), torch.tensor([[1, 2]]), temperature=0.01, Z=1.0)
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(x.grad, torch.full((1, 4), 200.0))  # two noise scores, each with slope 1 / 0.01


def test_rows_that_are_no_unit_rows_leave_a_normaliser_that_is_finite() -> None:
    npid = fastret.NPID(1000, 128, num_noise=64)
    loss = npid(30 * torch.randn(16, 128), torch.arange(16))
    assert loss.isfinite()
    assert npid.log_Z.isfinite()


def test_a_run_that_goes_on_is_the_run_that_never_stopped() -> None:
    npid = fastret.NPID(C, D, num_noise=K)
    x, index = batch(0, torch.float32)
    npid(x, index).backward()
    file = io.BytesIO()
    torch.save(npid.state_dict(), file)
    file.seek(0)
    again = fastret.NPID(C, D, num_noise=K, seed=9)
    again.load_state_dict(torch.load(file))
    results = []
    for run in (npid, again):
        x, index = batch(1, torch.float32)
        loss = run(x, index)
        loss.backward()
        results.append((loss.detach(), x.grad, run.bank.memory, run.log_Z, run.draws))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_neither_evaluation_nor_no_grad_leaves_a_trace() -> None:
    npid = fastret.NPID(C, D, num_noise=K).eval()
    before = copy.deepcopy(npid.state_dict())
    x, index = batch(0, torch.float32)
    npid(x, index).backward()
    torch.testing.assert_close(dict(npid.state_dict()), dict(before), rtol=0, atol=0, equal_nan=True)
    npid.train()
    with torch.no_grad():
        loss = npid(x, index)
    torch.testing.assert_close(dict(npid.state_dict()), dict(before), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(loss, npid(x, index).detach())  # of a Z of its own, as the first in training
    assert npid.log_Z.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bank_of_half_precision_and_autocast(dtype: torch.dtype) -> None:
    npid = fastret.NPID(C, D, num_noise=K, dtype=dtype)
    x, index = batch(0, torch.float32)
    memory = npid.bank.memory.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = npid(x, index)
    expected, gradient = Official(memory).step(x, index, Draws(K, torch.tensor(0)).columns(B, C))
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-4, atol=1e-4)
    assert npid.bank.memory.dtype == dtype


def test_compiles_with_manual_updates_and_refuses_the_other() -> None:
    x, index = batch(0, torch.float32)
    npid = fastret.NPID(C, D, num_noise=K, update="manual")
    eager = copy.deepcopy(npid)
    torch._dynamo.reset()
    compiled = torch.compile(npid, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        loss, expected = compiled(x, index), eager(x, index)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))
        npid.update_(x, index)
        eager.update_(x, index)
    assert torch.equal(npid.bank.memory, eager.bank.memory)
    assert torch.equal(npid.draws, eager.draws)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # it says so of what runs after the error
@pytest.mark.parametrize("build", [lambda: fastret.NPID(C, D), lambda: fastret.NCEAverage(D, C, K)])
def test_updates_in_backward_refuse_to_compile_and_run_once(build: Callable[[], torch.nn.Module]) -> None:
    x, index = batch(0, torch.float32)
    module = build()
    for fullgraph, error in ((True, torch._dynamo.exc.Unsupported), (False, NotImplementedError)):
        for nested in (False, True):
            torch._dynamo.reset()
            step = (lambda x, index: module(x * 1, index) * 2) if nested else module
            with pytest.raises(error, match=r"update='manual'\)? compiles"):
                torch.compile(step, fullgraph=fullgraph, backend="aot_eager")(x, index)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: module(x, index).sum())(x)
    loss = module(x, index).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_func_in_evaluation() -> None:
    x, index = batch(0, torch.float32)
    npid = fastret.NPID(C, D, num_noise=K, Z=3.0).eval()
    gradient = torch.func.grad(lambda x: npid(x, index))(x.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(npid(x, index), x)[0])


def test_two_losses_before_one_backward_are_an_error_not_a_wrong_gradient() -> None:
    npid = fastret.NPID(C, D, num_noise=K)
    total = sum(npid(*batch(step, torch.float32)) for step in range(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_modules_of_the_released_code() -> None:
    average, criterion = fastret.NCEAverage(D, C, K, 0.1, 0.4), fastret.NCECriterion(C)
    official = Official(average.memory, 0.1, 0.4)
    for step in range(3):
        x, index = batch(step, torch.float32)
        noise = Draws(K, average.draws.clone()).columns(B, C)
        expected, gradient = official.step(x, index, noise)
        P = average(x, index)
        assert P.shape == (B, K + 1)
        loss = criterion(P, index)
        assert loss.shape == (1,)
        loss.backward()
        torch.testing.assert_close(loss[0].detach().double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(average.memory.double(), official.memory, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(float(average.params[2]), official.Z, rtol=1e-5, atol=0)
    again = fastret.NCEAverage(D, C, K, 0.1, 0.4)
    again.load_state_dict(average.state_dict())
    x, index = batch(3, torch.float32)
    assert torch.equal(average(x, index), again(x, index))
    theirs = {name: average.state_dict()[name] for name in ("memory", "params")}
    again.load_state_dict(theirs)  # of the released code, which draws noise anew
    assert int(again.draws) == 0
    assert average.params[[0, 1, 3]].tolist() == pytest.approx([K, 0.1, 0.4])


def test_linear_average() -> None:
    average = fastret.LinearAverage(D, C, 0.2, 0.5)
    memory = average.memory.clone()
    x, index = batch(0, torch.float32)
    logits = average(x, index)
    torch.testing.assert_close(logits, x @ memory.T / 0.2)
    torch.nn.functional.cross_entropy(logits, index).backward()
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ memory.T / 0.2, index), x)
    torch.testing.assert_close(x.grad, expected)
    rows = torch.nn.functional.normalize(0.5 * memory[index] + 0.5 * x.detach())
    torch.testing.assert_close(average.memory[index], rows)


def test_what_is_kept_for_backward_is_no_gather() -> None:
    npid = fastret.NPID(50_000, 16, num_noise=4096)
    x = torch.nn.functional.normalize(torch.randn(32, 16)).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        npid(x, torch.arange(32))
    others = [t for t in kept if t.data_ptr() != npid.bank.memory.data_ptr()]
    assert max(t.numel() for t in others) <= 32 * 4097


def test_a_queue() -> None:
    bank = fastret.MemoryBank(5, 2, init="zeros")
    rows = torch.arange(1.0, 15.0).reshape(7, 2)
    bank.enqueue_(rows[:3], torch.tensor([10, 11, 12]))
    assert int(bank.filled) == 3
    assert bank.labels.tolist() == [10, 11, 12, -1, -1]
    bank.enqueue_(rows[3:7], torch.tensor([13, 14, 15, 16]))
    unit = torch.nn.functional.normalize(rows)
    torch.testing.assert_close(bank.memory, unit[[5, 6, 2, 3, 4]])
    assert bank.labels.tolist() == [15, 16, 12, 13, 14]
    assert (int(bank.filled), int(bank.pointer)) == (5, 2)
    raw = fastret.MemoryBank(4, 2, normalize=False, init="zeros").enqueue_(rows[:1])
    assert raw.memory[0].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="x: expected at most 5 rows, the size of the queue, got 7"):
        bank.enqueue_(rows)


def test_initial_rows() -> None:
    uniform = fastret.MemoryBank(4000, 12).memory
    bound = math.sqrt(3 / 12)
    assert uniform.abs().max() <= bound
    assert uniform.abs().max() > 0.99 * bound
    assert abs(float(uniform.square().sum(1).mean()) - 1) < 0.02


I = torch.tensor([0, 1])  # noqa: E741


def nce(index: Tensor = I, noise: Tensor = I[:, None], Z: Any = 1.0, bank: Tensor | None = None) -> Tensor:
    bank = torch.ones(C, D) if bank is None else bank
    return fastret.functional.nce(torch.ones(2, D), bank, index, noise, Z=Z)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastret.NPID(C, D, num_noise=0), ValueError, "num_noise: expected at least 1, got 0"),
        (lambda: fastret.NCEAverage(D, C, 0), ValueError, "K: expected at least 1, got 0"),
        (lambda: fastret.LinearAverage(D, C, -1.0), ValueError, "T: expected a positive"),
        (lambda: nce(index=I + C), ValueError, "index: expected numbers from 0 to 22"),
        (lambda: nce(noise=I[:, None] - 1), ValueError, "noise: expected numbers from 0 to 22, got -1"),
        (lambda: nce(noise=I[:, None][:, :0]), ValueError, r"noise: expected shape \(2, K\) with K >= 1"),
        (lambda: nce(Z=torch.ones(3)), ValueError, r"Z: expected shape \(2,\)"),
        (lambda: fastret.LinearAverage(D, C)(torch.ones(2, D), I + C), ValueError, "y: expected numbers from 0 to 22"),
        (lambda: fastret.LinearAverage(D, C)(torch.ones(2, 4), I), ValueError, "x: expected 5 columns like the memory"),
        (lambda: fastret.NPID(0, D), ValueError, "size: expected at least 1"),
        (lambda: fastret.NPID(C, D, temperature=0), ValueError, "temperature: expected a positive"),
        (lambda: fastret.NPID(C, D, eps=-1), ValueError, "eps: expected a number of at least 0"),
        (lambda: fastret.NPID(C, D, momentum=2), ValueError, "momentum: expected a number from 0 to 1"),
        (lambda: fastret.NPID(C, D, update="never"), ValueError, "update: expected one of backward, manual"),
        (lambda: fastret.NPID(C, D, Z=-2.0), ValueError, "Z: expected a positive"),
        (lambda: fastret.NPID(C, D, seed=2**32), ValueError, "seed: expected a number below"),
        (lambda: fastret.NPID(C, D, init="ones"), ValueError, "init: expected one of uniform"),
        (lambda: fastret.NPID(C, D)(torch.ones(2, 4), I), ValueError, "x: expected 5 columns like the bank, got 4"),
        (lambda: fastret.NPID(C, D)(torch.ones(2, D), I + C - 1), ValueError, "index: expected numbers from 0 to 22"),
        (lambda: fastret.MemoryBank(C, D).enqueue_(torch.ones(2, 4)), ValueError, "5 columns like the memory, got 4"),
        (lambda: nce(Z=torch.tensor([1.0, -2.0])), ValueError, "Z: expected positive finite numbers, got -2"),
        (lambda: nce(Z=torch.tensor([1.0, math.nan])), ValueError, "Z: expected positive finite numbers, got nan"),
        (lambda: nce(bank=torch.ones(0, D)), ValueError, "bank: expected at least one row, got none"),
        (lambda: nce(bank=torch.ones(C, 4)), ValueError, "bank: expected 5 columns like x, got 4"),
        (lambda: update_rows_(torch.ones(0, D), I, torch.ones(2, D)), ValueError, "bank: expected at least one row"),
        (lambda: fastret.LinearAverage(D, C)(torch.ones(2, D).double(), I), TypeError, "x: expected float64 exactly"),
        (lambda: fastret.NCEAverage(D, C, K)(torch.ones(2, D).double(), I), TypeError, "x: expected float64 exactly"),
    ],
)
def test_bad_input_names_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
