"""When the CUDA kernels serve a call, and what reaches them."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastret
from fastret.backends import choices, cuda, registry
from fastret.backends.cuda.launch import array
from fastret.ops import sampled_dot

X = torch.randn(4, 6)


def test_chosen_where_it_is_measured_only(emulation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def candidates(op: str, device: str) -> list[str]:
        return [impl.name for impl in registry.candidates(registry.Call(op, device, torch.float32))]

    for op in ("sampled_dot", "knn_vote", "topk", "pq_topk"):
        assert "cuda" not in candidates(op, "cpu")
        assert candidates(op, "cuda").index("tiled") < candidates(op, "cuda").index("cuda")
    monkeypatch.setattr(choices, "measured_here", lambda op, index=None: ("cuda", "triton"))
    for op in ("sampled_dot", "knn_vote", "topk", "pq_topk"):
        assert "cuda" not in candidates(op, "cpu")
        assert candidates(op, "cuda")[0] == "cuda"
    assert "cuda" in fastret.available_backends()
    assert "cuda: CUDA C++ kernels (emulated)" in fastret.env_report()


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_extension", None)
    monkeypatch.setattr(cuda, "_import_error", "the CUDA extension is not built", raising=False)
    with pytest.raises(ValueError, match="impl='cuda' cannot serve this call: the CUDA extension is not built"):
        sampled_dot(X, X, count=2, seed=1, impl="cuda")
    with pytest.raises(RuntimeError, match="not built"):
        cuda.extension()
    monkeypatch.setattr(
        cuda, "_extension", SimpleNamespace(device_type="cuda", device_error=lambda: "too old a driver")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.missing() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.missing() == "the CUDA extension finds no device: too old a driver"
    monkeypatch.setattr(cuda, "_extension", SimpleNamespace(device_type="cuda", device_error=lambda: ""))
    with pytest.raises(ValueError, match="these CUDA kernels run on cuda, not on cpu"):
        sampled_dot(X, X, count=2, seed=1, impl="cuda")
    with pytest.raises(ValueError, match="cuda has no rank_sums"):
        registry.resolve("rank_sums", "cuda", torch.float32, "cuda")


def test_what_is_no_row_of_memory_is_refused(emulation: ModuleType) -> None:
    assert array(X[:, 1:4], "x")[1:4] == (4, 3, 6)
    for bad, message in ((X.t(), "unit stride"), (X[0, ::2], "unit stride"), (X[None], "unit stride")):
        with pytest.raises(ValueError, match=f"x: expected rows of {message}"):
            array(bad, "x")
    with pytest.raises(ValueError, match="x: expected a tensor on cpu, got one on meta"):
        array(X.to("meta"), "x")
    with pytest.raises(TypeError, match=r"x: the CUDA kernels do not take torch.complex64"):
        array(X.to(torch.complex64), "x")
