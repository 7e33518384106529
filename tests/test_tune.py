"""Choosing configurations without a card: by stubbed times, by predictions of stubbed machine code, and the command."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli import run
from tiny import tiny_model

from cflow_fast.bench import gpu, tune_card, tune_predicted, warm
from cflow_fast.bench.aot import Kernel
from cflow_fast.bench.cases import ENCODERS, HEADLINE_ENCODERS
from cflow_fast.bench.compiled import Compiled, Loop
from cflow_fast.bench.gpu import Suite
from cflow_fast.bench.measurement import Effort, Ratio
from cflow_fast.bench.plain_floor import plain_at_least
from cflow_fast.bench.prediction import CARDS, l2_bytes, predict, predict_at_least, predict_together
from cflow_fast.bench.tune import (
    LIGHT,
    PATIENCE,
    TIE,
    Finding,
    LostCardError,
    Times,
    choose_by_measurement,
    in_words,
    table_of,
)
from cflow_fast.bench.tune_predicted import choose_by_prediction, outdated
from cflow_fast.bench.tune_targets import (
    Target,
    candidate_launches,
    families_of,
    model_targets,
    targets,
    trials,
)
from cflow_fast.bench.tune_together import Decoder, Load, choose_together
from cflow_fast.cli.tune import PREDICTED_CARDS
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import Config, LinearConfig, Problem, candidates, rule
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.tuning_table import Choice, DecoderProblem, Entry, Table, read_table
from cflow_fast.kernels.weights import SoftMixing

CHIP = Chip((9, 0), 132, "Some Card")
H100 = CARDS[0]
WIDE = Target(320, 8, 8, 1, "soft", "bf16", blocks=3)
NARROW = Target(64, 16, 16, 2, "hard", "ieee", condition=8, blocks=2)
CODE = Compiled(128, 65536, 0, 700, (Loop(100, 0, 4, 0, 0),), False)
EVEN = Times(50e-6, 50e-6, Ratio(1.0, 0.98, 1.02))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CFLOW_FAST_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tuning.cache_path(CHIP.name)
    tuning.forget()


class StubTimer:
    """Every launch takes 10 us, but for those of the configurations that `seconds` names."""

    def __init__(
        self,
        times: Times = EVEN,
        slow: Callable[[Launch], float] = lambda launch: 10e-6,
        faster: Ratio = Ratio(1.1, 1.05, 1.2),  # noqa: B008
        in_place: Callable[[Sequence[Target], Mapping[Problem, Config]], float] = lambda group, chosen: 1e-4,
    ) -> None:
        self.times, self.slow, self.faster, self.in_place = times, slow, faster, in_place
        self.compared: list[tuple[dict[Problem, Config], dict[Problem, Config]]] = []
        self.launched: list[Launch] = []
        self.decoders: list[dict[Problem, Config]] = []

    def launch(self, launch: Launch) -> float:
        self.launched.append(launch)
        return self.slow(launch)

    def decoder(self, target: Target, chosen: dict[Problem, Config]) -> Times:
        self.decoders.append(chosen)
        return self.times

    def together(self, group: Sequence[Target]) -> Callable[[Mapping[Problem, Config]], float]:
        return lambda chosen: self.in_place(group, chosen)

    def side_by_side(
        self, group: Sequence[Target], standard: dict[Problem, Config], chosen: dict[Problem, Config]
    ) -> Ratio:
        self.compared.append((dict(standard), dict(chosen)))
        return self.faster


def measured(timer: StubTimer, *wanted: Target, minutes: float = 1.0, **options: object) -> list[Finding]:
    until = time.monotonic() + 60 * minutes
    return list(choose_by_measurement(wanted or (WIDE,), CHIP, timer, until, **options))  # type: ignore[arg-type]


def is_other(launch: Launch) -> bool:
    """Whether it takes fewer inputs a step than the rule has WIDE's products take: among the first that are tried."""
    return launch.constexprs.get("BLOCK_K", 0) == 64


def test_headline_targets_are_the_encoders_decoders() -> None:
    found = targets(("wide_resnet50_2",), ("bf16",), (256,), (8,))
    assert {(t.features, t.height, t.batch) for t in found} == {(512, 32, 8), (1024, 16, 8), (2048, 8, 8)}
    assert {t.permutations for t in found} == {"soft", "hard"}
    assert set(HEADLINE_ENCODERS) < set(ENCODERS)


