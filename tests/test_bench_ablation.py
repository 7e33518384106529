"""`bench ablation` on a tiny category."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cflow_fast.bench import ablation as bench
from cflow_fast.bench.counting import decoder_bytes
from cflow_fast.bench.results import Row, read_results
from cflow_fast.cli.bench_ablation import ablation

TINY = ("--encoder", "resnet18", "--layers", "layer1,layer2", "--untrained", "--device", "cpu", "--steps", "2")


def test_every_variation_is_trained_tested_and_stored(category: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    words = [str(category), *TINY, "--size", "64", "--size", "32", "--json", str(path)]
    result = CliRunner().invoke(ablation, words)
    assert result.exit_code == 0, result.output
    rows = read_results(path).rows
    assert [(row.axes["factor"], row.axes["value"]) for row in rows[1:]] == [
        ("coupling layers", "4"),
        ("pooling layers", "1"),
        ("image size", "32 px"),
        ("condition", "none"),
    ]
    assert rows[0].extra["decoder_bytes"] == decoder_bytes((64, 128), False)
    assert rows[1].extra["decoder_bytes"] == rows[0].extra["decoder_bytes"] / 2
    assert rows[2].extra["decoder_bytes"] == decoder_bytes((128,), False)
    assert rows[4].extra["decoder_bytes"] == decoder_bytes((64, 128), False, condition=0)
    for row in rows:
        assert row.images_per_second is not None
        assert 0 <= row.extra["pixel_auroc"] <= 1
    assert "condition: none" in result.output
    assert "the paper's figures: not found" in " ".join(result.output.split())
    again = CliRunner().invoke(ablation, [str(category), *TINY, "--size", "64", "--compare", str(path)])
    assert again.exit_code == 0, again.output
    changes = again.output[again.output.index("change since the older file") :]
    assert changes.count("(+0.00)") == 3 * 4, "the same seed gives the same metrics"
    assert "image size" not in changes, "it is in the older file only"


def test_an_encoder_that_cannot_be_had_is_a_row_that_says_so(category: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    words = [str(category), *TINY, "--size", "64", "--encoder", "vit_tiny_patch16_224", "--json", str(path)]
    result = CliRunner().invoke(ablation, words)
    assert result.exit_code == 0, result.output
    last = read_results(path).rows[-1]
    assert last.status == "not available"
    assert "vit_tiny_patch16_224 has no feature map at stride 8" in last.note
    assert last.images_per_second is None


@pytest.mark.parametrize("encoders", [("resnet18", "resnet81"), ("resnet81", "resnet18")])
def test_a_name_that_is_no_encoders_is_a_usage_error_before_anything_is_trained(
    encoders: tuple[str, str], category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *arguments: pytest.fail("it trains"))
    words = [word for encoder in encoders for word in ("--encoder", encoder)]
    result = CliRunner().invoke(ablation, [str(category), *TINY[2:], *words, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 2
    assert "--encoder: no encoder 'resnet81' in timm: did you mean resnet18" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_an_ablation_in_which_nothing_could_be_measured_fails_and_keeps_its_rows(
    category: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights.pth").write_text("none")
    path = tmp_path / "out.json"
    result = CliRunner().invoke(
        ablation, [str(category), *TINY, "--encoder-weights", str(tmp_path / "weights.pth"), "--json", str(path)]
    )
    assert result.exit_code == 1
    rows = read_results(path).rows
    assert {row.status for row in rows} == {"not available"}
    assert all("weights.pth" in row.note for row in rows)


def test_an_interruption_prints_what_there_is(category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*arguments: Any) -> Iterator[Row]:
        yield next(measured(*arguments))
        raise KeyboardInterrupt

    measured = bench.ablation_rows
    monkeypatch.setattr(bench, "ablation_rows", rows)
    path = tmp_path / "out.json"
    result = CliRunner().invoke(ablation, [str(category), *TINY, "--size", "64", "--json", str(path)])
    assert result.exit_code == 130
    stored = read_results(tmp_path / "out.partial.json")
    assert stored.interrupted
    assert [row.case for row in stored.rows] == ["cloth, base"]
    assert not path.exists()
    assert "cloth, base" in result.output
