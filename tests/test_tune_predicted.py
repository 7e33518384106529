"""Choosing configurations by prediction, of stubbed machine code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tuning_stubs import CODE, H100, NARROW, WIDE, code_of, machine_code

from cflow_fast.bench import tune_predicted
from cflow_fast.bench.aot import Kernel
from cflow_fast.bench.compiled import Compiled, Loop
from cflow_fast.bench.plain_floor import plain_at_least
from cflow_fast.bench.prediction import predict, predict_at_least, predict_together
from cflow_fast.bench.tune import TIE
from cflow_fast.bench.tune_predicted import choose_by_prediction, outdated
from cflow_fast.bench.tune_targets import trials
from cflow_fast.bench.tune_together import Decoder, Load, choose_together
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import Config, Problem, candidates, rule
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.tuning_table import Entry

pytestmark = pytest.mark.usefixtures("tuning_cache")


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
    linear = [problem for problem in free.kernels if problem.kernel == "linear"]
    usual = {rule(problem, Chip()).stages for problem in linear}  # type: ignore[union-attr]
    banned = max({free.kernels[problem].config.stages for problem in linear} - usual)  # type: ignore[union-attr]

    def without(kernels: Sequence[Kernel]) -> list[Compiled]:
        return machine_code(kernels, lambda kernel: is_banned(kernel.launch))

    def is_banned(launch: Launch) -> bool:
        return launch.kernel.__name__ == "linear_kernel" and launch.options["num_stages"] == banned

    table = choose_by_prediction(H100, [WIDE], without)
    assert all(table.kernels[problem].config.stages != banned for problem in linear)  # type: ignore[union-attr]
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
    launches = (
        plain_at_least(weights, large.maps(), H100) - plain_at_least(weights, large.maps(), free)
    ) / H100.launch_seconds
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
    group = [replace(WIDE, features=d, height=n, width=n, beside="one") for d, n in ((512, 16), (768, 8))]
    table = choose_by_prediction(H100, group, machine_code)

    def seconds(configs: dict[Problem, Config]) -> float:
        with tuning.trying(configs):
            chains = [[predict(x, code_of(x), H100) for x in target.all_launches(Chip())] for target in group]
        return predict_together(chains, H100)

    chosen = {problem: entry.config for problem, entry in table.kernels.items()}
    assert seconds(chosen) < seconds({})