def test_a_models_targets_are_its_decoders_on_its_maps() -> None:
    model = tiny_model()
    found = model_targets(model, (1, 4), ("ieee",))
    maps = model.features(torch.zeros(1, 3, *model.image_size))
    assert [(t.features, t.height, t.batch) for t in found] == [
        (m.shape[1], m.shape[2], batch) for batch in (1, 4) for m in maps
    ]
    assert {t.blocks for t in found} == {model.options["coupling_blocks"]}
    assert {t.permutations for t in found} == {"hard"}


@pytest.mark.parametrize("target", [WIDE, NARROW, replace(WIDE, permutations="hard"), replace(WIDE, condition=0)])
def test_a_problem_is_known_by_its_launch(target: Target) -> None:
    """What the launch was chosen by: another configuration for exactly that changes exactly its launches."""
    with tuning.trying({}):
        groups = target.launches(CHIP)
    for problem, launches in groups.items():
        other = candidates(problem, CHIP)[-1]
        with tuning.trying({problem: other}):
            changed = target.launches(CHIP)
        assert set(changed) == set(groups)
        for same, before in groups.items():
            tiles = [launch.constexprs["BLOCK_ROWS"] for launch in changed[same]]
            if same == problem:
                assert len(tiles) == len(launches)
                assert set(tiles) == {other.block_rows}  # type: ignore[union-attr]
            else:
                assert tiles == [launch.constexprs["BLOCK_ROWS"] for launch in before]


def test_candidates_are_tried_once_each_however_many_decoders_share_a_problem() -> None:
    seen: set[Problem] = set()
    first = [problem for trial in trials(WIDE, CHIP, seen) for problem in trial]
    assert {p: first.count(p) for p in seen} == {p: len(candidates(p, CHIP)) for p in seen}
    assert not any(trials(replace(WIDE, blocks=4), CHIP, seen))


def test_what_will_be_measured_is_what_can_be_compiled_beforehand() -> None:
    timer = StubTimer()
    measured(timer)

    def name(launch: Launch) -> tuple[object, ...]:
        return launch.kernel.__name__, tuple(sorted(launch.constexprs.items(), key=str))

    assert {name(launch) for launch in timer.launched} <= {name(launch) for launch in candidate_launches([WIDE], CHIP)}


def test_the_fastest_candidate_is_taken_where_it_is_clearly_faster() -> None:
    timer = StubTimer(slow=lambda launch: 5e-6 if is_other(launch) else 10e-6)
    table = table_of(measured(timer), CHIP.name, 132, {})
    linear = {p: e for p, e in table.kernels.items() if p.kernel == "linear"}
    assert linear
    for problem, entry in linear.items():
        assert entry.config.block_k == 64  # type: ignore[union-attr]
        assert (entry.source, entry.measured_us) == ("measured", 5.0), problem
    assert timer.decoders[-1] == {p: e.config for p, e in table.kernels.items()}, "the decoder is timed as chosen"


@pytest.mark.parametrize(
    ("faster", "given_back"), [(Ratio(0.9, 0.85, 0.95), True), (Ratio(0.99, 0.97, 1.01), False)], ids=str
)
def test_what_makes_decoders_side_by_side_slower_is_given_back(faster: Ratio, given_back: bool) -> None:
    timer = StubTimer(slow=lambda launch: 5e-6 if is_other(launch) else 10e-6, faster=faster)
    found = measured(timer)
    table = table_of(found, CHIP.name, 132, {})
    (standard, chosen), *others = timer.compared
    assert not others
    assert chosen != standard
    assert {p: e.config for p, e in table.kernels.items()} == (standard if given_back else chosen)
    assert timer.decoders[-1] == (standard if given_back else chosen), "the plain path's opponent is what is kept"
    assert any("given back" in finding.note for finding in found) == given_back
    assert {entry.measured_us for entry in table.kernels.values()} == ({10.0} if given_back else {5.0})


def test_a_tie_keeps_the_rules_choice() -> None:
    with tuning.trying({}):
        usual = {p: rule(p, CHIP) for p in WIDE.launches(CHIP)}
    timer = StubTimer(slow=lambda launch: (1 - TIE / 2) * 10e-6 if is_other(launch) else 10e-6)
    table = table_of(measured(timer), CHIP.name, 132, {})
    assert {p: e.config for p, e in table.kernels.items()} == usual


