"""`cflow-fast parity`: a table, the same as JSON, and an exit code that a script can ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli import run

from cflow_fast import parity
from cflow_fast.model import CFlowAD


def test_every_size_and_both_permutations_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity, "SIZES", (41,))
    result = run("parity", "--json", tmp_path / "parity.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "parity.json").read_text())
    assert told["versions"]["torch"] == torch.__version__
    assert told["machine"]["cores"] > 0
    rows = told["rows"]
    assert {row["case"].split(",")[0] for row in rows} == {"D=41 hard", "D=41 soft"}
    assert {row["precision"] for row in rows} == {"fp32", "bf16"}
    for row in rows:
        assert row["passed"]
        assert row["reference"] == "FrEIA"
        assert 0 < row["ours"]["rms"] < row["ours"]["maximum"]
        assert f"{row['ours']['maximum']:.1e}" in result.output


def test_a_models_decoders_are_compared_at_their_own_sizes(model: CFlowAD, tmp_path: Path) -> None:
    model.save(tmp_path / "cloth.safetensors")
    result = run("parity", tmp_path / "cloth.safetensors", "--json", tmp_path / "parity.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    expected = [f"scale {i + 1}, D={decoder.features}" for i, decoder in enumerate(model.decoders)]
    assert list(dict.fromkeys(row["case"] for row in rows)) == expected


def test_a_models_decoders_are_compared_on_images(model: CFlowAD, category: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "cloth.safetensors")
    images = [category / "test/scratch", category / "test/good/000.png"]
    options = ("--runs", 2, "--json", tmp_path / "parity.json", "--device", "cpu")
    result = run("parity", tmp_path / "cloth.safetensors", *images, *options)
    assert result.exit_code == 0, result.output
    assert "reference: FrEIA in the same precision, the largest of 2 runs" in " ".join(result.output.split())
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    name = f"scale 1, D={model.decoders[0].features}"
    assert {row["case"] for row in rows} >= {name, f"{name}, relative"}
    for row in rows:
        assert row["passed"]
        assert row["relative"] == row["case"].endswith(", relative")
        assert len(row["runs"]) == 2
        assert row["theirs"]["maximum"] == max(each["maximum"] for each in row["runs"])
        shown = row["ours"]["bounded" if row["relative"] else "maximum"]
        assert f"{shown:.1e}" in result.output
    features = model.features(torch.zeros(1, 3, *model.image_size))[0]
    drawn = parity.model_cases([model.decoders[0]], [tuple(features.shape[2:])])  # type: ignore[list-item]
    assert rows[0]["theirs"]["maximum"] != next(iter(parity.check(drawn[0]))).theirs.maximum


def test_an_image_that_cannot_be_read_is_left_out_and_told(model: CFlowAD, category: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "cloth.safetensors")
    (tmp_path / "bad.png").write_text("no image")
    good = category / "test/good/000.png"
    options = ("--runs", 1, "--device", "cpu")
    result = run("parity", tmp_path / "cloth.safetensors", tmp_path / "bad.png", good, *options)
    assert result.exit_code == 1
    assert f"skipped cannot read image {tmp_path / 'bad.png'}" in " ".join(result.output.split())
    assert "FAIL" not in result.output
    result = run("parity", tmp_path / "cloth.safetensors", tmp_path / "bad.png", *options)
    assert result.exit_code == 1
    assert "none of the 1 images can be read" in result.output


def test_runs_are_of_freia_on_images() -> None:
    result = run("parity", "--runs", 2, "--device", "cpu")
    assert result.exit_code == 2
    assert "--runs is of FrEIA on IMAGES" in result.output


def test_a_failed_comparison_is_told_and_the_exit_code_is_1(
    model: CFlowAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path / "cloth.safetensors")
    monkeypatch.setattr(parity, "FP32_RATIO", 1e-3)
    result = run("parity", tmp_path / "cloth.safetensors", "--device", "cpu")
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "maximum / FrEIA's is" in result.output


def test_a_file_that_cannot_be_written_is_found_before_anything_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "compare", lambda case: pytest.fail("it compares"))
    (tmp_path / "blocked").write_text("a file")
    result = run("parity", "--json", tmp_path / "blocked" / "parity.json", "--device", "cpu")
    assert result.exit_code == 1
    assert f"cannot write {tmp_path / 'blocked' / 'parity.json'}" in " ".join(result.output.split())
