"""The benchmarks as pytest-benchmark entries; `pytest bench --benchmark-only --results FOLDER` stores their rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cflow_fast.bench.cases import Case
from cflow_fast.bench.contenders import OURS, Contender
from cflow_fast.bench.measurement import Clock, Effort, Track
from cflow_fast.bench.results import Row, write_results
from cflow_fast.bench.runner import Entrant
from cflow_fast.bench.session import Session

ROUNDS = int(os.environ.get("CFLOW_FAST_ROUNDS", "11"))
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder that cpu.json is written to")


def pytest_configure(config: pytest.Config) -> None:
    effort = Effort(seconds=float("inf"), least_rounds=ROUNDS, most_rounds=ROUNDS)
    config.stash[SESSION] = Session("make bench-cpu", torch.device("cpu"), effort=effort)


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
        ratio = ours.speedup
        print(f"\n{case.label}, {precision}: {ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] {ratio.against}")
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


def pytest_sessionfinish(session: pytest.Session) -> None:
    measured, folder = session.config.stash.get(SESSION, None), session.config.getoption("--results")
    if measured is not None and measured.rows and folder is not None:
        write_results(folder / "cpu.json", measured.results())