def test_the_rules_and_the_predicted_choice_are_timed_first_and_stand_beside_each_other() -> None:
    with tuning.trying({}):
        problem = next(iter(WIDE.launches(CHIP)))
    predicted = candidates(problem, CHIP)[-1]
    shipped = Table("sm_90", 132, {problem: Entry(predicted, 4.0)})
    timer = StubTimer(slow=lambda launch: 5e-6 if len(timer.launched) == 2 else 10e-6)
    entry = measured(timer, shipped=shipped)[0].kernel
    assert entry == (problem, Entry(predicted, 4.0, 5.0))
    assert entry[1].ratio == 1.25


def test_a_candidate_that_raises_is_left_out_and_told() -> None:
    def out_of_resources(launch: Launch) -> float:
        if is_other(launch):
            raise RuntimeError("out of resource: shared memory, Required: 262144\nmore")
        return 10e-6

    found = measured(StubTimer(slow=out_of_resources))
    notes = [finding.note for finding in found if finding.note]
    assert notes
    assert all(note.endswith("left out: out of resource: shared memory, Required: 262144") for note in notes)
    kernels = [finding.kernel for finding in found if finding.kernel]
    assert len(kernels) == len({problem for problem, _ in kernels}) > 2


def test_no_more_candidates_are_timed_when_none_of_the_last_was_faster() -> None:
    timer = StubTimer()
    measured(timer)
    with tuning.trying({}):
        problems = list(WIDE.launches(CHIP))
    assert len(timer.launched) <= len(problems) * (2 + LIGHT + PATIENCE)
    assert len(timer.launched) < sum(len(candidates(problem, CHIP)) for problem in problems)
    falling = iter(range(10**6, 0, -1))
    timer = StubTimer(slow=lambda launch: next(falling) * 1e-11)
    measured(timer)
    assert len(timer.launched) == sum(len(candidates(problem, CHIP)) for problem in problems), "the last was the best"


def test_what_moves_least_is_timed_whatever_it_is_counted() -> None:
    timer = StubTimer()
    measured(timer)
    with tuning.trying({}):
        launches = WIDE.launches(CHIP)
    for problem in launches:
        moved = []
        for config in candidates(problem, CHIP):
            with tuning.trying({problem: config}):
                moved.append(l2_bytes(WIDE.launches(CHIP)[problem][0], H100))
        tried = [l2_bytes(launch, H100) for launch in timer.launched if launch.kernel is launches[problem][0].kernel]
        assert min(moved) in tried


BESIDE = [replace(WIDE, beside="soft"), replace(WIDE, features=384, beside="soft")]


