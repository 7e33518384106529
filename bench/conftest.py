"""The benchmarks as pytest-benchmark entries; `pytest bench --benchmark-only -s --results WHERE` stores their rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cflow_fast.bench.cases import Case
from cflow_fast.bench.contenders import OURS, Contender
from cflow_fast.bench.machine import file_name
from cflow_fast.bench.measurement import Clock, Effort, Track
from cflow_fast.bench.results import Row, store_results
from cflow_fast.bench.runner import Entrant
from cflow_fast.bench.session import Session

ROUNDS = int(os.environ.get("CFLOW_FAST_ROUNDS", "11"))
SESSION = pytest.StashKey[Session]()
WHOLE = ["bench", "--benchmark-only", "-s", "--results"]
"""What `make bench-cpu` asks for, before the place where results are kept."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="a JSON file, or a folder for one named after the CPU")


def pytest_configure(config: pytest.Config) -> None:
    effort = Effort(seconds=float("inf"), least_rounds=ROUNDS, most_rounds=ROUNDS)
    words = [str(word) for word in config.invocation_params.args]
    config.stash[SESSION] = Session(command_of(words), torch.device("cpu"), effort=effort)


def command_of(words: Sequence[str]) -> str:
    """How a result is made again, wherever it is kept then."""
    is_whole = [*words[:-1]] == WHOLE
    return "make bench-cpu" if is_whole else f"python -m pytest {' '.join(words)}"


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Row]:
    """measure(case, contenders, against, precision): our row, with the speed-up over that peer in fp32.

    `beside`: more contenders timed in the same rounds, in our precision.
    """
    session = request.config.stash[SESSION]

    def run(
        case: Case, contenders: dict[str, Contender], against: str, precision: str = "fp32", beside: Sequence[str] = ()
    ) -> Row:
        benchmark.group = f"{case.bench}: {case.label}"
        entrants = [Entrant(contenders[OURS], precision), Entrant(contenders[against], "fp32")]
        entrants += [Entrant(contenders[name], precision) for name in beside]
        before = len(session.rows)
        session.measure(case, entrants, entrants[1], turns=_driven_by(benchmark))
        ours, theirs, *_ = session.rows[before:]
        if any(row.key == theirs.key for row in session.rows[:before]):
            session.rows.remove(theirs)  # the peer's row is there from another precision of ours
        if theirs.status == "not installed":
            pytest.skip(f"{against}: {theirs.note}")
        assert (ours.status, theirs.status) == ("ok", "ok"), (ours.note, theirs.note)
        assert ours.speedup is not None
        ratio, row = ours.speedup, session.results().rows[before]
        share = "" if row.share_of_peak is None else f", {row.share_of_peak:.0%} of the matrix rate"
        interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
        print(f"\n{case.label}, {precision}: {ratio.median:.2f}x {interval} {ratio.against}{share}")
        return ours

    return run


def _driven_by(benchmark: Any) -> Callable[..., None]:
    """Turns in which pytest-benchmark times the first track, and every other one is timed right before it."""

    def turns(
        tracks: Sequence[Track],
        seconds_of: Clock,
        effort: Effort,
        baseline: int,
        on_round: Callable[[float, float], None],
    ) -> None:
        ours, *others = tracks

        def time_others() -> None:
            for track in others:
                track.seconds.append(seconds_of(track.run))

        benchmark.pedantic(ours.run, setup=time_others, rounds=effort.least_rounds)
        ours.seconds += benchmark.stats.stats.data

    return turns


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    measured, path = session.config.stash.get(SESSION, None), session.config.getoption("--results")
    if measured is not None and measured.rows and path is not None:
        measured.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
        results = measured.results()
        store_results(results_file(path, str(results.machine["cpu"])), results)


def results_file(path: Path, cpu: str) -> Path:
    """A JSON file as it is; in a folder every kind of CPU has its own."""
    return path if path.suffix == ".json" else path / f"cpu-{file_name(cpu)}.json"
