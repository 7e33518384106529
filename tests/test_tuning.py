"""Tables before rules: what is looked up where, what is passed over, and what is never lost."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flows import rough_decoder

from cflow_fast import ops
from cflow_fast.bench.headline import PRECISIONS
from cflow_fast.bench.tune_targets import other_way, problem_of, targets
from cflow_fast.errors import CFlowFastError
from cflow_fast.folding import fold_weights
from cflow_fast.kernels import configs, tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import LinearConfig, MergingConfig, Problem, TailConfig, candidates, rule
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.triton_flow import TritonFlow
from cflow_fast.kernels.tuned_flow import TunedFlow
from cflow_fast.kernels.tuning_table import (
    BACKENDS,
    Choice,
    DecoderProblem,
    Entry,
    Table,
    as_text,
    read_table,
    store,
)
from cflow_fast.kernels.whole_flow_weights import PRECISIONS as WHOLE_PRECISIONS
from cflow_fast.positional import encoding_factors
from cflow_fast.precision import arithmetic

CARD = Chip((9, 0), 132, "NVIDIA H100 80GB HBM3")
PROBLEM = Problem("linear", "bf16", 1024, (320, 704, 0))
OPTIONS = candidates(PROBLEM, CARD)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty ones for the shipped tables and the card's own."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("CFLOW_FAST_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield
    tuning.forget()


def write(path: Path, table: Table) -> None:
    store(table, path)
    tuning.forget()


def own(*entries: tuple[Problem, Entry], card: str = CARD.name) -> Table:
    return Table(card, 132, dict(entries))


def selected(rows: int = 1024, chip: Chip = CARD) -> LinearConfig:
    return tuning.select_linear(rows, *PROBLEM.numbers[:2], "bf16", chip)


def by_rule(rows: int = 1024) -> LinearConfig:
    return configs.select_linear(rows, *PROBLEM.numbers[:2], "bf16", CARD)


def test_the_cards_own_table_comes_before_the_shipped_one_and_that_before_the_rules() -> None:
    assert selected() == by_rule() == OPTIONS[0]
    write(tuning.shipped_path((9, 0)), own((PROBLEM, Entry(OPTIONS[1], 3.0)), card="sm_90"))
    assert selected() == OPTIONS[1]
    write(tuning.cache_path(CARD.name), own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0))))
    assert selected() == OPTIONS[2]
    assert selected(chip=Chip((9, 0), 132)) == OPTIONS[1], "a card without a name has no table of its own"


def test_the_shipped_table_is_for_cards_of_its_size() -> None:
    write(tuning.shipped_path((9, 0)), own((PROBLEM, Entry(OPTIONS[1], 3.0)), card="sm_90"))
    assert selected(chip=Chip((9, 0), 114)) == configs.select_linear(1024, 320, 704, "bf16", Chip((9, 0), 114))


@pytest.mark.parametrize(("rows", "stands_for"), [(1, 1), (2, 2), (3, 4), (1023, 1024), (1024, 1024), (1025, 2048)])
def test_a_power_of_two_stands_for_the_rows_up_to_it(rows: int, stands_for: int) -> None:
    assert tuning.bucket(rows) == stands_for


def test_rows_of_one_bucket_share_an_entry_and_the_next_ones_do_not() -> None:
    write(tuning.cache_path(CARD.name), own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0))))
    assert selected(513) == selected(1024) == OPTIONS[2]
    assert selected(512) == by_rule(512)
    assert selected(1025) == by_rule(1025)


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("select_coupling", (1024, 704, 320, "bf16", CARD), Problem("coupling", "bf16", 1024, (704, 320))),
        ("select_whole_flow", (CARD, 60, 2048, "tf32", False, True), Problem("whole_flow", "tf32", 2048, (60, 0, 1))),
        ("select_tail", (3, 8, 250, 256, CARD), Problem("tail", "fp32", 8, (3, 250, 256))),
        ("select_linear", (9, 64, 64, "ieee", CARD, True), Problem("linear", "ieee", 16, (64, 64, 1))),
    ],
)
def test_every_kind_of_kernel_is_looked_up(name: str, arguments: tuple[object, ...], problem: Problem) -> None:
    select = getattr(tuning, name)
    usual, other = candidates(problem, CARD)[:2]
    assert select(*arguments) == usual
    write(tuning.cache_path(CARD.name), own((problem, Entry(other, None, 4.0))))
    assert select(*arguments) == other


def test_tables_are_read_once_by_however_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    write(tuning.cache_path(CARD.name), own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0))))
    read: list[Path] = []
    monkeypatch.setattr(tuning, "read_table", lambda path: read.append(path) or read_table(path))  # type: ignore[func-returns-value]
    found: list[LinearConfig] = []
    threads = [threading.Thread(target=lambda rows=rows: found.append(selected(rows))) for rows in range(600, 616)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [OPTIONS[2]] * 16
    assert len(read) == len(set(read)) == 2


DAMAGED = {
    "cut short": lambda text: text[: len(text) // 2],
    "something else": lambda text: "[1, 2]",
    "no table": lambda text: '{"weights": 3}',
    "not even text": lambda text: "\x00\x01",
    "without a card": lambda text: text.replace('"card"', '"cart"'),
    "of a newer version": lambda text: text.replace('"format": 1', '"format": 2'),
    "of another card": lambda text: text.replace(CARD.name, "NVIDIA A100"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_table_that_cannot_be_used_is_named_once_and_never_written_over(damage: str) -> None:
    path = tuning.cache_path(CARD.name)
    table = own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0)))
    write(path, table)
    spoilt = DAMAGED[damage](path.read_text())
    assert spoilt != path.read_text()
    path.write_text(spoilt)
    with pytest.warns(UserWarning, match=path.name) as said:
        found = selected(), selected(700)
    assert found == (by_rule(), by_rule(700))
    assert len(said) == 1
    with pytest.raises(CFlowFastError, match=f"{path.name} is in the way"):
        store(table, path)
    assert path.read_text() == spoilt


def test_a_cache_that_cannot_be_read_is_said_and_no_crash() -> None:
    path = tuning.cache_path(CARD.name)
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="passed over, defaults apply: Is a directory"):
        assert selected() == by_rule()


def changed(**values: object) -> str:
    """A table's text whose one configuration has other values."""
    row = json.loads(as_text(own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0)))))
    row["kernels"][0]["config"] |= values
    return json.dumps(row)