def lighter(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
    """Faster with every problem that takes 64 inputs a step."""
    return 1e-4 * 0.9 ** sum(config.block_k == 64 for config in chosen.values())  # type: ignore[union-attr]


def alone(launch: Launch) -> float:
    """Slower alone, but no more than is tried side by side."""
    return 11e-6 if is_other(launch) else 10e-6


def test_what_is_slower_alone_is_taken_where_decoders_side_by_side_are_faster() -> None:
    timer = StubTimer(slow=alone, in_place=lighter)
    table = table_of(measured(timer, *BESIDE), CHIP.name, 132, {})
    assert table.kernels
    for entry in table.kernels.values():
        assert entry.config.block_k == 64  # type: ignore[union-attr]
        assert entry.measured_us == 11.0
    usual = table_of(measured(StubTimer(slow=alone), *BESIDE), CHIP.name, 132, {})
    assert all(entry.config.block_k == 128 for entry in usual.kernels.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(("loses", "taken"), [(1.05, True), (1.2, False)])
def test_a_problem_of_two_sets_of_decoders_is_settled_for_both(loses: float, taken: bool) -> None:
    def in_place(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        factor = 0.9 if group[0].beside == "soft" else loses
        return 1e-4 * factor ** sum(config.block_k == 64 for config in chosen.values())  # type: ignore[union-attr]

    hard = [replace(target, permutations="hard", beside="hard") for target in BESIDE]
    table = table_of(measured(StubTimer(slow=alone, in_place=in_place), *BESIDE, *hard), CHIP.name, 132, {})
    with tuning.trying({}):
        shared = {problem for target in hard for problem in target.launches(CHIP)}
    assert shared < set(table.kernels)
    for problem, entry in table.kernels.items():
        assert (entry.config.block_k == 64) == (taken or problem not in shared)  # type: ignore[union-attr]


def test_sets_of_decoders_that_share_a_problem_are_one_family() -> None:
    soft, hard = BESIDE, [replace(target, permutations="hard", beside="hard") for target in BESIDE]
    other = [replace(target, batch=64, beside="many") for target in BESIDE]
    assert families_of([*soft, *other, *hard], CHIP) == [[soft, hard], [other]]


def test_a_configuration_that_fails_side_by_side_is_passed_over() -> None:
    def fails(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        if any(config.block_k == 64 for config in chosen.values()):  # type: ignore[union-attr]
            raise RuntimeError("out of resource")
        return 1e-4

    table = table_of(measured(StubTimer(slow=alone, in_place=fails), *BESIDE), CHIP.name, 132, {})
    assert all(entry.config.block_k == 128 for entry in table.kernels.values())  # type: ignore[union-attr]
    assert len(table.decoders) == len(BESIDE)


def test_decoders_that_cannot_be_timed_side_by_side_keep_what_is_fastest_alone() -> None:
    def fails(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        raise RuntimeError("CUDA out of memory")

    found = measured(StubTimer(slow=alone, in_place=fails), *BESIDE)
    assert any(finding.note.endswith("were not timed side by side: CUDA out of memory") for finding in found)
    assert len(table_of(found, CHIP.name, 132, {}).decoders) == len(BESIDE)


def test_the_least_of_several_runs_counts() -> None:
    times = iter([1e-3, *[n * 4e-3 for n in (7, 5, 6, 8, 9)]])
    runs = []

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(times)

    assert tune_card._least_seconds(lambda: runs.append(1), clock) == pytest.approx(5e-3)
    assert len(runs) == 1 + 1 + 5 * 4, "once to warm up, once to see how long it takes, then four at a time"


def test_a_problem_none_of_whose_candidates_runs_has_no_entry() -> None:
    def broken(launch: Launch) -> float:
        raise RuntimeError("no")

    found = measured(StubTimer(slow=broken))
    assert not any(finding.kernel for finding in found)
    assert found[-1].decoder is not None


def test_it_stops_when_the_time_is_over_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cflow_fast.bench.tune.time.monotonic", lambda: now[0])

    def a_second(launch: Launch) -> float:
        now[0] += 1.0
        return 10e-6

    timer = StubTimer(slow=a_second)
    found = list(choose_by_measurement((WIDE,), CHIP, timer, until=1.5))
    assert len(timer.launched) == 2, "no candidate is begun when the time is over"
    assert len(found) == 1
    assert found[0].kernel is not None
    assert not timer.decoders


PLAIN_FASTER = Times(52.3e-6, 41.0e-6, Ratio(1.28, 1.20, 1.33))
TRITON_FASTER = Times(30.0e-6, 60.0e-6, Ratio(0.5, 0.49, 0.51))


@pytest.mark.parametrize(
    ("times", "backend", "why"),
    [
        (PLAIN_FASTER, "plain", "plain 41.0 us, Triton 52.3 us: plain"),
        (TRITON_FASTER, "triton", "plain 60.0 us, Triton 30.0 us: triton"),
        (EVEN, "triton", "plain 50.0 us, Triton 50.0 us, a tie: triton"),
    ],
)
def test_what_the_dispatcher_takes_is_recorded_with_the_reason(times: Times, backend: str, why: str) -> None:
    decoder = measured(StubTimer(times))[-1].decoder
    assert decoder == (
        DecoderProblem(320, 128, 3, "soft", "bf16", 64),
        Choice(backend, why, "measured", *(round(1e6 * seconds, 1) for seconds in times[:2])),
    )


def test_a_decoder_that_could_not_be_compared_is_told_and_the_next_one_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer = StubTimer()
    right = timer.decoder

    def fails_once(target: Target, chosen: dict[Problem, Config]) -> Times:
        if target == WIDE:
            raise RuntimeError("CUDA out of memory")
        return right(target, chosen)

    monkeypatch.setattr(timer, "decoder", fails_once)
    found = measured(timer, WIDE, NARROW)
    assert any("were not compared: CUDA out of memory" in finding.note for finding in found)
    assert found[-1].decoder is not None


def test_anomaly_maps_are_tuned_too() -> None:
    timer = StubTimer(slow=lambda launch: 5e-6 if launch.constexprs.get("ROWS") == 32 else 10e-6)
    kernel = measured(timer, NARROW, tails=((2, 3, 256),))[-1].kernel
    assert kernel is not None
    assert kernel[0] == Problem("tail", "fp32", 2, (3, 256, 256))
    assert kernel[1].config.rows == 32  # type: ignore[union-attr]


def test_weights_for_timing_are_permutations_where_they_are_indices() -> None:
    weights = tune_card.filled(NARROW.weights(), torch.device("cpu"))
    for passive, active in zip(weights.mixing.passive, weights.mixing.active, strict=True):
        assert torch.cat([passive, active]).sort().values.tolist() == list(range(64))
    soft = tune_card.filled(WIDE.weights(), torch.device("cpu"))
    assert isinstance(soft.mixing, SoftMixing)
    assert not any(tensor.is_meta for tensor in (*weights.tensors().values(), *soft.tensors().values()))
    assert {name: t.shape for name, t in soft.tensors().items()} == {
        name: t.shape for name, t in WIDE.weights().tensors().items()
    }


# By prediction.


SLOW = replace(CODE, instructions=9700, loops=(Loop(9000, 0, 4, 0, 0),))


def code_of(launch: Launch) -> Compiled:
    """The tiles that the rule takes for WIDE's products make slow code here."""
    return SLOW if launch.options.get("num_stages") == 6 else CODE


def machine_code(kernels: Sequence[Kernel], faulty: Callable[[Kernel], bool] = lambda kernel: False) -> list[Compiled]:
    return [replace(code_of(kernel.launch), serialized=faulty(kernel)) for kernel in kernels]


def test_the_choice_is_what_is_predicted_fastest() -> None:
    table = choose_by_prediction(H100, [WIDE], machine_code)
    with tuning.trying({}):
        groups = WIDE.launches(Chip())
    assert set(table.kernels) == set(groups)
    changed = 0
    for problem, entry in table.kernels.items():
        times = {}
        for config in candidates(problem, Chip()):
            with tuning.trying({problem: config}):
                launches = WIDE.launches(Chip())[problem]
            times[config] = sum(predict(launch, code_of(launch), H100).seconds for launch in launches) / len(launches)
        usual = rule(problem, Chip())
        assert usual is not None
        if entry.config == usual:
            assert min(times.values()) > 0.96 * times[usual]
        else:
            assert times[entry.config] < (1 - TIE) * times[usual]
            assert times[entry.config] < 1.02 * min(times.values())
            changed += 1
        assert entry == Entry(entry.config, round(1e6 * times[entry.config], 2))
    assert changed, "or nothing was tested"


def test_no_candidate_is_predicted_under_the_bound_that_spares_its_compilation() -> None:
    fast = replace(CODE, instructions=1, loops=(Loop(1, 0, 1, 0, 0),))
    for trial in trials(WIDE, Chip(), set()):
        for launches in trial.values():
            for launch in launches:
                assert predict_at_least(launch, H100) <= 1.0001 * predict(launch, fast, H100).seconds


def test_what_must_not_ship_is_not_chosen() -> None:
    free = choose_by_prediction(H100, [WIDE], machine_code)
    usual = {rule(problem, Chip()).stages for problem in free.kernels}  # type: ignore[union-attr]
    banned = max({entry.config.stages for entry in free.kernels.values()} - usual)  # type: ignore[union-attr]

    def without(kernels: Sequence[Kernel]) -> list[Compiled]:
        return machine_code(kernels, lambda kernel: kernel.launch.options.get("num_stages") == banned)

    table = choose_by_prediction(H100, [WIDE], without)
    assert all(entry.config.stages != banned for entry in table.kernels.values())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="must not ship"):
        choose_by_prediction(H100, [WIDE], lambda kernels: machine_code(kernels, lambda kernel: True))


def test_a_fault_in_another_decoder_returns_to_the_rule() -> None:
    """The same product, found faulty only where the positions lie otherwise."""
    other = replace(WIDE, height=4, width=16)

    def with_fault(kernels: Sequence[Kernel]) -> list[Compiled]:
        return machine_code(kernels, lambda k: k.launch.constexprs.get("LINE") == 16 and code_of(k.launch) is CODE)

    alone, both = (choose_by_prediction(H100, wanted, with_fault) for wanted in ([WIDE], [WIDE, other]))
    returned = {problem for problem in alone.kernels if alone.kernels[problem] != both.kernels[problem]}
    assert returned
    assert "linear" in {problem.kernel for problem in returned}
    assert all(both.kernels[problem].config == rule(problem, Chip()) for problem in returned)


def test_the_same_candidates_give_the_same_table() -> None:
    tables = [choose_by_prediction(H100, [WIDE, NARROW], machine_code) for _ in range(2)]
    assert tables[0] == tables[1]


def test_predicted_decoders_run_on_triton_and_say_what_the_plain_path_takes_at_least() -> None:
    table = choose_by_prediction(H100, [WIDE, NARROW], machine_code)
    floor = plain_at_least(WIDE.weights(), WIDE.maps(), H100)
    choice = table.decoders[WIDE.problem]
    assert (choice.backend, choice.source, choice.plain_us) == ("triton", "predicted", None)
    assert f"plain {1e6 * floor:.1f} us at least: triton" in choice.why


def test_the_plain_paths_floor_counts_products_and_launches() -> None:
    free = replace(H100, launch_seconds=0.0)
    no_traffic = replace(free, memory=1e30, l2=1e30)
    large = replace(WIDE, batch=64)
    weights = large.weights()
    work = 2 * 64 * 64 * 3 * (weights.hidden * weights.passive + 2 * weights.active * weights.hidden)
    assert plain_at_least(weights, large.maps(), no_traffic) == pytest.approx(work / H100.matrix["bf16"], rel=0.35)
    assert plain_at_least(weights, large.maps(), free) > plain_at_least(weights, large.maps(), no_traffic)
    launches = (plain_at_least(weights, large.maps(), H100) - plain_at_least(weights, large.maps(), free)) / 1.5e-6
    assert 3 * 8 <= round(launches) <= 3 * 30


def test_entries_that_are_predicted_otherwise_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[object, Compiled] = {}
    table = choose_by_prediction(H100, [WIDE], machine_code)
    monkeypatch.setattr(tuning, "shipped_table", lambda chip: table)
    tuning.forget()
    for launch in WIDE.all_launches(Chip()):
        known[tune_predicted.compile_key(launch, 90)] = code_of(launch)
    assert outdated(table, [WIDE], known, H100) == (0, len(table.kernels))  # type: ignore[arg-type]
    problem, entry = next(iter(table.kernels.items()))
    table.kernels[problem] = replace(entry, predicted_us=2 * (entry.predicted_us or 0))
    assert outdated(table, [WIDE, NARROW], known, H100) == (1, len(table.kernels))  # type: ignore[arg-type]


# The command.


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> StubTimer:
    """A card whose times are stubbed."""
    timer = StubTimer(PLAIN_FASTER)
    command = importlib.import_module("cflow_fast.cli.tune")  # of that name the package has the command
    monkeypatch.setattr(command, "_card", lambda name: torch.device("cpu"))
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: CHIP))
    monkeypatch.setattr(tune_card, "CardTimer", lambda device: timer)
    monkeypatch.setattr(warm, "compiling_ahead", lambda wanted, device: contextlib.nullcontext())
    return timer


SMALL = ("--encoder", "resnet18", "--size", "64", "--batch", "1", "--precision", "bf16")


def test_tune_fills_the_cards_cache_and_prints_what_the_dispatcher_takes(card: StubTimer, cache: Path) -> None:
    result = run("tune", *SMALL)
    assert result.exit_code == 0, result.output
    table = read_table(cache)
    assert {problem.features for problem in table.decoders} == {128, 256, 512}
    assert {choice.backend for choice in table.decoders.values()} == {"plain"}
    assert "plain 41.0 us, Triton 52.3 us: plain" in " ".join(result.output.split())
    assert str(cache) in result.output.replace("\n", "")
    assert table.facts["torch"] == torch.__version__
    maps = [problem for problem in table.kernels if problem.kernel == "tail"]
    assert [(problem.rows, problem.numbers) for problem in maps] == [(1, (3, 64, 64))]


def test_tune_of_a_model_takes_its_decoders_precision_and_size(card: StubTimer, cache: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.precision = "fp32"
    model.save(tmp_path / "model.safetensors")
    result = run("tune", tmp_path / "model.safetensors", "--batch", "2", "--output", tmp_path / "mine.json")
    assert result.exit_code == 0, result.output
    assert not cache.exists()
    found = read_table(tmp_path / "mine.json").decoders
    expected = {target.problem for target in model_targets(model, (2,), ("ieee",))}
    assert set(found) == expected


def test_interrupted_tuning_keeps_what_was_measured(
    card: StubTimer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(target: Target, chosen: dict[Problem, Config]) -> Times:
        if card.decoders:
            raise KeyboardInterrupt
        card.decoders.append(chosen)
        return EVEN

    monkeypatch.setattr(card, "decoder", interrupt)
    result = run("tune", *SMALL)
    assert result.exit_code == 130
    assert len(read_table(cache).decoders) == 1
    assert "interrupted" in result.output


def test_a_failure_in_the_middle_keeps_what_was_measured(
    card: StubTimer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(target: Target, chosen: dict[Problem, Config]) -> Times:
        raise LostCardError("an illegal memory access was encountered")

    monkeypatch.setattr(card, "decoder", fail)
    result = run("tune", *SMALL)
    assert result.exit_code == 1
    assert "an illegal memory access was encountered" in result.output
    assert read_table(cache).kernels


def test_tune_without_a_card_is_one_line_and_exit_code_1() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    result = run("tune")
    assert result.exit_code == 1
    assert result.output == "Error: there is no CUDA device here; `--predict H100` makes a table without one\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("m.safetensors", "--size", "64"), 2, "MODEL has an encoder and an image size of its own"),
        (("--predict", "A100"), 2, "'A100' is not one of"),
        (("--precision", "fp16"), 2, "'fp16' is none of"),
        (("--minutes", "0"), 2, "0.0 is not in the range"),
        (("--size", "16", "--encoder", "resnet18"), 2, "smaller than 32"),
        (("--encoder", "no_such_net"), 1, "no_such_net"),
        (("--predict", "H100", *SMALL), 2, "unset TRITON_INTERPRET"),
        (("missing.safetensors",), 1, "missing.safetensors"),
    ],
)
def test_usage_errors_are_clear(card: StubTimer, arguments: Sequence[str], code: int, message: str) -> None:
    result = run("tune", *arguments)
    assert (result.exit_code, message in result.output) == (code, True), result.output


def test_a_file_in_the_way_is_found_before_anything_is_measured(card: StubTimer, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"mine": 1}')
    result = run("tune", *SMALL, "--output", path)
    assert result.exit_code == 1
    assert "mine.json is in the way: it is no tuning table" in result.output.replace("\n", "")
    assert (card.launched, path.read_text()) == ([], '{"mine": 1}')


def test_predicting_needs_no_card_and_writes_the_architectures_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    right = tune_predicted.choose_by_prediction
    monkeypatch.setattr(
        tune_predicted, "choose_by_prediction", lambda card, wanted, report: right(card, wanted, machine_code)
    )
    result = run("tune", "--predict", "H200", *SMALL, "--output", tmp_path / "mine.json")
    assert result.exit_code == 0, result.output
    table = read_table(tmp_path / "mine.json")
    assert (table.card, table.facts["predicted_for"]) == ("sm_90", "H200")
    assert all(entry.source == "predicted" for entry in table.kernels.values())
    assert tuple(card.name for card in CARDS) == PREDICTED_CARDS


def test_every_line_of_a_table_is_told() -> None:
    table = table_of(measured(StubTimer(PLAIN_FASTER)), CHIP.name, 132, {})
    (headings, kernels), (_, decoders) = in_words(table)
    assert (len(kernels), len(decoders)) == (len(table.kernels), len(table.decoders))
    assert {len(row) for row in kernels} == {len(headings)}
    assert decoders == [("D 320, soft, bf16, 64 rows", "plain 41.0 us, Triton 52.3 us: plain")]
    assert all("rows 64, out" in row[1] for row in kernels)


# The suite's step.


def test_the_suite_tunes_for_the_time_that_is_left_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = StubTimer(TRITON_FASTER)
    monkeypatch.setattr(gpu, "TUNED", (("resnet18",), ("bf16",), (64,), (1,)))
    monkeypatch.setattr(gpu, "CardTimer", lambda device: timer)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: CHIP))
    suite = Suite(tmp_path, time.time() + 600, {"card": CHIP.name, "torch": "2", "triton": "3"})
    words = gpu.tuned(suite)
    table = read_table(tmp_path / "tuned.json")
    assert table.card == CHIP.name
    assert {problem.features for problem in table.decoders} == {128, 256, 512}
    lines = [line for line in words.splitlines() if line.startswith("|")]
    assert len(lines) == 4 + len(table.kernels) + len(table.decoders)


def test_a_card_that_dies_while_the_suite_tunes_leaves_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> Iterator[Finding]:
        yield Finding(
            "a", kernel=(Problem("linear", "bf16", 64, (64, 64, 0)), Entry(LinearConfig(64, 64, 64, 4, 4), None, 4.0))
        )
        raise LostCardError("an illegal memory access")

    monkeypatch.setattr(gpu, "choose_by_measurement", dies)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: CHIP))
    suite = Suite(tmp_path, time.time() + 600, {"card": CHIP.name, "torch": "2", "triton": "3"})
    suite.run("tuning", gpu.tuned)
    assert suite.failed
    assert len(read_table(tmp_path / "tuned.json").kernels) == 1


