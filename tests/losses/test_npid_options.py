"""NPID's options and states one by one: each reaches what it is for."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastret

F64 = torch.float64
C, B, D, K = 23, 6, 5, 9
INDEX = torch.tensor([3, 0, 22, 3, 7, 11])


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(B, D, dtype=F64)


def test_nce_normalises_and_reduces_as_it_is_told(x: Tensor) -> None:
    bank, noise = torch.randn(C, D, dtype=F64), torch.randint(0, C, (B, K))
    given = (bank, INDEX, noise)
    for options in ({"eps": 1e-7}, {"eps": 0.5}):
        a = (bank[torch.cat([INDEX[:, None], noise], 1)] @ normalize(x)[:, :, None])[:, :, 0] / 0.3
        P, c = a.exp() / 4.0, K / C + options["eps"]
        rows = -(P[:, 0] / (P[:, 0] + c)).log() - (K / C / (P[:, 1:] + c)).log().sum(1)
        for reduction, expected in (("none", rows), ("sum", rows.sum()), ("mean", rows.mean())):
            chosen = {**options, "normalize": True, "reduction": reduction}
            found = fastret.functional.nce(x, *given, temperature=0.3, Z=4.0, **chosen)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(fastret.NCELoss(0.3, Z=4.0, **chosen)(x, *given), expected)
    raw = fastret.functional.nce(x, *given, temperature=0.3, Z=4.0)
    unit = fastret.functional.nce(normalize(x), *given, temperature=0.3, Z=4.0, normalize=False)
    assert abs(float(raw - unit)) > 0.1


def test_npid_takes_its_reduction_and_a_given_normaliser(x: Tensor) -> None:
    def npid(**options: object) -> fastret.NPID:
        torch.manual_seed(0)
        return fastret.NPID(C, D, num_noise=K, dtype=F64, normalize=True, seed=4, **options)

    rows = npid(Z=4.0, reduction="none")(x, INDEX)
    assert rows.shape == (B,)
    torch.testing.assert_close(npid(Z=4.0, reduction="sum")(x, INDEX), rows.sum())
    torch.testing.assert_close(npid(Z=4.0)(x, INDEX), rows.mean())
    module = npid(Z=4.0)
    module(x, INDEX)
    torch.testing.assert_close(float(module.Z), 4.0)
    found = npid()
    assert abs(float(found(x, INDEX) - rows.mean())) > 0.01
    assert abs(float(found.Z) - 4) > 0.1
    assert npid(Z=4.0, Z_rows=B).log_Z.tolist() == pytest.approx([math.log(4)] * B)


@pytest.mark.parametrize("duplicates", ["last", "first", "mean"])
def test_updates_obey_duplicates_and_normalize(duplicates: str, x: Tensor) -> None:
    rows = {"last": x[3], "first": x[0], "mean": (x[0] + x[3]) / 2}[duplicates]
    unit = {"last": normalize(x)[3], "first": normalize(x)[0], "mean": (normalize(x)[0] + normalize(x)[3]) / 2}
    old = {"duplicates": duplicates, "dtype": F64}
    bank = fastret.MemoryBank(C, D, momentum=0.3, **old)
    before = bank.memory[3].clone()
    bank.update_(INDEX, x)
    torch.testing.assert_close(bank.memory[3], normalize(0.3 * before + 0.7 * rows, dim=0))
    bank = fastret.MemoryBank(C, D, momentum=0.3, normalize=False, **old)
    before = bank.memory[3].clone()
    bank.update_(INDEX, x)
    torch.testing.assert_close(bank.memory[3], 0.3 * before + 0.7 * rows)
    npid = fastret.NPID(C, D, momentum=0.3, update="manual", normalize=True, **old)
    before = npid.bank.memory[3].clone()
    npid.update_(x, INDEX)
    torch.testing.assert_close(npid.bank.memory[3], normalize(0.3 * before + 0.7 * unit[duplicates], dim=0))


def test_rows_without_labels_forget_those_before_them() -> None:
    bank = fastret.MemoryBank(3, D)
    bank.enqueue_(torch.randn(3, D), torch.tensor([4, 5, 6])).enqueue_(torch.randn(2, D))
    assert bank.labels.tolist() == [-1, -1, 6]


@pytest.mark.parametrize("z_rows", [None, B])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e38])
def test_a_first_batch_that_overflows_sets_no_normaliser(z_rows: int | None, bad: float) -> None:
    rows = normalize(torch.randn(B, D))
    npid = fastret.NPID(C, D, num_noise=K, Z_rows=z_rows, init="normal")
    broken = rows.clone()
    broken[2] = bad * npid.bank.memory[INDEX[2]]  # its own score overflows
    npid(broken, INDEX)
    assert npid.log_Z.isnan().any()
    assert not npid.log_Z.isinf().any()
    if z_rows:
        assert npid.log_Z.isnan().tolist() == [i == 2 for i in range(B)]  # the others are known
    npid(rows, INDEX)
    assert npid.log_Z.isfinite().all()
    average = fastret.NCEAverage(D, C, K)
    average.memory.copy_(npid.bank.memory)
    average(broken, INDEX)
    assert average.params[2] == -1
    average(rows[:0], INDEX[:0])
    assert average.params[2] == -1
    assert average(rows, INDEX).isfinite().all()
    assert 0 < average.params[2] < math.inf


def test_an_infinite_normaliser_of_an_older_state_is_set_anew() -> None:
    rows = normalize(torch.randn(B, D))
    npid, average = fastret.NPID(C, D, num_noise=K), fastret.NCEAverage(D, C, K)
    npid.log_Z.fill_(math.inf)
    average.params[2] = math.inf
    npid(rows, INDEX)
    average(rows, INDEX)
    assert npid.log_Z.isfinite()
    assert average.params[2].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_normaliser_stays_float32(dtype: torch.dtype) -> None:
    many = 1_000_000 * math.exp(1 / 0.07)
    npid = fastret.NPID(C, D, num_noise=K, Z=many)
    average, linear = fastret.NCEAverage(D, C, K), fastret.LinearAverage(D, C)
    average.params[2] = many
    before = npid.log_Z.clone(), average.params.clone(), linear.params.clone()
    model = torch.nn.ModuleList([npid, average, linear]).to(dtype)
    after = npid.log_Z, average.params, linear.params
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(after, before, strict=True))
    assert npid.Z.isfinite()
    assert {t.dtype for t in (npid.bank.memory, average.memory, linear.memory)} == {dtype}
    rows = normalize(torch.randn(B, D)).to(dtype).requires_grad_()
    for module in model:
        value = module(rows, INDEX)
        value.sum().backward()
        assert value.isfinite().all()
    assert {"log_Z", "draws", "bank.memory"} < set(npid.state_dict())
    assert npid.to("meta").half().log_Z.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_average_of_half_precision_rows(dtype: torch.dtype) -> None:
    average = fastret.LinearAverage(D, C)
    rows = normalize(torch.randn(B, D)).to(dtype).requires_grad_()
    logits = average(rows, INDEX)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, rows.float() @ average.memory.T / 0.07)
    logits.sum().backward()
    assert rows.grad is not None
    assert rows.grad.dtype == dtype


def test_criterion_of_no_rows_is_zero() -> None:
    rows = torch.rand(0, K + 1).requires_grad_()
    loss = fastret.NCECriterion(C)(rows)
    assert loss.tolist() == [0.0]
    loss.backward()