@pytest.mark.parametrize(
    "values",
    [{"block_rows": 96}, {"block_rows": "128"}, {"stages": 9}, {"block_k": 1024}, {"warps": [4]}, {"split_k": 0}],
    ids=str,
)
def test_a_configuration_that_would_not_be_launched_is_passed_over_and_said(values: dict[str, object]) -> None:
    path = tuning.cache_path(CARD.name)
    path.parent.mkdir()
    path.write_text(changed(**values))
    with pytest.warns(UserWarning, match="would not launch"):
        assert selected() == by_rule()


def test_entries_with_fields_that_this_version_does_not_know_are_left_out_and_others_count() -> None:
    other = PROBLEM._replace(rows=64)
    text = as_text(own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0)), (other, Entry(candidates(other, CARD)[3], 3.0, 4.0))))
    content = json.loads(text)
    (row,) = (row for row in content["kernels"] if row["rows"] == 1024)
    row["config"]["clusters"] = 2
    content["kernels"] += [{"kernel": "attention"}, None, 3]
    content["decoders"] += [{"backend": "triton"}, "?"]
    path = tuning.cache_path(CARD.name)
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selected() == by_rule()
        assert selected(64) == candidates(other, CARD)[3]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"multiprocessors": 114}, "it is of a card with 114 multiprocessors, this one has 132"),
        ({"facts": {"torch": "1.0"}}, f"it was measured with torch 1.0, this is {torch.__version__}"),
        ({"facts": {"triton": "1.0"}}, "it was measured with triton 1.0, this is "),
    ],
)
def test_what_was_measured_elsewhere_or_long_ago_is_passed_over_and_said(
    changes: dict[str, object], reason: str
) -> None:
    table = replace(own((PROBLEM, Entry(OPTIONS[1], None, 2.0))), **changes)  # type: ignore[arg-type]
    write(tuning.cache_path(CARD.name), table)
    with pytest.warns(UserWarning, match=re.escape(reason)):
        assert selected() == by_rule()