def test_an_error_after_which_the_card_is_silent_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = tune_card.CardTimer(torch.device("cuda", 0))

    def fails(*_: object) -> None:
        raise RuntimeError("out of resource\nhere")

    monkeypatch.setattr(tune_card, "on_device", fails)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    launch = WIDE.all_launches(CHIP)[0]
    with pytest.raises(RuntimeError, match="out of resource"):
        timer.launch(launch)
    monkeypatch.setattr("torch.cuda.synchronize", fails)
    with pytest.raises(LostCardError, match=r"answers nothing any more after: out of resource$"):
        timer.launch(launch)


def loads(alone: float, busy: float) -> Load:
    return Load(alone, 0.0, 0.0, busy, 0.0)


A, B, C = (Problem("linear", "bf16", rows, (64, 64, 0)) for rows in (1, 2, 4))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        pytest.param([[{A: {0: loads(4, 1), 1: loads(3, 2), 2: loads(2, 3)}}]], {A: 2}, id="alone the fastest"),
        pytest.param(
            [[{A: {0: loads(4, 3), 1: loads(3, 6)}}, {B: {0: loads(3, 2)}}]], {A: 0, B: 0}, id="not at all's expense"
        ),
        pytest.param(
            [[{A: {0: loads(4, 3), 1: loads(3, 2)}}, {B: {0: loads(9, 1)}}]], {A: 1, B: 0}, id="where it takes less"
        ),
        pytest.param(
            [[{A: {0: loads(4, 1), 1: loads(3, 2)}}, {B: {0: loads(9, 1)}}]], {A: 0, B: 0}, id="none gains, more taken"
        ),
        pytest.param(
            [[{A: {0: loads(9, 1), 1: loads(2, 5)}}], [{A: {0: loads(4, 4), 1: loads(3, 6)}}, {C: {0: loads(1, 1)}}]],
            {A: 0, C: 0},
            id="no set of decoders pays for another",
        ),
    ],
)
def test_a_configuration_is_chosen_for_the_decoders_that_run_side_by_side(
    groups: list[list[Decoder]], expected: dict[Problem, int]
) -> None:
    assert choose_together(groups) == expected


