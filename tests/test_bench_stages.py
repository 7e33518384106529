"""The stages of a prediction add up to the whole, give what `predict` gives, and can be seen in a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli import run

from cflow_fast.bench.measurement import Effort
from cflow_fast.bench.stages import TOTAL, StagesInterrupted, Stopwatch, made_images, predict_in_stages, stage_rows
from cflow_fast.model import CFlowAD

SIX = Effort(seconds=60, target=1e-9, least_rounds=6, most_rounds=6)


def test_stages_add_up_to_the_whole_within_five_percent(model: CFlowAD, good_paths: list[Path]) -> None:
    rows = stage_rows(model, good_paths[:4], 2, SIX)
    names = [str(row.axes["stage"]) for row in rows]
    assert names[:5] == ["read", "decode", "resize", "copy", "encode"]
    assert [name.split(" (")[0] for name in names[5:]] == ["decoder 1", "decoder 2", "map", "write", TOTAL]
    *stages, total = rows
    assert total.extra["uncut_milliseconds_per_image"] > 0
    assert total.extra["share"] == pytest.approx(1.0)
    assert sum(row.extra["share"] for row in stages) == pytest.approx(1.0, abs=0.05)
    assert sum(row.extra["milliseconds_per_image"] for row in stages) == pytest.approx(
        total.extra["milliseconds_per_image"], rel=0.05
    )
    assert all(row.seconds is not None and row.seconds.rounds == 6 for row in rows)


def test_staged_prediction_writes_what_predict_writes(model: CFlowAD, good_paths: list[Path], tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    assert run("predict", tmp_path / "model.safetensors", *good_paths, "-o", tmp_path / "plain").exit_code == 0
    predict_in_stages(model, good_paths, tmp_path / "staged", 8, Stopwatch(model.device))
    plain, staged = (sorted((tmp_path / name).iterdir()) for name in ("plain", "staged"))
    assert [path.name for path in plain] == [path.name for path in staged]
    for a, b in zip(plain, staged, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_interrupted_stages_carry_the_passes_that_were_finished(
    model: CFlowAD, good_paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    encode = model.features

    def interrupted(images: object) -> object:
        if next(calls) == 8:  # a pass of either kind to warm up, then three whole rounds of both
            raise KeyboardInterrupt
        return encode(images)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "features", interrupted)
    with pytest.raises(StagesInterrupted) as caught:
        stage_rows(model, good_paths[:1], 1, SIX)
    assert [row.seconds.rounds for row in caught.value.rows if row.seconds] == [3] * 10


def test_command_prints_the_stages_and_writes_a_trace_that_names_them(
    model: CFlowAD, good_paths: list[Path], tmp_path: Path
) -> None:
    model.save(tmp_path / "model.safetensors")
    trace = tmp_path / "trace.json"
    options = ("--model", tmp_path / "model.safetensors", "--profile", trace, "--rounds", "2", "--device", "cpu")
    result = run("bench", "stages", good_paths[0].parent, *options)
    assert result.exit_code == 0
    assert "decoder 2 (D = 128)" in result.output
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"read", "decode", "encode", "map", "write"} <= {event.get("name") for event in events}


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "fp16", "fp16x3"])
def test_a_precision_that_the_device_does_not_have_is_refused(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cflow_fast.cli.bench_stages.made_model", lambda *arguments: pytest.fail("a model is made"))
    words = ("--encoder", "resnet18", "--precision", precision, "--device", "cpu", "--json", tmp_path / "out.json")
    result = run("bench", "stages", *words)
    assert result.exit_code == 2
    expected = f"Error: --precision: this cpu does not multiply {precision}; there are auto, fp64, fp32"
    assert result.stderr.splitlines()[-1].startswith(expected)
    assert not list(tmp_path.iterdir())


def test_the_table_names_the_precision_and_what_became_of_a_models_own(
    model: CFlowAD, good_paths: list[Path], tmp_path: Path
) -> None:
    options = ("--rounds", "1", "--device", "cpu")
    made = run(
        "bench", "stages", "--encoder", "resnet18", "--size", "32", "--count", "1", "--precision", "fp64", *options
    )
    assert "resnet18, 1 images to 32 px, batch 8, decoders in fp64" in " ".join(made.output.split())
    model.precision = "tf32"
    model.save(tmp_path / "model.safetensors")
    words = (good_paths[0].parent, "--model", tmp_path / "model.safetensors", *options)
    loaded = run("bench", "stages", *words)
    assert "batch 8, decoders in tf32" in " ".join(loaded.output.split())
    assert "cflow-fast: no tf32 on this cpu: fp32" in loaded.output


def test_a_trace_is_written_without_a_word_of_the_profilers_own(tmp_path: Path) -> None:
    words = ("--encoder", "resnet18", "--size", "32", "--count", "1", "--rounds", "1", "--device", "cpu")
    command = [sys.executable, "-m", "cflow_fast", "bench", "stages", *words, "--profile", str(tmp_path / "trace.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "trace.json").is_file()
    assert [line for line in result.stderr.splitlines() if not line.startswith("stages ")] == []


def test_images_are_made_where_none_are_given(tmp_path: Path) -> None:
    paths = made_images(tmp_path, 2, (20, 30))
    assert [path.name for path in paths] == ["000.png", "001.png"]
    result = run("bench", "stages", "--encoder", "resnet18", "--size", "32", "--count", "1", "--rounds", "1")
    assert result.exit_code == 0
    assert "the stages add up to" in result.output
