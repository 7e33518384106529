"""Choosing configurations by measurement, without a card: by stubbed times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from tuning_stubs import (
    CHIP,
    EVEN,
    H100,
    NARROW,
    PLAIN_FASTER,
    TRITON_FASTER,
    WIDE,
    StubTimer,
    is_other,
    measured,
    step,
)

from cflow_fast.bench import tune_card
from cflow_fast.bench.cases import ENCODERS, HEADLINE_ENCODERS
from cflow_fast.bench.measurement import Effort, Ratio
from cflow_fast.bench.prediction import l2_bytes
from cflow_fast.bench.tune import LIGHT, PATIENCE, TIE, Finding, LostCardError, Times, choose_by_measurement, table_of
from cflow_fast.bench.tune_targets import (
    Target,
    candidate_launches,
    families_of,
    model_targets,
    other_way,
    problem_of,
    targets,
    trials,
)
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import Config, LayingConfig, LinearConfig, MergingConfig, Problem, candidates, rule
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.tuning_table import Choice, DecoderProblem, Entry, Table
from cflow_fast.kernels.weights import SoftMixing

pytestmark = pytest.mark.usefixtures("tuning_cache")


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
    """Alone and, for what has a choice of ways, side by side."""
    target, together = replace(WIDE, features=1024, height=16, width=16), set()

    def name(launch: Launch) -> tuple[object, ...]:
        return launch.kernel.__name__, tuple(sorted(launch.constexprs.items(), key=str))

    def in_place(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        with tuning.trying(chosen):
            together.update(name(launch) for target in group for launch in target.all_launches(CHIP))
        return 1e-4

    timer = StubTimer(in_place=in_place)
    measured(timer, target, shipped=tuning.shipped_table(CHIP))
    compiled = {name(launch) for launch in candidate_launches([target], CHIP)}
    assert any(dict(constexprs).get("EPILOGUE") == "offset" for _, constexprs in together), "both ways"
    assert {name(launch) for launch in timer.launched} | together <= compiled


def usual_the_other_way(target: Target = WIDE) -> dict[Problem, Config | None]:
    """What is not tuned, and launched as usual if mixing and first layers are two products."""
    with tuning.trying({}):
        launched = set(target.launches(CHIP))
    way = target.way(CHIP)
    assert way is not None
    problems = {way, *map(problem_of, other_way(target, CHIP))} - launched - {None}
    return {problem: rule(problem, CHIP) for problem in problems if problem is not None}


def test_the_fastest_candidate_is_taken_where_it_is_clearly_faster() -> None:
    timer = StubTimer(slow=lambda launch: 5e-6 if is_other(launch) else 10e-6)
    table = table_of(measured(timer), CHIP.name, 132, {})
    linear = {p: e for p, e in table.kernels.items() if p.kernel == "linear"}
    assert linear
    for problem, entry in linear.items():
        assert step(entry.config) == 64
        assert (entry.source, entry.measured_us) == ("measured", 5.0), problem
    chosen = {p: e.config for p, e in table.kernels.items()}
    assert timer.decoders[-1] == usual_the_other_way() | chosen, "the decoder is timed as chosen"


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
    kept = {p: e.config for p, e in table.kernels.items()}
    assert usual_the_other_way() | kept == (standard if given_back else chosen)
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


BESIDE = [replace(WIDE, beside="soft"), replace(WIDE, features=768, beside="soft")]


def lighter(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
    """Faster with every problem that takes 64 inputs a step."""
    return 1e-4 * 0.9 ** sum(step(config) == 64 for config in chosen.values())


def alone(launch: Launch) -> float:
    """Slower alone, but no more than is tried side by side."""
    return 11e-6 if is_other(launch) else 10e-6


def test_what_is_slower_alone_is_taken_where_decoders_side_by_side_are_faster() -> None:
    timer = StubTimer(slow=alone, in_place=lighter)
    table = table_of(measured(timer, *BESIDE), CHIP.name, 132, {})
    assert table.kernels
    for entry in table.kernels.values():
        assert step(entry.config) == 64
        assert entry.measured_us == 11.0
    usual = table_of(measured(StubTimer(slow=alone), *BESIDE), CHIP.name, 132, {})
    assert all(step(entry.config) == 128 for entry in usual.kernels.values())


@pytest.mark.parametrize(("loses", "taken"), [(1.05, True), (1.2, False)])
def test_a_problem_of_two_sets_of_decoders_is_settled_for_both(loses: float, taken: bool) -> None:
    def in_place(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        factor = 0.9 if group[0].beside == "soft" else loses
        return 1e-4 * factor ** sum(step(config) == 64 for config in chosen.values())

    hard = [replace(target, permutations="hard", beside="hard") for target in BESIDE]
    table = table_of(measured(StubTimer(slow=alone, in_place=in_place), *BESIDE, *hard), CHIP.name, 132, {})
    with tuning.trying({}):
        shared = {problem for target in hard for problem in target.launches(CHIP)}
    assert shared < set(table.kernels)
    for problem, entry in table.kernels.items():
        assert (step(entry.config) == 64) == (taken or problem not in shared)


def test_sets_of_decoders_that_share_a_problem_are_one_family() -> None:
    soft, hard = BESIDE, [replace(target, permutations="hard", beside="hard") for target in BESIDE]
    other = [replace(target, batch=64, beside="many") for target in BESIDE]
    assert families_of([*soft, *other, *hard], CHIP) == [[soft, hard], [other]]


def test_a_configuration_that_fails_side_by_side_is_passed_over() -> None:
    def fails(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        if any(step(config) == 64 for config in chosen.values()):
            raise RuntimeError("out of resource")
        return 1e-4

    table = table_of(measured(StubTimer(slow=alone, in_place=fails), *BESIDE), CHIP.name, 132, {})
    assert all(step(entry.config) == 128 for entry in table.kernels.values())
    assert len(table.decoders) == len(BESIDE)


def test_decoders_that_cannot_be_timed_side_by_side_keep_what_is_fastest_alone() -> None:
    def fails(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        raise RuntimeError("CUDA out of memory")

    found = measured(StubTimer(slow=alone, in_place=fails), *BESIDE)
    assert any(finding.note.endswith("were not timed side by side: CUDA out of memory") for finding in found)
    assert len(table_of(found, CHIP.name, 132, {}).decoders) == len(BESIDE)


def test_trying_side_by_side_leaves_time_to_compare_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cflow_fast.bench.tune.time.monotonic", lambda: now[0])

    def a_second(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        now[0] += 1.0
        return lighter(group, chosen)

    found = list(choose_by_measurement(BESIDE, CHIP, StubTimer(slow=alone, in_place=a_second), until=8.0))
    assert 4 < now[0] < 8
    assert len(table_of(found, CHIP.name, 132, {}).decoders) == len(BESIDE)


def test_a_card_that_is_lost_side_by_side_ends_it_with_what_was_found() -> None:
    def dies(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        raise LostCardError("an illegal memory access")

    found: list[Finding] = []
    with pytest.raises(LostCardError):
        found.extend(choose_by_measurement(BESIDE, CHIP, StubTimer(in_place=dies), time.monotonic() + 60))
    assert found
    assert all(finding.kernel for finding in found)


def test_a_gain_that_is_gone_when_both_are_timed_again_is_none() -> None:
    """A clock that rises makes everything faster that is timed later."""
    times = (1e-4 * 0.9**n for n in range(10**6))
    table = table_of(measured(StubTimer(slow=alone, in_place=lambda *_: next(times)), *BESIDE), CHIP.name, 132, {})
    assert all(step(entry.config) == 128 for entry in table.kernels.values())


@pytest.mark.parametrize(("gain", "given_back"), [(1.05, True), (1.3, False)])
def test_what_two_sets_launch_is_given_back_if_both_together_lose(gain: float, given_back: bool) -> None:
    class Timer(StubTimer):
        def side_by_side(self, group: Sequence[Target], *configs: object) -> Ratio:
            return Ratio(gain, gain, gain) if group[0].beside == "soft" else Ratio(0.9, 0.85, 0.95)

    timer = Timer(slow=lambda launch: 5e-6 if is_other(launch) else 10e-6)
    hard = [replace(target, permutations="hard", beside="hard") for target in BESIDE]
    found = measured(timer, *BESIDE, *hard)
    assert any("given back" in finding.note for finding in found) == given_back
    table = table_of(found, CHIP.name, 132, {})
    with tuning.trying({}):
        shared = {problem for target in hard for problem in target.launches(CHIP)}
    for problem, entry in table.kernels.items():
        returned = step(entry.config) == 128
        assert returned == (given_back and problem in shared)


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
        DecoderProblem(512, 128, 3, "soft", "bf16", 64),
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
    results.clear()
    seconds = timer.together([target, target])
    assert not results, "nothing runs before it is asked"
    assert min(seconds({problem: config}) for config in (other, other)) >= 1e-4
    assert [len(each) for each in results] == [2, 2]


HARD = replace(WIDE, permutations="hard", beside="one model")
LAYING = Problem("laying", "bf16", 64, (256,))
LAID_DOWN, INDEXED = LayingConfig(True), LayingConfig(False)


@pytest.mark.parametrize("group", [(HARD,), (HARD, replace(HARD, features=768))], ids=["alone", "side by side"])
@pytest.mark.parametrize("laid_down", [0.9e-4, 1.1e-4], ids=["faster", "slower"])
def test_a_factor_is_laid_down_where_that_makes_decoders_faster(group: tuple[Target, ...], laid_down: float) -> None:
    def in_place(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        return laid_down if chosen[LAYING] == LAID_DOWN else 1e-4

    timer = StubTimer(in_place=in_place)
    table = table_of(measured(timer, *group), CHIP.name, 132, {})
    if laid_down > 1e-4:
        assert LAYING not in table.kernels
        return
    assert table.kernels[LAYING] == Entry(LAID_DOWN, None, 90.0)
    assert all(chosen[LAYING] == LAID_DOWN for chosen in timer.decoders), "decoders are timed as chosen"
    assert timer.compared[0][0][LAYING] == INDEXED


def test_what_was_laid_down_in_vain_is_given_back() -> None:
    def in_place(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        return 0.9e-4 if chosen[LAYING] == LAID_DOWN else 1e-4

    timer = StubTimer(in_place=in_place, faster=Ratio(0.9, 0.85, 0.95))
    table = table_of(measured(timer, HARD), CHIP.name, 132, {})
    assert table.kernels[LAYING] == Entry(INDEXED, None, 100.0)


@pytest.mark.parametrize(
    ("target", "choice"),
    [
        (HARD, True),
        (WIDE, True),
        (replace(WIDE, blocks=1), False),
        (NARROW, False),
        (replace(HARD, precision="tf32"), False),
        (replace(WIDE, precision="tf32"), False),
    ],
    ids=["hard", "soft", "nothing to merge with", "whole in one kernel", "hard, tf32", "soft, tf32"],
)
def test_only_wide_decoders_in_bf16_leave_a_choice_of_ways(target: Target, choice: bool) -> None:
    assert (target.way(CHIP) is not None) == choice


def test_what_a_table_says_of_laying_is_launched() -> None:
    def names() -> set[str]:
        return {launch.kernel.__name__ for launch in HARD.all_launches(CHIP)}

    with tuning.trying({}):
        assert HARD.way(CHIP) == LAYING
        assert "packing_kernel" not in names()
    with tuning.trying({LAYING: LAID_DOWN}):
        assert "packing_kernel" in names()
    compiled = {launch.kernel.__name__ for launch in candidate_launches([HARD], CHIP)}
    assert "packing_kernel" in compiled


SOFT = replace(WIDE, beside="one model")
MERGING = SOFT.way(CHIP)


@pytest.mark.parametrize("split", [0.9e-4, 1.1e-4], ids=["faster", "slower"])
def test_two_products_are_one_unless_decoders_are_slower_with_it(split: float) -> None:
    def in_place(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        return 1e-4 if chosen[MERGING] == MergingConfig(True) else split

    timer = StubTimer(in_place=in_place)
    table = table_of(measured(timer, SOFT), CHIP.name, 132, {})
    if split > 1e-4:
        assert MERGING not in table.kernels
        return
    assert table.kernels[MERGING] == Entry(MergingConfig(False), None, 90.0)
    assert all(chosen[MERGING] == MergingConfig(False) for chosen in timer.decoders)


def test_what_is_compared_with_one_product_is_launched_as_shipped() -> None:
    """What no launch of the rule's way poses is not tuned: it must not be timed in worse tiles than are launched."""
    problem = next(p for launch in other_way(SOFT, CHIP) if (p := problem_of(launch)) and p.numbers == (512, 512, 0))
    shipped = next(config for config in candidates(problem, CHIP) if config != rule(problem, CHIP))
    assert isinstance(shipped, LinearConfig)
    seen: list[Config | None] = []

    def in_place(group: Sequence[Target], chosen: Mapping[Problem, Config]) -> float:
        seen.append(chosen.get(problem))
        return 1e-4

    timer = StubTimer(in_place=in_place)
    table = Table(CHIP.name, 132, {problem: Entry(shipped, 1.0)})
    list(choose_by_measurement((SOFT,), CHIP, timer, until=float("inf"), shipped=table))
    assert set(seen) == {shipped}
    assert {chosen[problem] for chosen in timer.decoders} == {shipped}