def test_no_set_of_decoders_is_predicted_slower_than_by_the_rules() -> None:
    group = [replace(WIDE, features=d, height=n, width=n, beside="one") for d, n in ((512, 16), (320, 8))]
    table = choose_by_prediction(H100, group, machine_code)

    def seconds(configs: dict[Problem, Config]) -> float:
        with tuning.trying(configs):
            chains = [[predict(x, code_of(x), H100) for x in target.all_launches(Chip())] for target in group]
        return predict_together(chains, H100)

    chosen = {problem: entry.config for problem, entry in table.kernels.items()}
    assert seconds(chosen) < seconds({})


@pytest.mark.parametrize("permutations", ["soft", "hard"])
def test_decoders_are_timed_both_ways_and_side_by_side(permutations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, under the interpreter, without graphs."""
    target = Target(24, 2, 3, 1, permutations, "ieee", condition=8, blocks=1)
    results: list[torch.Tensor | list[torch.Tensor]] = []

    def run_once(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], None]:
        results.append(run())
        return lambda: time.sleep(1e-4)

    monkeypatch.setattr(tune_card, "captured", run_once)
    monkeypatch.setattr(tune_card, "EFFORT", Effort(seconds=0.05))
    timer = tune_card.CardTimer(torch.device("cpu"))
    times = timer.decoder(target, {})
    assert min(times.triton, times.plain) >= 1e-4
    triton, plain = results
    torch.testing.assert_close(triton, plain, rtol=1e-5, atol=1e-4)
    results.clear()
    problem = Problem("whole_flow", "ieee", 8, (24, 0, int(permutations == "hard")))
    other = candidates(problem, Chip())[0]
    assert timer.side_by_side([target, target], {}, {problem: other}).median > 0
    assert [len(each) for each in results] == [2, 2]
