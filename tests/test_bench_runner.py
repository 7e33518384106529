"""A case's rows: who cannot take part says why, who is wrong gets no speed-up, and Ctrl-C keeps what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cflow_fast.bench.cases import DecoderCase, Decoders, Scales
from cflow_fast.bench.contenders import OURS, Built, Contender, UnavailableError, registry
from cflow_fast.bench.decoder import CONTENDERS, ours
from cflow_fast.bench.measurement import Effort
from cflow_fast.bench.results import Row
from cflow_fast.bench.runner import Entrant, measure_case
from cflow_fast.bench.session import Session, line_up

CASE = DecoderCase("tiny", Scales((16, 24), (8, 16)), 64, 2, "soft", coupling_blocks=2, condition=8)
QUICK = Effort(seconds=1.0, least_rounds=6, most_rounds=6)
MINE = Entrant(CONTENDERS[OURS], "fp32")


def rows_of(*others: Contender, baseline: int | None = 1) -> list[Row]:
    entrants = [MINE, *(Entrant(contender, "fp32") for contender in others)]
    return list(measure_case(CASE, entrants, None if baseline is None else entrants[baseline], QUICK))


def test_a_row_has_time_throughput_memory_and_error() -> None:
    mine, theirs = rows_of(CONTENDERS["freia"])
    for row in (mine, theirs):
        assert (row.status, row.parity) == ("ok", True)
        assert row.seconds is not None
        assert row.seconds.rounds == 6
        assert row.images_per_second == pytest.approx(2 / row.seconds.median)
        assert row.tflops == pytest.approx(CASE.flop() / row.seconds.median / 1e12)
        assert row.error_max is not None
        assert 0 < row.error_max < 1e-5
        assert row.model_bytes is not None
        assert row.extra["prepare_seconds"] > 0
    assert mine.model_bytes is not None
    assert theirs.model_bytes is not None
    assert mine.model_bytes < theirs.model_bytes
    assert mine.speedup is not None
    assert mine.speedup.against == "freia fp32"
    assert theirs.speedup is None
    assert mine.extra["speedups"]["freia fp32"]["median"] == mine.speedup.median


def test_what_a_graph_holds_belongs_to_the_memory_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay allocates no more than its results; what others' graphs hold is theirs."""
    held = iter([100, 100 + 4096, 4196, 4196])
    monkeypatch.setattr("cflow_fast.bench.runner.graph_memory", lambda device: next(held))
    monkeypatch.setattr("cflow_fast.bench.runner.working_memory", lambda run, device: 24)
    captured, eager = rows_of(CONTENDERS["freia"])
    assert (captured.peak_memory_bytes, eager.peak_memory_bytes) == (4096 + 24, 24)


def test_calls_in_a_row_have_a_rate_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.bench.runner.queued_seconds", lambda run, device, seconds: seconds / 2)
    (row,) = measure_case(CASE, [MINE], None, QUICK)
    assert row.seconds is not None
    assert row.images_per_second is not None
    assert row.number("queued_seconds") == pytest.approx(row.seconds.median / 2)
    assert row.number("queued_images_per_second") == pytest.approx(2 * row.images_per_second)


