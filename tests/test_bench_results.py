"""Results are read as they were written, and a file that is none is refused in one line that names it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cflow_fast.bench.results import (
    FORMAT,
    BenchmarkFileError,
    ForeignFileError,
    Results,
    Row,
    Speedup,
    Summary,
    compare,
    read_results,
    store_results,
    write_results,
)

SUMMARY = Summary(median=0.5, low=0.4, high=0.6, p50=0.5, p99=0.9, rounds=11)
ROW = Row(
    bench="decoder",
    case="a case",
    axes={"encoder": "resnet18", "size": 256, "batch": 1},
    contender="cflow-fast",
    precision="fp32",
    device="cpu",
    seconds=SUMMARY,
    images_per_second=2.0,
    error_max=1e-7,
    parity=True,
    speedup=Speedup("freia fp32", 1.5, 1.4, 1.6),
    extra={"numbers": [1, 2.5, "text", None]},
)
UNMEASURED = Row(
    "decoder", "a case", {}, "anomalib", "fp32", "cpu", status="not installed", note="pip install anomalib"
)
RESULTS = Results(
    command="cflow-fast bench decoder",
    created="2026-01-01T00:00:00+00:00",
    machine={"cpu": "a CPU", "threads": 2, "features": []},
    versions={"torch": "2"},
    seed=0,
    commit="unknown",
    peak_flops={"fp32": 1e11},
    rows=[ROW, UNMEASURED],
)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_results(tmp_path / "r.json", RESULTS)
    assert read_results(tmp_path / "r.json") == RESULTS


def test_a_run_that_was_interrupted_is_written_beside_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "of.today.json"
    assert store_results(path, RESULTS) == path
    part = replace(RESULTS, rows=[ROW], interrupted=True)
    written = store_results(path, part)
    assert written == tmp_path / "of.today.partial.json"
    assert read_results(path) == RESULTS
    assert read_results(written) == part


def test_a_file_from_before_interruptions_were_marked_is_a_whole_run(tmp_path: Path) -> None:
    facts = json.loads(_written())
    del facts["interrupted"]
    (tmp_path / "r.json").write_text(json.dumps(facts))
    assert read_results(tmp_path / "r.json") == RESULTS


def test_a_number_that_is_none_is_never_written_as_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path / "r.json", replace(RESULTS, rows=[replace(ROW, tflops=float("nan"))]))
    assert not list(tmp_path.iterdir())


def _changed(**facts: Any) -> str:
    return json.dumps(json.loads(_written()) | facts)


def _written() -> str:
    from dataclasses import asdict

    return json.dumps({"format": FORMAT} | asdict(RESULTS))


def _row(**facts: Any) -> str:
    return _changed(rows=[_first_row() | facts])


def _first_row() -> dict[str, Any]:
    row: dict[str, Any] = json.loads(_written())["rows"][0]
    return row


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (_written()[:200], "not a whole results file"),
        ("", "not a whole results file"),
        ("[1, 2]", "not a results file of `cflow-fast bench`"),
        ('{"command": "make"}', "not a results file of `cflow-fast bench`"),
        ('{"format": 99}', "not a results file of `cflow-fast bench`"),
        (_changed(format=FORMAT + 1), f"have format {FORMAT + 1}, this version reads {FORMAT}"),
        (_changed(unknown=1), "it has the unknown unknown"),
        ('{"format": 1, "rows": []}', "it lacks command, created, machine, versions, seed, commit, peak_flops"),
        (_changed(rows=None), "rows is None, expected a list"),
        (_changed(rows=[3]), "row 1: Row is 3, expected its fields"),
        (_changed(rows=[_first_row(), {}]), "row 2: it lacks bench, case, axes, contender, precision, device"),
        (_row(seconds={"median": 1.0, "mean": 2.0}), "row 1: it lacks low, high, p50, p99, rounds; it has the unknown"),
        (_row(seconds=[1]), "Summary is"),
        (_row(status="splendid"), "status 'splendid' is none of ok, "),
        (_row(images_per_second="many"), "images_per_second is 'many', expected float | None"),
        (_row(contender=None), "contender is None, expected str"),
    ],
)
def test_what_is_no_results_file_is_refused_by_name(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(BenchmarkFileError) as caught:
        read_results(path)
    message = str(caught.value)
    assert "__init__" not in message
    assert str(path) in message
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "is_foreign"),
    [
        ("[]", True),
        ('{"format": 1, "card": "sm_90"}', True),
        ('{"command": "cflow-fast parity", "rows": []}', True),
        (_written()[:200], False),
        (_changed(format=FORMAT + 1), False),
        (_row(status="splendid"), False),
    ],
)
def test_json_of_something_else_is_told_from_results_that_cannot_be_read(
    tmp_path: Path, content: str, is_foreign: bool
) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(BenchmarkFileError) as caught:
        read_results(tmp_path / "r.json")
    assert isinstance(caught.value, ForeignFileError) == is_foreign


def test_binary_content_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchmarkFileError, match=r"r\.json: not a whole results file"):
        read_results(tmp_path / "r.json")


def test_comparison_matches_the_same_measurement_and_gives_ratios() -> None:
    faster = replace(ROW, seconds=replace(SUMMARY, median=0.25), speedup=Speedup("freia fp32", 3.0, 2.9, 3.1))
    other = replace(ROW, precision="bf16")
    (change,) = compare(RESULTS, replace(RESULTS, rows=[other, faster]))
    assert change.new is faster
    assert (change.time_ratio, change.speedup_ratio) == (0.5, 2.0)


def test_speedups_over_different_contenders_are_not_compared() -> None:
    new = replace(ROW, speedup=Speedup("anomalib fp32", 3.0, 2.9, 3.1))
    (change,) = compare(RESULTS, replace(RESULTS, rows=[new]))
    assert change.speedup_ratio is None


def test_measurements_on_other_axes_are_not_compared() -> None:
    """An ablation's base has one name, whatever its encoder."""
    other = replace(ROW, axes=ROW.axes | {"encoder": "wide_resnet50_2"})
    assert compare(RESULTS, replace(RESULTS, rows=[other])) == []


def test_what_a_row_stores_beside_its_fields_is_compared_where_it_is_a_number() -> None:
    old, new = (replace(ROW, extra={"fit_seconds": seconds, "note": "text"}) for seconds in (4.0, 6.0))
    (change,) = compare(replace(RESULTS, rows=[old]), replace(RESULTS, rows=[new]))
    assert change.ratio(lambda row: row.number("fit_seconds")) == 1.5
    assert change.ratio(lambda row: row.number("note")) is None
    assert change.ratio(lambda row: row.number("absent")) is None


def test_what_was_not_measured_has_no_ratio() -> None:
    (change,) = compare(RESULTS, replace(RESULTS, rows=[UNMEASURED]))
    assert change.time_ratio is None
