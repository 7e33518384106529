"""Medians and ratios carry intervals that hold what they promise, and turns compare what was timed side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from cflow_fast.bench import measurement
from cflow_fast.bench.measurement import (
    FEWEST_ROUNDS,
    Effort,
    Track,
    clock,
    graph_memory,
    matrix_rate,
    median_interval,
    ratio_of,
    summarize,
    take_turns,
    working_memory,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (5, 0), (6, 0), (9, 1), (11, 1), (20, 5), (100, 39), (1000, 468)])
def test_interval_is_the_narrowest_pair_of_order_statistics_that_covers_95_percent(count: int, rank: int) -> None:
    """The ranks of published tables of the sign test's intervals, counted from 0."""
    assert median_interval(list(range(count))) == (rank, count - 1 - rank)


def test_interval_holds_the_true_median_in_95_of_100_samples() -> None:
    random = np.random.default_rng(0)
    samples = random.lognormal(0, 1, (2000, 15))
    covered = [low <= 1.0 <= high for low, high in map(median_interval, samples.tolist())]
    assert 0.95 <= statistics.mean(covered) <= 0.98  # 15 values cannot do exactly 95%: their next pair covers 96.5%


def test_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        median_interval([])


def test_summary_names_median_interval_and_tail() -> None:
    summary = summarize([float(i) for i in range(100, 0, -1)])
    assert (summary.median, summary.p50, summary.p99, summary.rounds) == (50.5, 50.5, 99.0, 100)
    assert (summary.low, summary.high) == (40.0, 61.0)


def test_ratio_is_of_pairs_so_that_a_machine_that_slows_down_does_not_matter() -> None:
    drift = [1.0 + i / 10 for i in range(20)]
    ratio = ratio_of([2 * x for x in drift], drift)
    assert (ratio.median, ratio.low, ratio.high, ratio.spread) == (2.0, 2.0, 2.0, 0.0)
    assert str(ratio) == "2.00x [2.00, 2.00]"


@dataclass
class Machine:
    """A clock whose seconds drift threefold and have a heavy tail, seeded."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    calls: list[object] = field(default_factory=list)

    def seconds(self, run: Callable[[], object]) -> float:
        work = run()
        self.calls.append(work)
        assert isinstance(work, float)
        drift = 1 + 2 * len(self.calls) / 200
        return work * drift * math.exp(0.05 * self.random.standard_normal())


def test_a_contender_against_itself_gives_one_within_the_interval_on_a_noisy_machine() -> None:
    tracks = [Track(lambda: 1.0), Track(lambda: 1.0)]
    take_turns(tracks, Machine().seconds, Effort(60, target=0.02))
    ratio = ratio_of(tracks[0].seconds, tracks[1].seconds)
    assert ratio.low <= 1.0 <= ratio.high
    assert ratio.spread <= 0.02


def test_turns_find_a_ratio_and_stop_when_it_is_known() -> None:
    tracks = [Track(lambda: 3.0), Track(lambda: 1.0)]
    shares: list[float] = []
    take_turns(tracks, Machine().seconds, Effort(60), on_round=lambda share, spread: shares.append(spread))
    ratio = ratio_of(tracks[0].seconds, tracks[1].seconds)
    assert ratio.low <= 3.0 <= ratio.high
    assert len(tracks[0].seconds) == len(tracks[1].seconds) == len(shares) < 100
    assert shares[-1] <= 0.05


def test_every_track_comes_first_in_turn() -> None:
    machine = Machine()
    take_turns([Track(lambda: 1.0), Track(lambda: 2.0), Track(lambda: 3.0)], machine.seconds, Effort(60, 1e-9, 6, 6))
    assert machine.calls[:9] == [1.0, 2.0, 3.0, 2.0, 3.0, 1.0, 3.0, 1.0, 2.0]
    assert len(machine.calls) == 18


def test_a_track_that_raises_is_out_and_the_others_go_on() -> None:
    failing = iter([1.0, 1.0])
    tracks = [Track(lambda: 1.0), Track(lambda: next(failing)), Track(lambda: 2.0)]
    take_turns(tracks, Machine().seconds, Effort(60, 1e-9, 8, 8))
    assert isinstance(tracks[1].error, StopIteration)
    assert [len(track.seconds) for track in tracks] == [8, 2, 8]


def test_an_interruption_leaves_whole_rounds() -> None:
    count = iter(range(100))

    def interrupted() -> float:
        if next(count) == 5:
            raise KeyboardInterrupt
        return 1.0

    tracks = [Track(lambda: 1.0), Track(interrupted)]
    with pytest.raises(KeyboardInterrupt):
        take_turns(tracks, Machine().seconds, Effort(60))
    assert [len(track.seconds) for track in tracks] == [5, 5]


def test_time_that_is_up_ends_the_rounds_once_there_are_enough_for_an_interval() -> None:
    tracks = [Track(lambda: 1.0), Track(lambda: 1.0)]
    take_turns(tracks, Machine().seconds, Effort(1e-9, target=1e-9))
    assert len(tracks[0].seconds) == FEWEST_ROUNDS


@pytest.mark.parametrize("name", ["seconds", "target", "least_rounds", "most_rounds"])
def test_effort_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is positive, got 0"):
        Effort(**{name: 0})  # type: ignore[arg-type]


def test_clock_and_matrix_rate_measure_this_machine() -> None:
    assert 0 < clock(CPU)(lambda: None) < 1
    assert matrix_rate("fp32", CPU, rounds=1) > 1e8
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("seconds", "calls"), [(1e-4, 50), (2e-3, 25), (1.0, 5)])
def test_calls_in_a_queue_are_timed_together_on_a_gpu(
    seconds: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least of three queues, a call's share of it."""
    taken = iter([0.7, 0.5, 0.6])
    made: list[int] = []
    monkeypatch.setattr(measurement, "clock", lambda device: lambda run: (run(), next(taken))[1])
    found = measurement.queued_seconds(lambda: made.append(1), torch.device("cuda"), seconds)
    assert len(made) == 3 * calls
    assert found == pytest.approx(0.5 / calls)


def test_a_cpu_has_no_queue() -> None:
    assert measurement.queued_seconds(lambda: pytest.fail("it is called"), CPU, 1.0) is None


def test_working_memory_is_what_a_call_needs_at_its_peak() -> None:
    """Not what it leaves, and not what an earlier call had: a GPU's allocator and Linux both tell."""
    size = 64 * 2**20
    held = torch.ones(size // 4)

    def twice() -> float:
        return float((held + 1).sum())

    needed = working_memory(twice, CPU)
    if needed is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.9 * size < needed < 1.5 * size
    again = working_memory(twice, CPU)
    assert again is not None
    assert 0.9 * size < again < 1.5 * size


def test_what_graphs_hold_is_counted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the pool that all share, nor a graph that is gone, nor another card's."""
    pools = [(0, 0, (0, 0)), (0, 1, (0, 1)), (0, 2, (3, 0)), (1, 4, (0, 1)), (0, 8, (0, 2))]
    segments = [{"device": d, "total_size": size, "segment_pool_id": pool} for d, size, pool in pools]
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: segments.pop())
    assert graph_memory(card) == 3
    assert graph_memory(CPU) == 0