def test_share_is_of_the_best_matrix_rate_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that other work disturbed is mended by a later one, for rows that are there already too."""
    rates = iter([1e12, 4e12, 2e12])
    monkeypatch.setattr("cflow_fast.bench.session.device_precisions", lambda device: ("fp32",))
    monkeypatch.setattr("cflow_fast.bench.session.matrix_rate", lambda precision, device: next(rates))
    session = Session("", torch.device("cpu"), effort=QUICK)
    for _ in range(2):
        session.measure(CASE, [MINE], None)
    results = session.results()
    assert results.peak_flops == {"fp32": 4e12}
    assert len(results.rows) == 2
    for row in results.rows:
        assert row.tflops is not None
        assert row.share_of_peak == pytest.approx(row.tflops / 4)


def _raising(error: Exception) -> Contender:
    def build(work: Any, precision: str) -> Built:
        raise error

    return Contender("peer", build)


@pytest.mark.parametrize(
    ("peer", "status", "note"),
    [
        (Contender("peer", ours, ("no_such_package",)), "not installed", "pip install no_such_package"),
        (_raising(UnavailableError("not available", "no compiler")), "not available", "no compiler"),
        (_raising(torch.OutOfMemoryError("CUDA out of memory")), "out of memory", "CUDA out of memory"),
        (_raising(RuntimeError("[enforce fail] not enough memory: you tried")), "out of memory", "not enough memory"),
        (_raising(ImportError("no module of theirs")), "not installed", "no module of theirs"),
        (_raising(RuntimeError("\n shapes differ\nmore")), "failed", "RuntimeError: shapes differ"),
    ],
)
def test_a_contender_that_cannot_take_part_is_a_row_that_says_so(peer: Contender, status: str, note: str) -> None:
    mine, theirs = rows_of(peer)
    assert theirs.status == status
    assert note in theirs.note
    assert theirs.seconds is None
    assert mine.status == "ok"
    assert mine.speedup is None


def test_a_contender_that_runs_out_of_memory_half_way_is_a_row_that_says_so() -> None:
    calls = iter(range(100))

    def run() -> None:
        if next(calls) > 3:
            raise torch.OutOfMemoryError("out")

    mine, theirs = rows_of(Contender("peer", lambda work, precision: Built(run)))
    assert (mine.status, theirs.status) == ("ok", "out of memory")
    assert mine.seconds is not None
    assert mine.seconds.rounds == 6


def _off_by(deviation: float) -> Contender:
    def build(work: Decoders, precision: str) -> Built:
        built = ours(work, precision)
        assert built.log_probs is not None
        right = built.log_probs

        def wrong(features: Sequence[Tensor]) -> list[Tensor]:
            return [log_prob + deviation for log_prob in right(features)]

        return replace(built, log_probs=wrong)

    return Contender("peer", build)


def test_a_contender_that_fails_parity_gets_no_speedup_and_nothing_is_compared_with_it() -> None:
    mine, wrong = rows_of(_off_by(1e-4), baseline=0)
    assert wrong.status == "parity failed"
    assert wrong.parity is False
    assert wrong.speedup is None
    assert "maximum" in wrong.note
    assert wrong.seconds is not None
    assert wrong.error_max == pytest.approx(1e-4, rel=0.1)
    assert "speedups" not in mine.extra
    mine, wrong = rows_of(_off_by(1e-4), baseline=1)
    assert mine.speedup is None


def test_a_likelihood_that_is_not_finite_fails_parity() -> None:
    _, wrong = rows_of(_off_by(float("nan")))
    assert (wrong.status, wrong.note) == ("parity failed", "not finite")


def test_a_contender_against_itself_gives_one_within_the_interval_and_the_noise_of_a_shared_machine() -> None:
    entrants, baseline = line_up(CONTENDERS, [OURS], ["fp32"])
    effort = Effort(seconds=4.0, target=0.01, least_rounds=50)
    (row,) = measure_case(CASE, entrants, baseline, effort)
    assert row.speedup is not None
    assert row.speedup.against == "cflow-fast fp32"
    assert row.speedup.low <= 1.05
    assert row.speedup.high >= 0.95


def test_an_interrupted_session_keeps_the_rows_of_whole_rounds() -> None:
    calls = iter(range(100))

    def run() -> None:
        if next(calls) == 6:  # two calls to warm up, then the rounds
            raise KeyboardInterrupt

    session = Session("", torch.device("cpu"), effort=QUICK)
    peer = Entrant(Contender("peer", lambda work, precision: Built(run)), "fp32")
    with pytest.raises(KeyboardInterrupt):
        session.measure(CASE, [MINE, peer], peer)
    assert [row.contender for row in session.rows] == [OURS, "peer"]
    assert [row.seconds.rounds for row in session.rows if row.seconds] == [4, 4]


def test_an_interruption_before_the_first_round_keeps_nothing() -> None:
    def build(work: Any, precision: str) -> Built:
        raise KeyboardInterrupt

    session = Session("", torch.device("cpu"), effort=QUICK)
    with pytest.raises(KeyboardInterrupt):
        session.measure(CASE, [MINE, Entrant(Contender("peer", build), "fp32")], None)
    assert session.rows == []


def test_line_up_takes_every_precision_and_the_first_peer_as_baseline() -> None:
    contenders = registry(
        Contender(OURS, ours), Contender("a", ours, reduced=False), Contender("b", ours), Contender("c", ours)
    )
    entrants, baseline = line_up(contenders, ["b", "a"], ["fp32", "bf16"])
    names = ["cflow-fast fp32", "cflow-fast bf16", "b fp32", "b bf16", "a fp32"]
    assert [entrant.name for entrant in entrants] == names
    assert baseline is entrants[2]
    assert line_up(contenders, [], ["fp32"])[1] is None


def test_precision_that_the_device_lacks_is_a_row_that_says_so() -> None:
    (row,) = measure_case(CASE, [Entrant(CONTENDERS[OURS], "tf32")], None, QUICK)
    assert (row.status, row.note) == ("not available", "this cpu does not multiply tf32")


def test_results_say_what_they_were_measured_on() -> None:
    results = Session("cflow-fast bench", torch.device("cpu"), seed=3).results()
    assert {"cpu", "threads", "features", "memory_bytes"} <= results.machine.keys()
    assert results.versions["torch"] == torch.__version__
    assert results.seed == 3
    assert results.commit
