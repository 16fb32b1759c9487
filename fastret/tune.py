"""``fastret tune``: measures configurations of the Triton kernels, and implementations, on this machine's GPU.

For each entry of kernels/triton/config.py: from its default on, to the fastest of its neighbours (a block twice or half
as large, other warps, other stages) as long as one is faster: by the geometric mean of a small and a large call, of
which none may be slower than by default. A neighbour whose results differ from the default's by more than rounding is
not considered. Then the plans by which masked_lse and rank_sums go through their pair matrix are timed at several
widths of rows, and each op's implementations against each other. What is found goes into a table in the user's cache
folder (kernels/triton/tuned.py), which every later process reads.
"""

import contextlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastret import functional as F
from fastret import ops
from fastret.backends import registry
from fastret.backends.triton import plans
from fastret.kernels.triton import config, tuned
from fastret.kernels.triton.tuned import Options, Table

LEAST_GAIN = 0.03  # by which a time has to fall: smaller differences are noise
ROUNDS = 4
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
_TF32, _TF32_TOLERANCE = " tf32", 2e-2  # cuBLAS rounds factors otherwise than Triton

# Smallest and largest of what is varied. What is missing here is no matter of speed alone, SLICE, CHUNK and FACTORED,
# or follows from registers: PIECES.
_RANGES = {
    "BLOCK_M": (16, 256),
    "BLOCK_N": (16, 256),
    "BLOCK_K": (16, 128),
    "BLOCK_P": (4, 64),
    "BLOCK_S": (16, 128),
    "BLOCK_R": (1, 16),
    "BLOCK_D": (32, 2048),
    "BLOCK_W": (32, 512),
    "num_warps": (2, 16),
    "num_stages": (1, 5),
}
_WARP = 32  # threads
# Its tiles are square, and the same in every launch, so that thresholds meet the same scores.
_SQUARE = ("lse heavy",)

SIZES = (512, 4096)  # rows of a small batch, which parts of the columns have to fill a GPU for, and of a large one
WIDTHS = (64, 128, 512, 768)  # at which plans are compared

Call = Callable[[str], tuple[Tensor, ...]]  # of the name of an implementation
Make = Callable[[torch.dtype, int, torch.device, int], Call]  # of a dtype, a width, a device and a number of rows
Timer = Callable[[Callable[[], object]], float]  # milliseconds
Times = tuple[float, ...]  # at each of SIZES


@dataclass(frozen=True)
class Workload:
    """A call whose time shows how good the configuration of a kernel is.

    Attributes:
        op: whose implementations it may be run by.
        make: the call.
        plan: by which the kernel is launched, whatever the width.
    """

    op: str
    make: Make
    plan: str = "auto"


