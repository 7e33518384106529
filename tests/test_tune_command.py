"""`cflow-fast tune` and the suite's step, on a card whose times are stubbed."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cli import run
from tiny import tiny_model
from tuning_stubs import CHIP, EVEN, PLAIN_FASTER, TRITON_FASTER, StubTimer, machine_code, measured

from cflow_fast.bench import gpu, tune_card, tune_predicted, warm
from cflow_fast.bench.gpu import Suite
from cflow_fast.bench.prediction import CARDS
from cflow_fast.bench.tune import Finding, LostCardError, Times, in_words, table_of
from cflow_fast.bench.tune_targets import Target, model_targets
from cflow_fast.cli.tune import PREDICTED_CARDS
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import Config, LinearConfig, Problem
from cflow_fast.kernels.tuning_table import Entry, read_table

pytestmark = pytest.mark.usefixtures("tuning_cache")


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


def test_tune_fills_the_cards_cache_and_prints_what_the_dispatcher_takes(card: StubTimer, tuning_cache: Path) -> None:
    result = run("tune", *SMALL)
    assert result.exit_code == 0, result.output
    table = read_table(tuning_cache)
    assert {problem.features for problem in table.decoders} == {128, 256, 512}
    assert {choice.backend for choice in table.decoders.values()} == {"plain"}
    assert "plain 41.0 us, Triton 52.3 us: plain" in " ".join(result.output.split())
    assert str(tuning_cache) in result.output.replace("\n", "")
    assert table.facts["torch"] == torch.__version__
    maps = [problem for problem in table.kernels if problem.kernel == "tail"]
    assert [(problem.rows, problem.numbers) for problem in maps] == [(1, (3, 64, 64))]


def test_tune_of_a_model_takes_its_decoders_precision_and_size(
    card: StubTimer, tuning_cache: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    model.precision = "fp32"
    model.save(tmp_path / "model.safetensors")
    result = run("tune", tmp_path / "model.safetensors", "--batch", "2", "--output", tmp_path / "mine.json")
    assert result.exit_code == 0, result.output
    assert not tuning_cache.exists()
    found = read_table(tmp_path / "mine.json").decoders
    expected = {target.problem for target in model_targets(model, (2,), ("ieee",))}
    assert set(found) == expected


def test_interrupted_tuning_keeps_what_was_measured(
    card: StubTimer, tuning_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(target: Target, chosen: dict[Problem, Config]) -> Times:
        if card.decoders:
            raise KeyboardInterrupt
        card.decoders.append(chosen)
        return EVEN

    monkeypatch.setattr(card, "decoder", interrupt)
    result = run("tune", *SMALL)
    assert result.exit_code == 130
    assert len(read_table(tuning_cache).decoders) == 1
    assert "interrupted" in result.output


def test_a_failure_in_the_middle_keeps_what_was_measured(
    card: StubTimer, tuning_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(target: Target, chosen: dict[Problem, Config]) -> Times:
        raise LostCardError("an illegal memory access was encountered")

    monkeypatch.setattr(card, "decoder", fail)
    result = run("tune", *SMALL)
    assert result.exit_code == 1
    assert "an illegal memory access was encountered" in result.output
    assert read_table(tuning_cache).kernels


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
        (("--precision", "fp8"), 2, "'fp8' is none of"),
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
    assert decoders == [("D 512, soft, bf16, 64 rows", "plain 41.0 us, Triton 52.3 us: plain")]
    assert all("rows 64, out" in row[1] for row in kernels)


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
