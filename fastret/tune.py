"""``fastret tune``: measures configurations of the Triton kernels, and implementations, on this machine's GPU.

For each entry of kernels/triton/config.py: from its default on, to the fastest of its neighbours (a block twice or half
as large, other warps, other stages) as long as one is faster. A neighbour whose results differ from the default's by
more than rounding is not considered. Then each op's implementations are timed against each other. What is found goes
into a table in the user's cache folder (kernels/triton/tuned.py), which every later process reads.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastret import functional as F
from fastret import ops
from fastret.backends import registry
from fastret.kernels.triton import config, tuned
from fastret.kernels.triton.tuned import Options, Table

LEAST_GAIN = 0.03  # by which a time has to fall: smaller differences are noise
ROUNDS = 4
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}

# Smallest and largest of what is varied. What is missing here is no matter of speed alone: SLICE, CHUNK and FACTORED.
_RANGES = {
    "BLOCK_M": (16, 256),
    "BLOCK_N": (16, 256),
    "BLOCK_K": (16, 128),
    "BLOCK_P": (4, 64),
    "BLOCK_S": (16, 128),
    "BLOCK_D": (32, 512),
    "BLOCK_W": (32, 512),
    "num_warps": (2, 16),
    "num_stages": (1, 5),
}
_WARP = 32  # threads
# Its tiles are square, and the same in every launch, so that thresholds meet the same scores.
_SQUARE = ("lse heavy",)

_ROWS = 4096

Call = Callable[[str], tuple[Tensor, ...]]  # of the name of an implementation
Timer = Callable[[Callable[[], object]], float]  # milliseconds


@dataclass(frozen=True)
class Workload:
    """A call whose time shows how good the configuration of a kernel is.

    Attributes:
        op: whose implementations it may be run by.
        make: from a dtype, a width and a device, the call.
    """

    op: str
    make: Callable[[torch.dtype, int, torch.device], Call]


def _rows(count: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(count, width, generator=generator, device=device).to(dtype)


def _differentiated(loss: Callable[..., Tensor], *leaves: Tensor) -> Call:
    def call(impl: str) -> tuple[Tensor, ...]:
        learned = [leaf.detach().requires_grad_() for leaf in leaves]
        value = loss(*learned, impl=impl)
        return (value.detach(), *torch.autograd.grad(value.sum(), learned))

    return call


def _smooth_ap(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    labels = torch.arange(_ROWS, device=device) // 4
    x = _rows(_ROWS, width, dtype, device)
    return _differentiated(lambda x, impl: F.smooth_ap(x, labels, samples_per_class=4, impl=impl), x)


def _info_nce(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x, y = (_rows(2 * _ROWS, width, dtype, device, seed) for seed in (0, 1))
    return _differentiated(lambda x, y, impl: F.info_nce(x, y, impl=impl), x, y)


def _info_nce_forward(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x, y = (_rows(2 * _ROWS, width, dtype, device, seed) for seed in (0, 1))
    return lambda impl: (F.info_nce(x, y, impl=impl),)


def _clip(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x, y = (_rows(2 * _ROWS, width, dtype, device, seed) for seed in (0, 1))
    return _differentiated(F.clip, x, y, torch.tensor(10.0, device=device))


def _mined(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    labels = torch.arange(_ROWS, device=device) // 4
    x = _rows(_ROWS, width, dtype, device)
    return _differentiated(lambda x, impl: F.multi_similarity(x, labels, mining_margin=0.1, impl=impl), x)


def _pairs(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x = _rows(_ROWS, width, dtype, device)
    row = torch.arange(16 * _ROWS, device=device) % _ROWS
    return _differentiated(lambda x, impl: ops.pair_dot(x, None, row, row.flip(0), impl=impl), x)


def _assigned(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x = _rows(2 * _ROWS, 8 * width, dtype, device)
    codebook = _rows(8 * 256, width, dtype, device, 1).view(8, 256, width)
    return _differentiated(lambda x, codebook, impl: F.soft_pq(x, codebook, 0.5, impl=impl), x, codebook)


def _noise(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x, bank = _rows(_ROWS // 16, width, dtype, device), _rows(64 * _ROWS, width, dtype, device, 1)
    return _differentiated(lambda x, impl: ops.sampled_dot(x, bank, count=_ROWS, seed=0, impl=impl), x)


def _mixed(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x = _rows(_ROWS, 48 * width, dtype, device).view(_ROWS, 48, width)
    permutation = torch.arange(48, device=device).flip(0)
    return lambda impl: (ops.patchmix(x, 1, 2, permutation=permutation, impl=impl),)


def _stored(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    """Rows too wide for fused gradients."""
    return _info_nce(dtype, 8 * width, device)


def _searched(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x, y = _rows(_ROWS // 4, width, dtype, device), _rows(16 * _ROWS, width, dtype, device, 1)
    return lambda impl: ops.topk(x, y, k=10, impl=impl)


def _scanned(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    x, codebook = _rows(_ROWS // 4, width, dtype, device), _rows(2048, width // 8, dtype, device, 1)
    codes = (torch.arange(128 * _ROWS, device=device) * 40503 >> 8).remainder(256).to(torch.uint8).view(-1, 8)
    return lambda impl: ops.pq_topk(x, codebook.view(8, 256, -1), codes, k=10, impl=impl)


def _voted(dtype: torch.dtype, width: int, device: torch.device) -> Call:
    scores = _rows(_ROWS, 200, torch.float32, device).sort(1, descending=True)[0]
    indices = torch.arange(_ROWS * 200, device=device).view(_ROWS, 200) % 5003
    place = torch.arange(5003, device=device) % 1000
    return lambda impl: ops.knn_vote(scores, indices, place, 1000, impl=impl)


# By the kind of kernel in config.py; a kind that has none here keeps its default, which is said.
WORKLOADS: dict[str, Workload] = {
    **dict.fromkeys(("scores", "sums", "gradient"), Workload("rank_sums", _smooth_ap)),
    **dict.fromkeys(("lse gradient", "lse weights"), Workload("masked_lse", _info_nce)),
    **dict.fromkeys(("lse two", "lse weights sums"), Workload("masked_lse", _clip)),
    "lse": Workload("masked_lse", _info_nce_forward),
    **dict.fromkeys(("lse heavy", "lse weights heavy"), Workload("row_extrema", _mined)),
    **dict.fromkeys(("pair scores", "pair gradient"), Workload("pair_dot", _pairs)),
    **dict.fromkeys(("assign", "assign rows", "assign words"), Workload("soft_assign", _assigned)),
    **dict.fromkeys(("sampled scores", "sampled gradient"), Workload("sampled_dot", _noise)),
    "patchmix": Workload("patchmix", _mixed),
    "strip": Workload("masked_lse", _stored),
}
# Ops without Triton kernels, of which the implementations alone are compared.
SELECTIONS = (Workload("topk", _searched), Workload("pq_topk", _scanned), Workload("knn_vote", _voted))


def neighbours(kind: str, options: Options) -> Iterator[dict[str, int]]:
    """Options that differ in one of them."""
    for option, value in options.items():
        if option not in _RANGES or (kind in _SQUARE and option in ("BLOCK_M", "BLOCK_N")):
            continue
        least, most = _RANGES[option]
        others = (value - 1, value + 1) if option == "num_stages" else (value // 2, value * 2)
        found = ({**options, option: other} for other in others if least <= other <= most)
        yield from (other for other in found if kind != "strip" or _fills_its_warps(other))


def _fills_its_warps(options: Options) -> bool:
    """Threads without an element of a stored tile would repeat those of others, and write them twice."""
    return options["BLOCK_M"] * options["BLOCK_N"] >= _WARP * options["num_warps"]


def search(kind: str, start: Options, milliseconds: Callable[[Options], float]) -> tuple[Options, float]:
    """The fastest options a walk from ``start`` finds, and their time; infinite: they cannot run."""
    best, fastest = start, milliseconds(start)
    seen = [dict(start)]
    for _ in range(ROUNDS):
        center = best
        for candidate in neighbours(kind, center):
            if candidate in seen:
                continue
            seen.append(candidate)
            time = milliseconds(candidate)
            if time < fastest * (1 - LEAST_GAIN):
                best, fastest = candidate, time
        if best is center:
            break
    return best, fastest


def tune(
    device: torch.device,
    timer: Timer,
    *,
    dtypes: Sequence[torch.dtype],
    kinds: Sequence[str] | None = None,
    report: Callable[[str], None] = print,
    save: Callable[[Table], object] = lambda table: None,
) -> Table:
    """Measures everything there is a workload for; ``report`` is told of each entry, and ``save`` gets what there is
    after it: a run of many minutes may be cut off."""
    architecture = config.architecture(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    table = Table(tuned.key(name, architecture))
    for kind, itemsize, options in config.entries(architecture):
        dtype = next((d for d in dtypes if d.itemsize == itemsize), None)
        if dtype is None or (kinds is not None and kind not in kinds):
            continue
        if kind not in WORKLOADS:
            report(f"{kind}: nothing to measure it with; it keeps its default")
            continue
        entry = tuned.name(kind, itemsize, options)
        call = WORKLOADS[kind].make(dtype, options.get("SLICE", 128), device)
        found, before, after = _tuned(kind, entry, options, call, timer, _TOLERANCE[dtype])
        if found != options and math.isfinite(after):
            table.options[entry] = dict(found)
            save(table)
        report(f"{entry}: {before:.3f} ms by default, {after:.3f} ms with {dict(found)}")
    # the first workload of an op stands for it
    for op, workload in {w.op: w for w in reversed((*WORKLOADS.values(), *SELECTIONS))}.items():
        if kinds is None:
            order, refused = _order(op, workload, dtypes[0], device, timer)
            if order:
                table.order[op] = order
                save(table)
            report("; ".join([f"{op}: {', '.join(order) or 'keeps its order'}", *refused]))
    return table


def _tuned(
    kind: str, entry: str, options: Options, call: Call, timer: Timer, tolerance: float
) -> tuple[Options, float, float]:
    """The options found, the default's time and theirs."""
    times: list[float] = []
    cannot_run = _errors_of_configurations()
    expected: tuple[Tensor, ...] | None = None

    def milliseconds(candidate: Options) -> float:
        nonlocal expected
        with config.overriding(entry, candidate):
            try:
                got = call("triton")
                if expected is None:
                    expected = got
                agrees = all(map(_close, got, expected, [tolerance] * len(got)))
                times.append(timer(lambda: call("triton")) if agrees else math.inf)
            except cannot_run:
                times.append(math.inf)
        return times[-1]

    found, fastest = search(kind, options, milliseconds)
    return found, times[0], fastest