def _rows(count: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(count, width, generator=generator, device=device).to(dtype)


def _differentiated(loss: Callable[..., Tensor], *leaves: Tensor) -> Call:
    def call(impl: str) -> tuple[Tensor, ...]:
        learned = [leaf.detach().requires_grad_() for leaf in leaves]
        value = loss(*learned, impl=impl)
        return (value.detach(), *torch.autograd.grad(value.sum(), learned))

    return call


def _smooth_ap(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    labels = torch.arange(rows, device=device) // 4
    x = _rows(rows, width, dtype, device)
    return _differentiated(lambda x, impl: F.smooth_ap(x, labels, samples_per_class=4, impl=impl), x)


def _info_nce(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, y = (_rows(2 * rows, width, dtype, device, seed) for seed in (0, 1))
    return _differentiated(lambda x, y, impl: F.info_nce(x, y, impl=impl), x, y)


def _info_nce_forward(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, y = (_rows(2 * rows, width, dtype, device, seed) for seed in (0, 1))
    return lambda impl: (F.info_nce(x, y, impl=impl),)


def _clip(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, y = (_rows(2 * rows, width, dtype, device, seed) for seed in (0, 1))
    return _differentiated(F.clip, x, y, torch.tensor(10.0, device=device))


def _multi_label(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, y = (_rows(rows, width, dtype, device, seed) for seed in (0, 1))
    entries = torch.arange(2 * rows, device=device)
    offsets = torch.arange(0, 2 * rows + 1, 2, device=device)
    target = ops.Listed(offsets, entries % rows, torch.full((2 * rows,), 0.5, device=device))
    return lambda impl: ops.masked_lse(x, y, heads=[ops.Head(target=target)], impl=impl)[0]


def _mined(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    labels = torch.arange(rows, device=device) // 4
    x = _rows(rows, width, dtype, device)
    return _differentiated(lambda x, impl: F.multi_similarity(x, labels, mining_margin=0.1, impl=impl), x)


def _pairs(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x = _rows(rows, width, dtype, device)
    row = torch.arange(16 * rows, device=device) % rows
    return _differentiated(lambda x, impl: ops.pair_dot(x, None, row, row.flip(0), impl=impl), x)


def _packed(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    """A few pairs of many rows: packing and unpacking is all there is to do."""
    x = _rows(64 * rows, width, dtype, device)
    row = torch.arange(16, device=device)
    return _differentiated(lambda x, impl: ops.pair_dot(x, None, row, row.flip(0), impl=impl), x)


def _assigned(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x = _rows(2 * rows, 8 * width, dtype, device)
    codebook = _rows(8 * 256, width, dtype, device, 1).view(8, 256, width)
    return _differentiated(lambda x, codebook, impl: F.soft_pq(x, codebook, 0.5, impl=impl), x, codebook)


def _noise(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, bank = _rows(rows // 16, width, dtype, device), _rows(64 * rows, width, dtype, device, 1)
    return _differentiated(lambda x, impl: ops.sampled_dot(x, bank, count=rows, seed=0, impl=impl), x)


def _mixed(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x = _rows(rows, 48 * width, dtype, device).view(rows, 48, width)
    permutation = torch.arange(48, device=device).flip(0)
    return lambda impl: (ops.patchmix(x, 1, 2, permutation=permutation, impl=impl),)


def _stored(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    """Rows too wide for fused gradients."""
    return _info_nce(dtype, 8 * width, device, rows)


def _updated(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, bank = _rows(rows, width, dtype, device), _rows(2 * rows, width, dtype, device, 1)
    index = torch.arange(rows, device=device) * 2
    return lambda impl: (ops.update_rows_(bank.clone(), index, x, impl=impl),)


def _searched(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, y = _rows(rows // 4, width, dtype, device), _rows(16 * rows, width, dtype, device, 1)
    return lambda impl: ops.topk(x, y, k=10, impl=impl)


def _scanned(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    x, codebook = _rows(rows // 4, width, dtype, device), _rows(2048, width // 8, dtype, device, 1)
    codes = (torch.arange(128 * rows, device=device) * 40503 >> 8).remainder(256).to(torch.uint8).view(-1, 8)
    return lambda impl: ops.pq_topk(x, codebook.view(8, 256, -1), codes, k=10, impl=impl)


def _voted(dtype: torch.dtype, width: int, device: torch.device, rows: int) -> Call:
    scores = _rows(rows, 200, torch.float32, device).sort(1, descending=True)[0]
    indices = torch.arange(rows * 200, device=device).view(rows, 200) % 5003
    place = torch.arange(5003, device=device) % 1000
    return lambda impl: ops.knn_vote(scores, indices, place, 1000, impl=impl)


# By the kind of kernel in config.py, in TF32 or not. Every kind has one.
WORKLOADS: dict[str, Workload] = {
    **dict.fromkeys(("scores", "sums"), Workload("rank_sums", _smooth_ap, "weights")),
    "gradient": Workload("rank_sums", _smooth_ap, "fused"),
    "lse gradient": Workload("masked_lse", _info_nce, "fused"),
    "lse weights": Workload("masked_lse", _info_nce, "weights"),
    "lse two": Workload("masked_lse", _clip, "fused"),
    "lse weights sums": Workload("masked_lse", _clip, "weights"),
    "lse": Workload("masked_lse", _info_nce_forward, "fused"),
    "lse listed": Workload("masked_lse", _multi_label),
    "lse heavy": Workload("row_extrema", _mined, "fused"),
    "lse weights heavy": Workload("row_extrema", _mined, "weights"),
    **dict.fromkeys(("pair scores", "pair gradient"), Workload("pair_dot", _pairs)),
    **dict.fromkeys(("pack", "unpack"), Workload("pair_dot", _packed)),
    **dict.fromkeys(("assign", "assign rows", "assign words"), Workload("soft_assign", _assigned)),
    **dict.fromkeys(("sampled scores", "sampled gradient"), Workload("sampled_dot", _noise)),
    "patchmix": Workload("patchmix", _mixed),
    "update rows": Workload("update_rows", _updated),
    "strip": Workload("masked_lse", _stored, "strip"),
}
# By the entry of a plan in tuned.py, what is measured by each of the plans.
PLANS = {"plan lse": Workload("masked_lse", _info_nce), "plan ranks": Workload("rank_sums", _smooth_ap)}
KINDS = (*WORKLOADS, *PLANS)
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


def search(kind: str, start: Options, measure: Callable[[Options], Times]) -> tuple[Options, Times]:
    """The fastest options a walk from ``start`` finds, and their times; infinite: they cannot run."""
    best, by_default = start, measure(start)
    fastest = by_default
    seen = [dict(start)]
    for _ in range(ROUNDS):
        center = best
        for candidate in neighbours(kind, center):
            if candidate in seen:
                continue
            seen.append(candidate)
            times = measure(candidate)
            no_worse = all(t <= before * (1 + LEAST_GAIN) for t, before in zip(times, by_default, strict=True))
            if no_worse and _mean(times) < _mean(fastest) * (1 - LEAST_GAIN):
                best, fastest = candidate, times
        if best is center:
            break
    return best, fastest


def _mean(times: Times) -> float:
    """Of which two have the ratio that is the geometric mean of gains."""
    return statistics.geometric_mean(times) if max(times) < math.inf else math.inf


@contextlib.contextmanager
def _in_tf32(allowed: bool) -> Iterator[None]:
    """Products of float32 are taken in TF32 within the block, or as they were."""
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def tune(
    device: torch.device,
    timer: Timer,
    *,
    dtypes: Sequence[torch.dtype],
    kinds: Sequence[str] | None = None,
    report: Callable[[str], None] = print,
    save: Callable[[Table], object] = lambda table: None,
) -> Table:
    """Measures everything there is; ``report`` is told of each entry, and ``save`` gets what there is after it: a run
    of many minutes may be cut off."""
    architecture = config.architecture(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    table = Table(tuned.key(name, architecture))
    for kind, itemsize, options in config.entries(architecture):
        dtype = next((d for d in dtypes if d.itemsize == itemsize), None)
        plain = kind.removesuffix(_TF32)
        if dtype is None or (kinds is not None and plain not in kinds):
            continue
        entry, workload = tuned.name(kind, itemsize, options), WORKLOADS[plain]
        width, tolerance = options.get("SLICE", 128), _TOLERANCE[dtype] if kind == plain else _TF32_TOLERANCE
        calls = [workload.make(dtype, width, device, rows) for rows in SIZES]
        with _in_tf32(kind != plain), plans.overriding(workload.plan):
            found, before, after = _tuned(kind, entry, options, calls, timer, tolerance)
        if found != options and max(after) < math.inf:
            table.options[entry] = dict(found)
            save(table)
        report(f"{entry}: {_said(before)} by default, {_said(after)} with {dict(found)}")
    for entry, workload in PLANS.items():
        for dtype in dtypes if kinds is None or entry in kinds else ():
            for tf32 in (False, True) if dtype == torch.float32 else (False,):
                of_entry = tuned.name(f"{entry}{_TF32 * tf32}", dtype.itemsize, {})
                with _in_tf32(tf32):
                    tolerance = _TF32_TOLERANCE if tf32 else _TOLERANCE[dtype]
                    calls = [workload.make(dtype, width, device, SIZES[-1]) for width in WIDTHS]
                    found_plan = _wide_plan(of_entry, calls, timer, tolerance, report)
                if found_plan is not None:
                    table.plans[of_entry] = found_plan
                    save(table)
    # the first workload of an op stands for it
    for op, workload in {w.op: w for w in reversed((*WORKLOADS.values(), *SELECTIONS))}.items():
        if kinds is None:
            order, refused = _order(op, workload, dtypes[0], device, timer)
            if order:
                table.order[op] = order
                save(table)
            report("; ".join([f"{op}: {', '.join(order) or 'keeps its order'}", *refused]))
    return table


def _said(times: Times) -> str:
    return f"{', '.join(f'{time:.3f}' for time in times)} ms"


def _tuned(
    kind: str, entry: str, options: Options, calls: Sequence[Call], timer: Timer, tolerance: float
) -> tuple[Options, Times, Times]:
    """The options found, the default's times and theirs."""
    seen: list[Times] = []
    expected: dict[int, tuple[Tensor, ...]] = {}

    def measure(candidate: Options) -> Times:
        with config.overriding(entry, candidate):
            seen.append(tuple(_time(call, k, expected, timer, tolerance) for k, call in enumerate(calls)))
        return seen[-1]

    found, fastest = search(kind, options, measure)
    return found, seen[0], fastest


def _time(call: Call, key: int, expected: dict[int, tuple[Tensor, ...]], timer: Timer, tolerance: float) -> float:
    """Infinite where the Triton kernels cannot run, or where results are not those that were first of this key."""
    try:
        got = call("triton")
        agrees = all(map(_close, got, expected.setdefault(key, got), [tolerance] * len(got)))
        return timer(lambda: call("triton")) if agrees else math.inf
    except _errors_of_configurations():
        return math.inf


def _wide_plan(
    entry: str, calls: Sequence[Call], timer: Timer, tolerance: float, report: Callable[[str], None]
) -> dict[str, int] | None:
    """Of calls at WIDTHS, the faster plan of the widest rows that is not "fused", and the least width from which on it
    is faster than that; where it is at none, a greater one than was measured. None where no such plan runs."""
    times: dict[str, list[float]] = {"fused": [], "weights": [], "strip": []}
    for width, call in zip(WIDTHS, calls, strict=True):
        expected: dict[int, tuple[Tensor, ...]] = {}
        for plan, of_plan in times.items():
            with plans.overriding(plan):
                of_plan.append(_time(call, width, expected, timer, tolerance))
        report(f"{entry}, D = {width}: {', '.join(f'{plan} {of_plan[-1]:.3f} ms' for plan, of_plan in times.items())}")
    winner = min(("weights", "strip"), key=lambda plan: times[plan][-1])
    if times[winner][-1] == math.inf:
        return None
    least = WIDTHS[-1] + 1
    for width, time, fused in reversed(list(zip(WIDTHS, times[winner], times["fused"], strict=True))):
        if not time < fused * (1 - LEAST_GAIN):
            break
        least = width
    return {winner: least}


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
    request = registry.Call(op, device.type, dtype, index=device.index)
    serving = [impl.name for impl in registry.candidates(request) if impl.unsupported(request) is None]
    call = workload.make(dtype, 128, device, SIZES[-1])
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
