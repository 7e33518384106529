"""One case and all its contenders, measured in one run: the rows of a result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cflow_fast.bench.baselines.maps import NotEnoughMemoryError
from cflow_fast.bench.cases import Case
from cflow_fast.bench.contenders import Built, Contender, UnavailableError
from cflow_fast.bench.measurement import (
    FEWEST_ROUNDS,
    Clock,
    Effort,
    Track,
    clock,
    graph_memory,
    queued_seconds,
    ratio_of,
    summarize,
    take_turns,
    working_memory,
)
from cflow_fast.bench.peers import first_line
from cflow_fast.bench.results import Row, Speedup
from cflow_fast.bench.yardstick import Judgement

OnProgress = Callable[[str, float], None]
"""on_progress(what is being done, share of the case)."""

Turns = Callable[[Sequence[Track], Clock, Effort, int, Callable[[float, float], None]], None]
"""How the rounds are timed: see take_turns."""

SILENT: OnProgress = lambda text, share: None  # noqa: E731


@dataclass(frozen=True)
class Entrant:
    """A contender in a precision."""

    contender: Contender
    precision: str

    @property
    def name(self) -> str:
        return f"{self.contender.name} {self.precision}"


@dataclass(eq=False)
class _Runner:
    """An entrant with all that is found out about it."""

    entrant: Entrant
    built: Built | None = None
    judgement: Judgement | None = None
    track: Track | None = None
    prepare_seconds: float = 0.0
    captured: int = 0  # bytes that its graphs hold
    memory: int | None = None
    queued: float | None = None  # seconds of a call among others in a queue
    status: str = "ok"
    note: str = ""

    @property
    def is_timed(self) -> bool:
        return self.track is not None and self.track.error is None and bool(self.track.seconds)

    def fail(self, error: Exception) -> None:
        self.status, self.note = _status_of(error), first_line(error)
        if isinstance(error, UnavailableError):
            self.note = str(error)
        self.built = None


def measure_case(
    case: Case,
    entrants: Sequence[Entrant],
    baseline: Entrant | None = None,
    effort: Effort | None = None,
    on_progress: OnProgress = SILENT,
    turns: Turns = take_turns,
) -> Iterator[Row]:
    """Time every entrant on a case, in turns, and yield their rows in order.

    A baseline that is an entrant already is the same run; one that equals an entrant of another position (a contender
    against itself) is built once more. After an interruption the rows of what was timed are yielded before it goes on.
    """
    effort = effort or Effort()
    on_progress("making the case", 0.0)
    work = case.work()
    runners = [_Runner(entrant) for entrant in entrants]
    reference = next((runner for runner in runners if runner.entrant is baseline), None)
    if baseline is not None and reference is None:
        reference = _Runner(baseline)
    everyone = runners if reference is None or reference in runners else [*runners, reference]
    interrupted: KeyboardInterrupt | None = None
    try:
        _prepare_all(case, work, everyone, on_progress)
        _time_all(case, everyone, reference, effort, on_progress, turns)
    except KeyboardInterrupt as interruption:
        interrupted = interruption
    if interrupted is None:
        for runner in everyone:
            _measure_memory_and_queue(runner, case.device)
    for runner in runners:
        if interrupted is None or runner.is_timed:
            yield _row(case, runner, everyone, reference)
    if interrupted is not None:
        raise interrupted


def _prepare_all(case: Case, work: Any, runners: Sequence[_Runner], on_progress: OnProgress) -> None:
    yardstick = case.yardstick(work)
    for runner in runners:
        entrant = runner.entrant
        on_progress(f"building {entrant.name}", 0.0)
        try:
            entrant.contender.check(entrant.precision, case.device)
            held = graph_memory(case.device)
            began = time.perf_counter()
            runner.built = entrant.contender.build(work, entrant.precision)
            runner.built.run()
            runner.prepare_seconds = time.perf_counter() - began
            runner.built.run()
            runner.captured = max(0, graph_memory(case.device) - held)
            if yardstick is not None:
                runner.judgement = yardstick.judge(entrant.contender.name, entrant.precision, runner.built)
        except Exception as error:  # a contender's code may raise anything; it becomes its row
            runner.fail(error)
            _free(case.device)


def _time_all(
    case: Case,
    runners: Sequence[_Runner],
    reference: _Runner | None,
    effort: Effort,
    on_progress: OnProgress,
    turns: Turns,
) -> None:
    running = [runner for runner in runners if runner.built is not None]
    for runner in running:
        assert runner.built is not None
        runner.track = Track(runner.built.run)
    if not running:
        return
    baseline = running.index(reference) if reference in running else 0

    def tell(share: float, spread: float) -> None:
        rounds = max(len(runner.track.seconds) for runner in running if runner.track is not None)
        known = f", within ±{spread:.1%}" if rounds >= FEWEST_ROUNDS else ""
        on_progress(f"round {rounds}{known}", share)

    tracks = [runner.track for runner in running if runner.track is not None]
    turns(tracks, clock(case.device), effort, baseline, tell)
    for runner in running:
        if runner.track is not None and runner.track.error is not None:
            runner.fail(runner.track.error)


def _measure_memory_and_queue(runner: _Runner, device: torch.device) -> None:
    if runner.built is None or not runner.is_timed:
        return
    assert runner.track is not None
    try:
        memory = working_memory(runner.built.run, device)
        runner.memory = None if memory is None else memory + runner.captured
        runner.queued = queued_seconds(runner.built.run, device, statistics.median(runner.track.seconds))
    except Exception as error:  # as above
        runner.fail(error)


def _row(
    case: Case,
    runner: _Runner,
    everyone: Sequence[_Runner],
    reference: _Runner | None,
) -> Row:
    entrant, judgement = runner.entrant, runner.judgement
    row = Row(
        bench=case.bench,
        case=case.label,
        axes=case.axes,
        contender=entrant.contender.name,
        precision=entrant.precision,
        device=case.device.type,
        status=runner.status,
        note=runner.note,
    )
    if not runner.is_timed or runner.status != "ok":
        return row
    assert runner.built is not None
    assert runner.track is not None
    seconds = summarize(runner.track.seconds)
    flop = case.flop()
    row = replace(
        row,
        note=runner.built.note,
        seconds=seconds,
        images_per_second=None if case.images is None else case.images / seconds.median,
        tflops=None if flop is None else flop / seconds.median / 1e12,
        peak_memory_bytes=runner.memory,
        model_bytes=runner.built.model_bytes,
        extra={"prepare_seconds": runner.prepare_seconds} | case.extra(seconds.median),
    )
    if runner.queued is not None and case.images is not None:
        queued = {"queued_seconds": runner.queued, "queued_images_per_second": case.images / runner.queued}
        row = replace(row, extra=row.extra | queued)
    if judgement is not None:
        row = replace(
            row,
            error_max=judgement.error_max,
            error_rms=judgement.error_rms,
            parity=judgement.parity,
            extra=row.extra | judgement.extra,
        )
        if not judgement.parity:
            return replace(row, status="parity failed", note=judgement.failures)
    return _with_speedups(row, runner, everyone, reference)


def _with_speedups(row: Row, runner: _Runner, everyone: Sequence[_Runner], reference: _Runner | None) -> Row:
    """The speed-up over the baseline, and those over every other entrant in `extra`."""
    found = {
        other.entrant.name: _speedup(runner, other) for other in everyone if other is not runner and _is_fit(other)
    }
    if reference is not None and reference is not runner and _is_fit(reference):
        row = replace(row, speedup=_speedup(runner, reference))
    others = {name: asdict(speedup) for name, speedup in found.items()}
    return replace(row, extra=row.extra | {"speedups": others}) if others else row


def _is_fit(runner: _Runner) -> bool:
    """Whether others may be compared with it."""
    return runner.is_timed and runner.status == "ok" and (runner.judgement is None or runner.judgement.parity)


def _speedup(runner: _Runner, other: _Runner) -> Speedup:
    assert runner.track is not None
    assert other.track is not None
    ratio = ratio_of(other.track.seconds, runner.track.seconds)
    return Speedup(other.entrant.name, ratio.median, ratio.low, ratio.high)


def _status_of(error: Exception) -> str:
    if isinstance(error, UnavailableError):
        return error.status
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, NotEnoughMemoryError)) or "not enough memory" in str(
        error
    ):
        return "out of memory"
    return "not installed" if isinstance(error, ImportError) else "failed"


def _free(device: torch.device) -> None:
    """What a failed contender held would leave the others too little."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