def test_numbers_are_those_of_the_candidate_and_not_the_files() -> None:
    write(tuning.cache_path(CARD.name), own((PROBLEM, Entry(OPTIONS[1], None, 2.0))))
    path = tuning.cache_path(CARD.name)
    whole = f'"block_rows": {OPTIONS[1].block_rows}'  # type: ignore[union-attr]
    assert whole in path.read_text()
    path.write_text(path.read_text().replace(whole, f"{whole}.0"))
    tuning.forget()
    assert selected() == OPTIONS[1]
    assert isinstance(selected().block_rows, int)


def test_a_number_without_an_end_is_damage_like_any_other() -> None:
    write(tuning.cache_path(CARD.name), own((PROBLEM, Entry(OPTIONS[1], None, 2.0))))
    path = tuning.cache_path(CARD.name)
    path.write_text(path.read_text().replace('"rows": 1024', '"rows": Infinity'))
    tuning.forget()
    assert selected() == by_rule()


@pytest.mark.parametrize(("features", "own_condition"), [(160, True), (256, False)], ids=["own condition", "soft"])
def test_a_configuration_for_the_other_kind_of_rows_is_passed_over(features: int, own_condition: bool) -> None:
    """Registers hold no condition of their own beside some tiles; others are for one kind of permutations alone."""
    tiles = configs._WHOLE_FLOW_HOPPER["bf16"][96 if own_condition else features // 2]
    unfit = next(c for c in tiles if c.hard or not c.own_condition)
    problem = Problem("whole_flow", "bf16", 65536, (features, int(own_condition), 0))
    write(tuning.cache_path(CARD.name), own((problem, Entry(unfit, None, 4.0))))
    with pytest.warns(UserWarning, match="would not launch"):
        found = tuning.select_whole_flow(CARD, features, 65536, "bf16", own_condition)
    assert found == rule(problem, CARD) != unfit


def test_what_is_measured_later_is_merged_and_predictions_replace_no_measurement() -> None:
    path = tuning.cache_path(CARD.name)
    another = PROBLEM._replace(rows=64)
    decoder = DecoderProblem(512, 128, 8, "soft", "bf16", 1024)
    measured = Choice("plain", "faster", "measured", 50.0, 41.0)
    first = Table(CARD.name, 132, {PROBLEM: Entry(OPTIONS[1], None, 5.0)}, {decoder: measured}, {"torch": "2"})
    store(first, path)
    expected = Choice("triton", "predicted", "predicted", 45.0, None)
    store(
        Table(CARD.name, 132, {PROBLEM: Entry(OPTIONS[2], 3.0), another: Entry(OPTIONS[0], 2.0)}, {decoder: expected}),
        path,
    )
    table = read_table(path)
    assert table.kernels == {PROBLEM: Entry(OPTIONS[1], None, 5.0), another: Entry(OPTIONS[0], 2.0)}
    assert table.decoders == {decoder: measured}
    store(own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0))), path)
    assert read_table(path).kernels[PROBLEM].config == OPTIONS[2]
    assert read_table(path).facts == {"torch": "2"}


