"""Timing things against each other on a machine that is never quiet: round by round, in one run."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from cflow_fast.bench.results import Summary

Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Seconds that a call takes."""

FEWEST_ROUNDS = 6
"""Order statistics bound a median at 95% from six values on."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: until every ratio is known well enough, but no longer than `seconds`."""

    seconds: float = 8.0  # of a case, all contenders together
    target: float = 0.05  # half the width of a ratio's 95% interval, relative to the ratio
    least_rounds: int = 11
    most_rounds: int = 1000

    def __post_init__(self) -> None:
        for name in ("seconds", "target", "least_rounds", "most_rounds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is positive, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Ratio:
    """How many times faster one thing is than another, with the 95% interval of that median."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the interval's width, relative to the median."""
        return (self.high - self.low) / (2 * self.median)

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class Track:
    """A contender on its way through the rounds; `error` ends it."""

    run: Run
    seconds: list[float] = field(default_factory=list)
    error: Exception | None = None


def clock(device: torch.device) -> Clock:
    """A monotonic clock on a CPU; CUDA events on a GPU, whose work runs on after a call returns."""
    if device.type != "cuda":
        return _wall_seconds

    def seconds(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def _wall_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(
    tracks: Sequence[Track],
    seconds_of: Clock,
    effort: Effort,
    baseline: int = 0,
    on_round: Callable[[float, float], None] = lambda share, spread: None,
) -> None:
    """Time every track once a round, another one first each time, until the ratios to the baseline are known.

    on_round(share of the effort spent, widest spread of a ratio). A track that raises is out, the others go on.
    An interruption leaves every track with the rounds that all of them had finished.
    """
    began, rounds = time.perf_counter(), 0
    try:
        while rounds < effort.most_rounds and any(track.error is None for track in tracks):
            for offset in range(len(tracks)):
                _time_once(tracks[(rounds + offset) % len(tracks)], seconds_of)
            rounds += 1
            spent = time.perf_counter() - began
            widest = _widest(tracks, baseline)
            on_round(min(1.0, spent / effort.seconds), widest)
            if rounds >= effort.least_rounds and widest <= effort.target:
                return
            if spent >= effort.seconds and rounds >= FEWEST_ROUNDS:
                return
    finally:
        for track in tracks:
            del track.seconds[rounds:]


def _time_once(track: Track, seconds_of: Clock) -> None:
    if track.error is not None:
        return
    try:
        track.seconds.append(seconds_of(track.run))
    except Exception as error:  # a contender's code may raise anything; it becomes its row
        track.error = error


def _widest(tracks: Sequence[Track], baseline: int) -> float:
    """The widest spread of a ratio to the baseline; of a time itself when there is nothing to compare."""
    alive = [track.seconds for track in tracks if track.error is None]
    reference = tracks[baseline].seconds if tracks[baseline].error is None else None
    if reference is None or len(alive) == 1:
        return max((_spread(seconds) for seconds in alive), default=0.0)
    return max(ratio_of(reference, seconds).spread for seconds in alive if seconds is not reference)


def _spread(seconds: Sequence[float]) -> float:
    low, high = median_interval(seconds)
    return (high - low) / (2 * statistics.median(seconds))


def ratio_of(reference_seconds: Sequence[float], our_seconds: Sequence[float]) -> Ratio:
    """The median over the rounds of reference / ours, each round's pair timed one right after the other."""
    ratios = [r / o for r, o in zip(reference_seconds, our_seconds, strict=True)]
    return Ratio(statistics.median(ratios), *median_interval(ratios))


def summarize(seconds: Sequence[float]) -> Summary:
    """Median, its 95% interval and the tail of some times; the tail is a time that occurred."""
    low, high = median_interval(seconds)
    ordered, middle = sorted(seconds), statistics.median(seconds)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return Summary(median=middle, low=low, high=high, p50=middle, p99=p99, rounds=len(ordered))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a median by order statistics, whatever the distribution; under six values all there is."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("expected at least one value, got none")
    rank = _rank(len(ordered))
    return ordered[rank], ordered[len(ordered) - 1 - rank]


@cache
def _rank(count: int) -> int:
    """The largest r for which the (r+1)-th smallest and largest of `count` values bound the median at 95%.

    The chance that at most r values fall below the median is that of a binomial(count, 1/2), at most 2.5%.
    """
    below, rank = 0, -1
    while 40 * (below := below + math.comb(count, rank + 1)) <= 2**count:
        rank += 1
    return max(rank, 0)


def working_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that one call needs at its peak beyond what was held before it; None where that cannot be measured.

    On a GPU by PyTorch's allocator, on Linux by the process's peak resident memory. A graph's replay allocates nothing:
    what it needs is held from its capture on, see `graph_memory`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def queued_seconds(run: Run, device: torch.device, seconds: float) -> float | None:
    """Seconds that a call takes among calls that are queued one after another, the least of a few rows of them.

    A GPU then works on one while the next is launched, as with batch upon batch. None on a CPU, where a call that
    returned is done. seconds: what one takes by itself.
    """
    if device.type != "cuda":
        return None
    calls = min(MOST_QUEUED, max(FEWEST_QUEUED, math.ceil(QUEUED_SECONDS / seconds)))

    def queue() -> None:
        for _ in range(calls):
            run()

    seconds_of = clock(device)
    return min(seconds_of(queue) for _ in range(3)) / calls


QUEUED_SECONDS, FEWEST_QUEUED, MOST_QUEUED = 0.05, 5, 50
"""How long calls are queued for, and how many."""


def graph_memory(device: torch.device) -> int:
    """Bytes that captured CUDA graphs hold for what lies between their inputs and outputs; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # a graph that is gone leaves its memory to this
    held = (s for s in torch.cuda.memory_snapshot() if s["device"] == device.index or device.index is None)
    return sum(s["total_size"] for s in held if s.get("segment_pool_id", SHARED_POOL) != SHARED_POOL)


SHARED_POOL = (0, 0)
"""Of the segments of memory that belong to no graph."""


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _return_freed_memory() -> None:
    """Or a call would work in pages that an earlier one left, and seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of operands of two bytes, and PyTorch's names for them."""

MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}


def matrix_rate(precision: str, device: torch.device, rounds: int = 7) -> float:
    """A device's matrix rate in FLOP/s: the best of a few square products, as PyTorch makes them."""
    size = MATRIX_SIZES.get(device.type, 2048)
    dtype = HALVES.get(precision, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds_of = clock(device)
    with torch.no_grad(), matmul_precision(precision):
        torch.mm(a, b)
        return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b)) for _ in range(rounds))


class matmul_precision:  # noqa: N801  a context manager, named as torch names its own
    """Within it float32 products and convolutions on a GPU are made in tf32, or in full float32 for any other
    precision."""

    def __init__(self, precision: str) -> None:
        self.wanted = "high" if precision == "tf32" else "highest"

    def __enter__(self) -> None:
        self.previous = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision(self.wanted)
        torch.backends.cudnn.allow_tf32 = self.wanted == "high"

    def __exit__(self, *error: object) -> None:
        precision, torch.backends.cudnn.allow_tf32 = self.previous
        torch.set_float32_matmul_precision(precision)
