"""Every benchmark runs on tiny shapes; bad input is found before anything is measured; Ctrl-C keeps the rows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import report_results as made
from cli import files, run

from cflow_fast.bench import session
from cflow_fast.bench.contenders import OURS, Contender
from cflow_fast.bench.decoder import CONTENDERS, ours
from cflow_fast.bench.measurement import MATRIX_SIZES
from cflow_fast.bench.results import read_results, write_results
from cflow_fast.bench.scaling import Spans
from cflow_fast.cli import main
from cflow_fast.cli.bench_tables import command_line

TINY = ("--encoder", "mobilenetv3_large_100", "--rounds", "2", "--device", "cpu")
TINY_DECODER = ("decoder", *TINY, "--size", "32", "--precision", "fp32")
RESNET = ("--size", "64", "--precision", "fp32", "--against", "freia,padim,spade", "--encoder", "resnet18")


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's matrix rate, for a moment of the test's time."""
    monkeypatch.setitem(MATRIX_SIZES, "cpu", 64)


def bench(*arguments: object) -> Any:
    return run("bench", *arguments)


@pytest.mark.parametrize(
    ("command", "contenders"),
    [
        (("decoder", "--size", "32", "--precision", "fp32"), {OURS, "freia"}),
        (("map", "--size", "32", "--against", "eager,cflow-ad-lists"), {OURS, "eager", "cflow-ad-lists"}),
        (("end-to-end", *RESNET), {OURS, "freia", "padim", "spade"}),
        (("training", "--size", "32", "--batch", "1"), {OURS, "freia", "cflow-ad-loop"}),
        (("scaling", "--size", "32,64", "--batch", "1,2", "--precision", "fp32"), {OURS}),
        (("stages", "--size", "32", "--count", "1"), {OURS}),
    ],
)
def test_benchmark_runs_on_tiny_shapes(
    command: tuple[str, ...], contenders: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = partial(Spans, sides=(2, 4), channels=(8, 16), blocks=(1, 2), features=8, side=2)
    monkeypatch.setattr("cflow_fast.cli.bench_scaling.Spans", spans)
    path = tmp_path / "results.json"
    encoder = TINY[2:] if "--encoder" in command else TINY
    result = bench(*command, *encoder, "--json", path)
    assert result.exit_code == 0, result.output
    stored = read_results(path)
    assert {row.contender for row in stored.rows} == contenders
    assert {row.bench for row in stored.rows} == {command[0]}
    for row in stored.rows:
        assert row.status == "ok", row
        assert row.seconds is not None or "exponent" in row.extra
    for contender in contenders - {OURS}:
        assert contender in result.output
    assert "torch" in result.output.splitlines()[-2]


def test_sizes_batches_and_permutations_are_repeated_or_comma_separated(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    shapes = ("--size", "32", "--size", "64", "--batch", "1,2", "--permutations", "soft,hard", "--against", "")
    assert bench("decoder", *TINY, *shapes, "--precision", "fp32", "--json", path).exit_code == 0
    axes = [row.axes for row in read_results(path).rows]
    assert [(a["permutations"], a["size"], a["batch"]) for a in axes] == [
        (kind, size, batch) for kind in ("soft", "hard") for size in (32, 64) for batch in (1, 2)
    ]


def test_comparison_with_an_older_file_shows_every_row(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    command = TINY_DECODER
    assert bench(*command, "--json", path).exit_code == 0
    facts = json.loads(path.read_text())
    assert facts["interrupted"] is False
    for row in facts["rows"]:
        row["seconds"]["median"] = 1e6
    path.write_text(json.dumps(facts))
    output = bench(*command, "--compare", path).output
    assert "change since the older file" in output
    assert "interrupted" not in output
    changed = output[output.index("change since") :]
    assert changed.count("0.00") >= 2


@pytest.mark.parametrize("package", ["FrEIA", "anomalib"])
def test_a_peer_that_is_not_installed_is_a_line_that_says_so(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.bench.contenders.is_installed", lambda name: name != package)
    name = {"FrEIA": "freia", "anomalib": "anomalib"}[package]
    result = bench("decoder", *TINY, "--size", "32", "--precision", "fp32", "--against", name)
    assert result.exit_code == 0
    assert f"{name} fp32: not installed: pip install {package}" in result.output


def test_a_run_that_could_measure_nothing_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(work: Any, precision: str) -> Any:
        raise RuntimeError("no decoder today")

    monkeypatch.setitem(CONTENDERS, OURS, Contender(OURS, build))
    result = bench("decoder", *TINY, "--size", "32", "--precision", "fp32", "--against", "")
    assert result.exit_code == 1
    assert "cflow-fast fp32: failed: RuntimeError: no decoder today" in result.output


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (("decoder", "--against", "glow"), "'glow' is none of cflow-fast, cflow-fast-plain"),
        (("map", "--against", "padim"), "'padim' is none of"),
        (("decoder", "--size", "0"), "'0' is no whole number above 0"),
        (("decoder", "--size", "-4"), "'-4' is no whole number above 0"),
        (("decoder", "--size", "large"), "'large' is no whole number above 0"),
        (("decoder", "--size", "31"), "--size 31 is smaller than 32, the largest stride of resnet18"),
        (("stages", "--size", "31"), "--size 31 is smaller than 32"),
        (("decoder", "--batch", "1,x"), "'x' is no whole number above 0"),
        (("decoder", "--batch", ","), "give at least one number"),
        (("decoder", "--batch", "1.5"), "'1.5' is no whole number above 0"),
        (("decoder", "--precision", "fp8"), "'fp8' is none of fp32, tf32x3, fp16x3, tf32, fp16, bf16"),
        (("decoder", "--permutations", "none"), "'none' is none of soft, hard"),
        (("decoder", "--seconds", "0"), "0.0 is not in the range"),
        (("decoder", "--device", "tpu"), "'tpu' cannot be used here"),
        (("nothing",), "No such command 'nothing'"),
    ],
)
def test_wrong_option_is_a_usage_error(command: tuple[str, ...], complaint: str) -> None:
    options = () if command[0] == "nothing" else ("--encoder", "resnet18")
    result = bench(command[0], *options, *command[1:])
    assert result.exit_code == 2
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert complaint in errors[0]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that measures anything."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr(session.Session, "measure_rates", refuse)
    monkeypatch.setattr("cflow_fast.cli.bench_stages.stage_rows", refuse)
    monkeypatch.setattr("cflow_fast.bench.complexity.size_rows", refuse)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("command", ["decoder", "map", "end-to-end", "training", "scaling", "stages", "complexity"])
@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (("--encoder", "mobilenetv9"), "no encoder 'mobilenetv9' in timm"),
        (("--json", "blocked/results.json"), "cannot write blocked/results.json"),
        (("--compare", "missing.json"), "missing.json: No such file or directory"),
        (("--compare", "cut.json"), "cut.json: not a whole results file"),
        (("--compare", "foreign.json"), "foreign.json: not a results file"),
        (("--compare", "other.json"), "other.json: its results are of ablation, none is of "),
        (("--compare", "newer.json"), "newer.json: its results have format 99, this version reads 1"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line_before_anything_is_measured(
    command: str, option: tuple[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blocked").write_text("a file where a folder should be")
    Path("cut.json").write_text('{"format": 1, "command": "x", "rows": [')
    Path("foreign.json").write_text('{"rows": []}')
    Path("newer.json").write_text('{"format": 99, "rows": []}')
    write_results(
        Path("other.json"), made.run([replace(made.row("padim", "fp32", 1, "cpu"), bench="ablation")], made.CPU)
    )
    before = files(tmp_path)
    result = bench(command, *TINY[:2], *option)
    assert result.exit_code == 1
    assert [complaint in line for line in result.output.splitlines()] == [True]
    assert files(tmp_path) == before


def test_folders_of_the_results_file_are_made_as_the_help_says(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "results.json"
    assert "folders that are missing are made" in " ".join(bench("decoder", "--help").output.split())
    assert bench(*TINY_DECODER, "--against", "", "--json", path).exit_code == 0
    assert read_results(path).rows


def test_interruption_prints_and_stores_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = iter(range(10))

    def build(work: Any, precision: str) -> Any:
        if next(built) == 1:  # while the second case is built
            raise KeyboardInterrupt
        return ours(work, precision)

    monkeypatch.setitem(CONTENDERS, OURS, Contender(OURS, build))
    path, partial = tmp_path / "results.json", tmp_path / "results.partial.json"
    path.write_text("an older run")
    command = ("decoder", *TINY, "--size", "32,64", "--precision", "fp32", "--json", path)
    result = bench(*command)
    assert result.exit_code == 130
    assert "interrupted: this is what was measured until then" in result.output
    assert f"wrote {partial}; {path} is for a whole run and was not touched" in result.output
    assert "[2 round(s)]" in result.output  # no interval is claimed from so few
    stored = read_results(partial)
    assert stored.interrupted
    assert {row.axes["size"] for row in stored.rows} == {32}
    assert path.read_text() == "an older run"
    again = bench(*TINY_DECODER, "--against", "freia", "--compare", partial)
    assert "interrupted before its end" in " ".join(again.output.split())


@pytest.mark.parametrize("command", ["decoder", "stages"])
def test_interruption_before_the_first_row_leaves_an_older_file_as_it_is(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "measure", interrupt)
    monkeypatch.setattr("cflow_fast.cli.bench_stages.stage_rows", interrupt)
    path = tmp_path / "results.json"
    path.write_text("an older run")
    result = bench(command, *TINY, "--size", "32", "--json", path)
    assert result.exit_code == 130
    assert f"nothing was measured, {path} was not written" in result.output
    assert "wrote" not in result.output
    assert path.read_text() == "an older run"


@pytest.mark.parametrize("program", ["/somewhere/bin/cflow-fast", "/somewhere/cflow_fast/__main__.py"])
def test_the_command_is_stored_as_a_user_would_repeat_it(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [program, "bench", "accuracy", "/data/mvtec/bottle", "--json", "here/a b.json"])
    assert command_line() == "cflow-fast bench accuracy bottle --json 'here/a b.json'"


def test_every_benchmark_is_a_command_with_a_line_of_help() -> None:
    group = main.commands["bench"]
    names = ["decoder", "map", "end-to-end", "training", "stages", "scaling"]
    names += ["complexity", "accuracy", "ablation", "report"]
    assert list(group.commands) == names  # type: ignore[attr-defined]
    output = bench("--help").output
    assert all(name in output for name in names)