def _errors_of_configurations() -> tuple[type[Exception], ...]:
    """What a configuration raises that takes more shared memory, registers or memory than there are."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = (got.double() - expected.double()).norm()
    return bool(error <= tolerance * expected.double().norm().clamp_min(1e-12))


def _as_near(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Of two neighbours that are as near either may be named: scores tell whether indices are right."""
    return not got.is_floating_point() or _close(got, expected, tolerance)


def _order(
    op: str, workload: Workload, dtype: torch.dtype, device: torch.device, timer: Timer
) -> tuple[list[str], list[str]]:
    """Implementations that "auto" may pick, the fastest first, and a word on each that is left out: those that cannot
    run, and those whose results are not what PyTorch's tiles find."""
    request = registry.Call(op, device.type, dtype)
    serving = [impl.name for impl in registry.candidates(request) if impl.unsupported(request) is None]
    call = workload.make(dtype, 128, device)
    expected: tuple[Tensor, ...] | None = None
    times: dict[str, float] = {}
    refused: list[str] = []
    for name in sorted(serving, key=lambda name: name != "tiled"):
        try:
            got = call(name)
            expected = got if expected is None else expected
            if all(map(_as_near, got, expected, [_TOLERANCE[dtype]] * len(got))):
                times[name] = timer(lambda name=name: call(name))  # type: ignore[misc]  # a default, not an argument
            else:
                refused.append(f"{name} is left out, its results are others")
        except _errors_of_configurations() as error:
            refused.append(f"{name} is left out: {error}")
    return sorted(times, key=times.__getitem__), refused


def median_of_runs(call: Callable[[], object]) -> float:
    """Milliseconds on the GPU, by CUDA events, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=100, return_mode="median"))


def tune_here(dtypes: Sequence[str] | None, kinds: Sequence[str] | None) -> str:
    """Tunes the current GPU, saves, and says where.

    Raises:
        ValueError: there is no GPU, or a name is unknown.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune: no CUDA device here; kernels are measured on the GPU that will run them")
    if (reason := registry.IMPLEMENTATIONS["triton"].missing()) is not None:
        raise ValueError(f"tune: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    chosen = [DTYPES[name] for name in dtypes or DTYPES]
    table = tune(device, median_of_runs, dtypes=chosen, kinds=kinds, save=tuned.save)
    return f"written: {tuned.save(table)}"
