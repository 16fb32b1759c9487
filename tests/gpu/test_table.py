"""Keeps the table of the GPU tests alive where there is no GPU: three entries, interpreted."""

import dataclasses

import pytest
from gpu_cases import CASES, check

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (exp2|log2|multiply|subtract):RuntimeWarning")


@pytest.mark.parametrize(("name", "precision"), [("SmoothAP", "fp32"), ("InfoNCE", "bf16"), ("patchmix", "fp32")])
def test_entries_agree_with_the_reference(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, precision, monkeypatch)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is 1 % off."""
    right = CASES["pair_dot"].call

    def wrong(*leaves: object, impl: str) -> object:
        result = right(*leaves, impl=impl)
        return result if impl == "reference" else result + 0.01 * (result - result.detach())

    monkeypatch.setitem(CASES, "pair_dot", dataclasses.replace(CASES["pair_dot"], call=wrong))
    with pytest.raises(AssertionError, match=r"pair_dot, .*gradient 1: off by"):
        check("pair_dot", "fp32", monkeypatch)
