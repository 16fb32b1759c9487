"""Which implementation serves an op: an explicit choice that cannot serve raises and says why, "auto" falls back.

An implementation is a folder of this package with one module per op (``backends/cpu/rank_sums.py``), imported when
first used. Its, and the module's, optional ``unsupported(call) -> str | None`` says why it cannot serve a call. The
choice is, in this order: the ``impl`` argument, ``with fastret.backend(...)``, the environment variable
``FASTRET_IMPL``, "auto".
"""

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from fastret.backends import choices
from fastret.backends.tracing import constant_result

AUTO = "auto"


@dataclass(frozen=True)
class Call:
    """What an implementation needs to know of a call to decide whether it can serve it.

    Attributes:
        device: its type.
        options: what is asked of the op beyond its plain form, that not every implementation has ("centers").
        index: which of the devices of that type; None: the current one.
    """

    op: str
    device: str
    dtype: torch.dtype
    options: tuple[str, ...] = ()
    index: int | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute every op.

    Attributes:
        name: the value of ``impl=`` that picks it, and its folder in this package.
        summary: what it is, for ``env_report``.
        devices: device types it runs on; empty: any.
        dtypes: dtypes of the rows it takes.
        automatic: device types for which "auto" may pick it, in the order of ``IMPLEMENTATIONS``; empty: any.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    automatic: tuple[str, ...] | None

    def missing(self) -> str | None:
        """Why it cannot run in this process at all, or None."""
        package = importlib.import_module(f"fastret.backends.{self.name}")
        reason: str | None = package.missing()
        return reason

    def describe(self) -> str:
        """How it was built and set up, where it has something to say."""
        package = importlib.import_module(f"fastret.backends.{self.name}")
        return str(package.describe()) if hasattr(package, "describe") else ""

    def module(self, op: str) -> ModuleType:
        return importlib.import_module(f"fastret.backends.{self.name}.{op}")

    def has(self, op: str) -> bool:
        return importlib.util.find_spec(f"fastret.backends.{self.name}.{op}") is not None

    def unsupported(self, call: Call) -> str | None:
        """Why it cannot serve this call, or None."""
        if not self.has(call.op):
            return f"{self.name} has no {call.op}"
        if self.devices and call.device not in self.devices:
            return f"{self.name} runs on {' and '.join(self.devices)}, not on {call.device}"
        if call.dtype not in self.dtypes:
            return f"{self.name} takes {', '.join(map(str, self.dtypes))}, not {call.dtype}"
        if (reason := self.missing()) is not None:
            return reason
        for owner in (importlib.import_module(f"fastret.backends.{self.name}"), self.module(call.op)):
            check = getattr(owner, "unsupported", None)
            refusal: str | None = check(call) if check else None
            if refusal is not None:
                return refusal
        return None


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# "auto" takes the first that serves the call, so the fastest stand first; on CUDA, choices.py has an order for each op.
IMPLEMENTATIONS: dict[str, Implementation] = {
    impl.name: impl
    for impl in (
        Implementation("triton", "Triton kernels", ("cuda", "cpu"), _FLOATS, ("cuda",)),
        Implementation("cpu", "C++ kernels", ("cpu",), _FLOATS, ("cpu",)),
        Implementation("cuda", "CUDA C++ kernels", ("cuda", "cpu"), _FLOATS, ("cuda",)),
        Implementation("tiled", "PyTorch in tiles, recomputed in backward", (), _FLOATS, ()),
        Implementation("reference", "dense PyTorch, the definition", (), _FLOATS, None),
    )
}

_chosen = threading.local()
_environment = os.environ.get("FASTRET_IMPL") or AUTO


def _check_name(name: object, where: str) -> str:
    if isinstance(name, str) and (name == AUTO or name in IMPLEMENTATIONS):
        return name
    raise ValueError(f"{where}: expected one of {', '.join((AUTO, *IMPLEMENTATIONS))}, got {name!r}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block (and thread), calls without ``impl=`` use this implementation.

    Args:
        name: "auto", "reference", "tiled", "cpu", "triton" or "cuda".

    Raises:
        ValueError: for another name.
    """
    _check_name(name, "backend")
    before = getattr(_chosen, "name", None)
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = before


def candidates(call: Call) -> list[Implementation]:
    """Implementations "auto" may pick for a call, fastest first, whether or not they can serve it."""
    found = [
        impl
        for impl in IMPLEMENTATIONS.values()
        if impl.automatic is not None and (not impl.automatic or call.device in impl.automatic)
    ]
    if call.device == "cuda":
        preferred = choices.order(call.op, call.index)
        found.sort(key=lambda impl: preferred.index(impl.name) if impl.name in preferred else len(preferred))
    return found


def resolve(
    op: str, device: torch.device | str, dtype: torch.dtype, impl: str | None, options: tuple[str, ...] = ()
) -> str:
    """Name of the implementation that serves rows of this dtype on this device, with these options of the op.

    Raises:
        ValueError: the name is unknown, or the explicit choice cannot serve the call.
        NotImplementedError: the explicit choice could serve it but for an option.
    """
    serving: str = _serving(op, device, dtype, chosen(impl), options)
    return serving


def chosen(impl: str | None) -> str:
    """The name that is asked for: by argument, by the surrounding ``backend``, by the environment, or "auto".

    Raises:
        ValueError: the name is unknown.
    """
    if impl is not None:
        return _check_name(impl, "impl")
    if (within := getattr(_chosen, "name", None)) is not None:
        return str(within)
    return _check_name(_environment, "FASTRET_IMPL")


@constant_result  # imports modules, which a traced function must not
def _serving(op: str, device: torch.device | str, dtype: torch.dtype, name: str, options: tuple[str, ...]) -> str:
    where = torch.device(device)
    call = Call(op, where.type, dtype, options, where.index)
    if name != AUTO:
        reason = IMPLEMENTATIONS[name].unsupported(call)
        if reason is not None:
            plain = IMPLEMENTATIONS[name].unsupported(replace(call, options=()))
            error = ValueError if plain is not None else NotImplementedError
            raise error(f"impl={name!r} cannot serve this call: {reason}")
        return name
    reasons = []
    for candidate in candidates(call):
        reason = candidate.unsupported(call)
        if reason is None:
            return candidate.name
        reasons.append(reason)
    raise ValueError(f"no implementation serves {op}: {'; '.join(reasons)}")


def available_backends() -> list[str]:
    """Names of the implementations that can run in this process."""
    return [name for name, impl in IMPLEMENTATIONS.items() if impl.missing() is None]