def test_a_table_that_cannot_be_finished_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuning.cache_path(CARD.name)
    write(path, own((PROBLEM, Entry(OPTIONS[2], 3.0, 4.0))))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(CFlowFastError, match="No space left"):
        store(own((PROBLEM, Entry(OPTIONS[1], 3.0, 4.0))), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_was_measured_stands_beside_what_was_predicted_with_their_ratio() -> None:
    table = own((PROBLEM, Entry(OPTIONS[2], 4.0, 5.0)), (PROBLEM._replace(rows=8), Entry(OPTIONS[0], 4.0)))
    rows = {row["rows"]: row for row in json.loads(as_text(table))["kernels"]}
    assert (rows[1024]["source"], rows[1024]["ratio"]) == ("measured", 1.25)
    assert (rows[8]["source"], rows[8]["ratio"], rows[8]["measured_us"]) == ("predicted", None, None)


def test_the_cache_is_where_users_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.cache_path(CARD.name).name == "nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("CFLOW_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert tuning.cache_path("A 1").as_posix() == "/xdg/cflow_fast/a-1.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert tuning.cache_path("A 1").as_posix() == "/home/someone/.cache/cflow_fast/a-1.json"


PROBLEMS = [
    *(Problem("linear", p, rows, (512, 1280, r)) for p in PRECISIONS for rows in (1, 64, 2048, 32768) for r in (0, 1)),
    *(Problem("coupling", p, rows, (768, 256)) for p in PRECISIONS for rows in (1, 64, 2048, 32768)),
    *(Problem("whole_flow", p, 1, (64, own, hard)) for p in WHOLE_PRECISIONS for own in (0, 1) for hard in (0, 1)),
    *(Problem("tail", "fp32", batch, (scales, 256, 40)) for batch in (1, 32) for scales in (3, 8)),
]  # fmt: skip


@pytest.mark.parametrize("capability", sorted(configs.SHARED_MEMORY))
def test_candidates_are_distinct_fit_the_chip_and_begin_with_the_rules(capability: tuple[int, int]) -> None:
    chip = Chip(capability, 132)
    for problem in PROBLEMS:
        found = candidates(problem, chip)
        assert found[0] == rule(problem, chip)
        assert len(found) == len(set(found)) > (problem.kernel in ("linear", "coupling", "tail"))
        for config in found:
            if isinstance(config, configs.ProductConfig):
                out = config.block_out * (2 if problem.kernel == "coupling" else 1)
                x, w = configs.OPERAND_BYTES.get(problem.precision, (4, 4))
                shared = (x * config.block_rows + w * out) * config.block_k * config.stages
                assert shared <= configs.SHARED_MEMORY[capability] * 1024
                steps = -(-problem.numbers[0] // config.block_k)
                assert (config.split_k - 1) * -(-steps // config.split_k) < steps, "no split is idle"
                assert out <= (128 if problem.kernel == "linear" and problem.numbers[2] else 256)
            if isinstance(config, TailConfig):
                assert 32 * config.warps <= config.columns


def test_a_decoder_too_wide_for_one_kernel_has_no_candidates() -> None:
    assert candidates(Problem("whole_flow", "bf16", 64, (2048, 0, 0)), CARD) == []


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.undo()
    return read_table(tuning.shipped_path((9, 0)))


def test_every_shipped_entry_is_a_candidate_that_was_predicted_or_measured(shipped: Table) -> None:
    text = json.loads(shipped.path.read_text())  # type: ignore[union-attr]
    assert len(text["kernels"]) == len(shipped.kernels)
    assert len(text["decoders"]) == len(shipped.decoders)
    assert (shipped.card, shipped.multiprocessors) == ("sm_90", 132)
    for problem, entry in shipped.kernels.items():
        assert tuning.bucket(problem.rows) == problem.rows
        assert entry.config in candidates(problem, Chip())
        assert entry.predicted_us is not None or entry.measured_us is not None
        assert entry.source == ("predicted" if entry.measured_us is None else "measured")
    for choice in shipped.decoders.values():
        assert choice.backend in BACKENDS
        assert choice.backend in choice.why
    assert as_text(shipped) == shipped.path.read_text(), "as the command writes it"  # type: ignore[union-attr]


def test_wide_resnet50s_decoders_need_no_rule_in_bf16_and_tf32(shipped: Table) -> None:
    for target in targets(("wide_resnet50_2",), ("bf16", "tf32")):
        with tuning.trying({}):
            assert set(target.launches(Chip())) <= set(shipped.kernels)
        assert target.problem in shipped.decoders
    measured = {problem for problem, entry in shipped.kernels.items() if entry.measured_us is not None}
    for target in targets(("wide_resnet50_2",), ("bf16",), (256,), (1, 32)):
        with tuning.trying({}):
            launched = set(target.launches(Chip()))
        if target.batch == 1 and target.permutations == "soft":
            with tuning.trying({way: MergingConfig(False)} if (way := target.way(Chip())) else {}):
                launched = set(target.launches(Chip()))  # one product instead of two has not been on a card
        assert launched <= measured


def test_every_shipped_product_is_asked_for_by_a_usual_decoder(shipped: Table) -> None:
    """Either way: tuning on a card may take the other one."""
    asked: set[Problem] = set()
    for target in targets():
        with tuning.trying({}):
            asked |= set(target.launches(Chip()))
        asked |= {problem for launch in other_way(target, Chip()) if (problem := problem_of(launch))}
    products = {problem for problem in shipped.kernels if problem.kernel in ("linear", "coupling")}
    assert products <= asked


def test_what_is_shipped_is_launched(shipped: Table) -> None:
    tuning.forget()
    changed = {p: e.config for p, e in shipped.kernels.items() if e.config != rule(p, Chip())}
    assert changed
    for problem, config in changed.items():
        assert tuning._config(problem, Chip()) == config


# The dispatcher.

FEATURES, CONDITION, SIDES = 24, 8, (3, 5)


def tuned_flow(precision: str = "fp32", features: int = FEATURES) -> TunedFlow:
    decoder = rough_decoder(features, CONDITION, coupling_blocks=2)
    how = arithmetic(precision, CPU)
    return TunedFlow(fold_weights(decoder, how.storage), ops.KERNEL_PRECISIONS[precision], how.operands)


def decoder_table(backend: str, rows: int) -> None:
    problem = DecoderProblem(FEATURES, CONDITION, 2, "hard", "ieee", rows)
    choice = Choice(backend, f"plain 1.0 us, Triton 2.0 us: {backend}", "measured", 2.0, 1.0)
    write(tuning.shipped_path((9, 0)), Table("sm_90", 132, decoders={problem: choice}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    for kind in (TritonFlow, TorchFlow):
        for name in ("log_prob_map", "rows"):

            def call(
                flow: object, *args: object, _right: object = getattr(kind, name), _kind: type = kind, **more: object
            ) -> object:
                made.append(_kind.__name__)
                return _right(flow, *args, **more)  # type: ignore[operator]

            monkeypatch.setattr(kind, name, call)
    return made


def test_the_dispatcher_takes_for_each_number_of_rows_what_the_table_names(calls: list[str]) -> None:
    decoder_table("plain", 32)  # 17 to 32 positions
    flow, encoding = tuned_flow(), encoding_factors(CONDITION, *SIDES)
    exact = TorchFlow(flow.weights, torch.float32, packed=False)
    for batch, expected in ((1, "TritonFlow"), (2, "TorchFlow"), (3, "TritonFlow")):
        maps = torch.randn(batch, FEATURES, *SIDES)
        calls.clear()
        log_prob = flow.log_prob_map(maps, encoding)
        assert calls == [expected]
        torch.testing.assert_close(log_prob, exact.log_prob_map(maps, encoding), rtol=1e-5, atol=1e-4)
    calls.clear()
    flow.rows(torch.randn(20, FEATURES), torch.randn(20, CONDITION), want_u=False)
    assert calls == ["TritonFlow"], "loose rows were not measured"


@pytest.mark.parametrize(("precision", "taken"), [("fp32", "plain"), ("tf32x3", "triton")])
def test_many_rows_of_a_narrow_decoder_are_left_to_the_library_without_matrix_units(precision: str, taken: str) -> None:
    flow = tuned_flow(precision)
    flow.triton.precision = {"fp32": "ieee"}.get(precision, precision)
    assert (flow.backend(4096), flow.backend(4097)) == ("triton", taken)
    assert flow._unmeasured(4097, own_condition=True) == taken


def test_the_plain_path_is_made_when_it_is_first_needed_and_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_table("plain", 32)
    made: list[object] = []
    right = TorchFlow.__init__
    monkeypatch.setattr(TorchFlow, "__init__", lambda *a, **k: made.append(a) or right(*a, **k))  # type: ignore[func-returns-value]
    flow, encoding = tuned_flow(), encoding_factors(CONDITION, *SIDES)
    flow.log_prob_map(torch.randn(1, FEATURES, *SIDES), encoding)
    assert not made
    run, interpreter = Launch.run, threading.Lock()  # which knows one thread

    def one_by_one(launch: Launch) -> None:
        with interpreter:
            run(launch)

    monkeypatch.setattr(Launch, "run", one_by_one)
    maps = [torch.randn(2, FEATURES, *SIDES) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: flow.log_prob_map(one, encoding), maps))
    assert len(made) == 1
    for answer, one in zip(answers, maps, strict=True):
        torch.testing.assert_close(answer, flow.triton.log_prob_map(one, encoding), rtol=1e-5, atol=1e-4)


def test_nothing_is_made_inside_a_capture(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_table("plain", 32)
    flow, encoding = tuned_flow(), encoding_factors(CONDITION, *SIDES)
    maps = torch.randn(2, FEATURES, *SIDES)
    capturing = [True]
    monkeypatch.setattr("cflow_fast.kernels.tuned_flow.in_capture", lambda device: capturing[0])
    flow.log_prob_map(maps, encoding)
    capturing[0] = False
    flow.log_prob_map(maps, encoding)
    capturing[0] = True
    flow.log_prob_map(maps, encoding)
    flow.log_prob_map(torch.randn(4, FEATURES, 2, 3), encoding_factors(CONDITION, 2, 3))
    assert calls == ["TritonFlow", "TorchFlow", "TorchFlow", "TritonFlow"], "tables for 2 x 3 were not there"


def test_float32_stays_float32_where_tf32_was_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_table("plain", 32)
    flow = tuned_flow()
    assert flow.backend(30) == "plain"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert flow.backend(30) == "triton"


@pytest.mark.parametrize(
    ("precision", "features", "expected"),
    [("fp32", 80, "TorchFlow"), ("fp32", 24, "TritonFlow"), ("tf32x3", 80, "TritonFlow")],
    ids=["wide", "narrow", "by tf32"],
)
def test_where_no_table_says_wide_decoders_in_fp32_take_the_librarys_products(
    precision: str, features: int, expected: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = tuned_flow(precision, features)
    maps, z, c = torch.randn(1, features, *SIDES), torch.randn(20, features), torch.randn(20, CONDITION)
    answers = flow.log_prob_map(maps, encoding_factors(CONDITION, *SIDES)), flow.rows(z, c, want_u=True).log_prob
    assert calls == [expected] * 2
    exact = flow.plain()
    tolerance = {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(answers[0], exact.log_prob_map(maps, encoding_factors(CONDITION, *SIDES)), **tolerance)
    torch.testing.assert_close(answers[1], exact.rows(z, c, want_u=False).log_prob, **tolerance)
    calls.clear()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    flow.rows(z, c, want_u=False)
    assert calls == ["TritonFlow"]


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_parity_compares_what_is_taken_and_what_is_not(backend: str, calls: list[str]) -> None:
    decoder_table(backend, 32)
    flow, how = tuned_flow(), arithmetic("fp32", torch.device("cpu"))
    name, other = ops.other_way(flow, how, 32) or ("", flow)
    assert {ops.implementation(flow, 32), name} == {"torch", "triton"}
    maps, encoding = torch.randn(2, FEATURES, *SIDES), encoding_factors(CONDITION, *SIDES)
    taken, compared = flow.log_prob_map(maps, encoding), other.log_prob_map(maps, encoding)
    assert calls == (["TorchFlow", "TritonFlow"] if backend == "plain" else ["TritonFlow", "TorchFlow"])
    torch.testing.assert_close(taken, compared, rtol=1e-5, atol=1e-4)
    assert ops.other_way(flow.triton, how) is None, "forced: there is nothing beside it"


def test_where_pytorch_does_not_say_how_it_multiplies_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("PyTorch is checking whether allow_tf32_new is enabled")

    decoder_table("plain", 32)
    flow = tuned_flow()
    assert flow.backend(32) == "plain"
    assert ops.implementation(flow, 32) == "torch"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert flow.backend(32) == "triton"
    assert ops.implementation(flow, 32) == "triton"


def test_a_forced_backend_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = rough_decoder(FEATURES, CONDITION, coupling_blocks=1)
    weights, how = fold_weights(decoder, torch.float32), arithmetic("fp32", CPU)
    monkeypatch.setattr(ops, "backend", lambda device: "triton")
    assert isinstance(ops.prepare_flow(weights, how), TunedFlow)
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    assert isinstance(ops.prepare_flow(weights, how), TritonFlow)
    monkeypatch.undo()
    assert not isinstance(ops.prepare_flow(weights, how), (TunedFlow, TritonFlow))
