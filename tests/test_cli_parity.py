"""`cflow-fast parity`: a table, the same as JSON, and an exit code that a script can ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import run

from cflow_fast import parity
from cflow_fast.model import CFlowAD


def test_every_size_and_both_permutations_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity, "SIZES", (41,))
    result = run("parity", "--json", tmp_path / "parity.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
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
    monkeypatch.setattr(parity, "check", lambda case: pytest.fail("it compares"))
    (tmp_path / "blocked").write_text("a file")
    result = run("parity", "--json", tmp_path / "blocked" / "parity.json", "--device", "cpu")
    assert result.exit_code == 1
    assert f"cannot write {tmp_path / 'blocked' / 'parity.json'}" in " ".join(result.output.split())
