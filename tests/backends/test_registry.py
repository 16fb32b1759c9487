"""Which implementation serves a call: explicit choices raise, "auto" falls back, and the report says why."""

import os
import subprocess
import sys

import pytest
import torch

import fastret
from fastret.backends import registry
from fastret.functional import smooth_ap

X, L = torch.randn(6, 4), torch.arange(6) // 2


def chosen(device: str = "cpu", dtype: torch.dtype = torch.float32, impl: str | None = None) -> str:
    return registry.resolve("rank_sums", device, dtype, impl)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_auto_takes_the_fastest_that_serves() -> None:
    assert chosen() == "cpu"
    assert chosen("mps") == "tiled"
    assert chosen("cuda") == (
        "triton" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else "tiled"
    )
    assert {"cpu", "tiled", "reference"} <= set(fastret.available_backends())


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_environment", "reference")
    assert chosen() == "reference"
    with fastret.backend("tiled"):
        assert chosen() == "tiled"
        assert chosen(impl="cpu") == "cpu"
        with fastret.backend("auto"):
            assert chosen() == "cpu"
        assert chosen() == "tiled"
    assert chosen() == "reference"


def test_context_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), fastret.backend("tiled"):
        raise RuntimeError("inside")
    assert chosen() == "cpu"


def test_explicit_choice_that_cannot_serve() -> None:
    with pytest.raises(ValueError, match="impl='cpu' cannot serve this call: cpu runs on cpu, not on mps"):
        chosen("mps", impl="cpu")
    with pytest.raises(ValueError, match=r"cpu takes .*float16, not torch.int64"):
        chosen(dtype=torch.int64, impl="cpu")
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .*got 'cudnn'"), fastret.backend("cudnn"):
        pass
    assert "tiled has no histogram_sums" in str(
        registry.IMPLEMENTATIONS["tiled"].unsupported(registry.Call("histogram_sums", "cpu", torch.float32))
    )


def test_compiled_triton_kernels_take_no_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="compiled Triton kernels run on cuda, not on cpu"):
        chosen(impl="triton")
    assert chosen("cuda") == "triton"
    assert chosen() == "cpu"


def test_context_reaches_the_loss_and_its_backward() -> None:
    x = X.clone().requires_grad_()
    with fastret.backend("tiled"):
        loss = smooth_ap(x, L)
    loss.backward()  # by the implementation of its forward
    torch.testing.assert_close(x.grad, torch.autograd.grad(smooth_ap(x, L, impl="cpu"), x)[0])


def test_environment_variable() -> None:
    code = (
        "import torch, fastret; from fastret.backends import registry\n"
        "print(registry.resolve('rank_sums', 'cpu', torch.float32, None))"
    )
    assert run(code, FASTRET_IMPL="tiled").stdout.strip() == "tiled"
    wrong = run(code, FASTRET_IMPL="fast")
    assert wrong.returncode != 0
    assert "FASTRET_IMPL: expected one of" in wrong.stderr


def test_without_the_extension_tiles_serve() -> None:
    """And without packages that losses do not need."""
    code = (
        "import sys; sys.modules.update({'fastret._C': None, 'tqdm': None, 'safetensors': None})\n"
        "import torch, fastret\n"
        "x, l = torch.randn(8, 4), torch.arange(8) // 2\n"
        "a, b = fastret.functional.smooth_ap(x, l), fastret.functional.smooth_ap(x, l, impl='reference')\n"
        "assert 'cpu' not in fastret.available_backends(), fastret.available_backends()\n"
        "torch.testing.assert_close(a, b)\n"
        "print(fastret.env_report())\n"
        "fastret.functional.smooth_ap(x, l, impl='cpu')\n"
    )
    done = run(code)
    assert "cpu: not available: the C++ extension is not built" in done.stdout, done.stderr
    assert "rank_sums on cpu: tiled" in done.stdout
    assert "ValueError: impl='cpu' cannot serve this call: the C++ extension is not built" in done.stderr


def test_report() -> None:
    report = fastret.env_report()
    assert f"fastret {fastret.__version__}" in report
    assert f"torch {torch.__version__}" in report
    assert "rank_sums on cpu: cpu" in report
    for name in registry.IMPLEMENTATIONS:
        assert f"  {name}: " in report
