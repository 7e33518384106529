"""`cflow-fast predict`, `test`, `calibrate` and `info`: what they print and write is what the library says."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli import files, run
from PIL import Image
from tiny import same_tensors, save_image, texture, tiny_model

from cflow_fast import fitting
from cflow_fast.datasets import MVTecCategory, find_images
from cflow_fast.evaluation import evaluate
from cflow_fast.model import CFlowAD


@pytest.fixture
def model_path(model: CFlowAD, tmp_path: Path) -> Path:
    model.save(tmp_path / "cloth.safetensors")
    return tmp_path / "cloth.safetensors"


@pytest.fixture
def own_category(category: Path, tmp_path: Path) -> Path:
    """A category that the test may change."""
    return Path(shutil.copytree(category, tmp_path / "cloth"))


def test_help_names_every_command() -> None:
    result = run("--help")
    for command in ("train", "test", "predict", "calibrate", "info", "demo", "parity"):
        assert f"\n  {command} " in result.stdout
        assert run(command, "--help").exit_code == 0
    assert run("--version").stdout.startswith("cflow-fast")


def test_the_package_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "cflow_fast", "--version"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == run("--version").stdout


@pytest.mark.parametrize("imported", ["torch", "rich"])  # by the package, and by the command line alone
@pytest.mark.parametrize("program", ["cflow-fast", "-m"])
def test_ctrl_c_during_the_imports_of_a_command_ends_it_with_a_word(
    program: str, imported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _interrupted(program, imported, tmp_path, monkeypatch)
    assert result.returncode == 130
    assert result.stderr == "interrupted\n"


def test_a_program_that_imports_the_package_keeps_its_tracebacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _interrupted("mine.py", "torch", tmp_path, monkeypatch)
    assert result.stderr.startswith("Traceback")
    assert "KeyboardInterrupt" in result.stderr


def _interrupted(
    program: str, imported: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> subprocess.CompletedProcess[str]:
    """Run a command, or a program that imports it, in which the import of something is interrupted."""
    (folder / "first").mkdir()
    (folder / "first" / f"{imported}.py").write_text("raise KeyboardInterrupt")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "first"), *filter(None, sys.path)]))
    script = folder / program
    script.write_text("import sys\nfrom cflow_fast.cli import main\nsys.exit(main())")
    words = ["-m", "cflow_fast"] if program == "-m" else [str(script)]
    return subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True)


def test_predict_inspects_files_and_folders(model: CFlowAD, model_path: Path, category: Path, tmp_path: Path) -> None:
    scratched = sorted((category / "test" / "scratch").iterdir())
    good = category / "test" / "good" / "001.png"
    output = tmp_path / "out"
    result = run("predict", model_path, good, category / "test" / "scratch", "-o", output, "--batch-size", 3)
    assert result.exit_code == 0, result.output
    paths = [good, *scratched]
    facts = json.loads((output / "scores.json").read_text())
    assert [image["image"] for image in facts["images"]] == [str(path) for path in paths]
    for image, prediction, path in zip(facts["images"], model.predict(paths), paths, strict=True):
        assert image["score"] == pytest.approx(prediction.score, abs=1e-6)
        assert image["is_defective"] is prediction.is_defective
        with Image.open(output / image["heatmap"]) as heatmap, Image.open(path) as original:
            assert heatmap.size == original.size
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(str(path))]
        assert f"{prediction.score:.4f}" in line
        assert ("DEFECTIVE" in line) is prediction.is_defective
    assert all(image["is_defective"] for image in facts["images"][1:]), "the scratches are found"
    assert len((output / "scores.csv").read_text().splitlines()) == 5
    assert f"wrote {output}: 4 of 4 images" in result.stdout


def test_one_unreadable_image_does_not_lose_the_others(model_path: Path, category: Path, tmp_path: Path) -> None:
    good = sorted((category / "test" / "good").iterdir())
    bad = [tmp_path / "cut.png", tmp_path / "text.png", tmp_path / "missing.png"]
    bad[0].write_bytes(good[0].read_bytes()[:600])
    bad[1].write_text("no image")
    output = tmp_path / "out"
    result = run("predict", model_path, good[0], *bad, good[1], "-o", output)
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("skipped")] == result.stderr.splitlines()
    assert all(str(path) in line for path, line in zip(bad, result.stderr.splitlines(), strict=True))
    facts = json.loads((output / "scores.json").read_text())
    assert [image["image"] for image in facts["images"]] == [str(path) for path in good[:2]]
    assert facts["skipped"] == [str(path) for path in bad]
    assert "2 of 5 images" in result.stdout


def test_predictions_go_to_a_folder_of_that_name_where_nothing_else_is_said(
    model_path: Path, category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("predict", model_path, category / "test" / "good" / "000.png").exit_code == 0
    names = {"000_heatmap.png", "000_mask.png", "scores.csv", "scores.json"}
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == names


def test_names_with_brackets_are_printed_as_they_are(model: CFlowAD, category: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[red] a[" / "b]"
    model.save(folder / "m[0].safetensors")
    image = save_image(folder / "x[1].png", texture(np.random.default_rng(0)))
    result = run("predict", folder / "m[0].safetensors", image, folder / "[dim].png", "-o", folder / "out")
    assert str(image) in result.stdout
    assert str(folder / "[dim].png") in result.stderr
    assert f"wrote {folder / 'out'}" in result.stdout
    data = Path(shutil.copytree(category, folder / "[bold]"))
    assert "[bold]: 3 good" in run("test", folder / "m[0].safetensors", data).stdout
    result = run("calibrate", folder / "m[0].safetensors", data / "train" / "good")
    assert f"wrote {folder / 'm[0].safetensors'}" in result.stdout


def test_test_prints_and_writes_the_evaluation(
    model: CFlowAD, model_path: Path, category: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = run("test", model_path, category, "-o", output)
    assert result.exit_code == 0, result.output
    evaluation = evaluate(model, MVTecCategory(category).test)
    metrics = json.loads((output / "metrics.json").read_text())
    for name, value in evaluation.metrics().items():
        assert metrics[name] == pytest.approx(value, abs=1e-6)
    for value in (evaluation.image_auroc, evaluation.pixel_auroc, evaluation.aupro):
        assert f"{value:.4f}" in result.stdout
    for threshold in (model.image_threshold, evaluation.image_f1_threshold, evaluation.pixel_f1_threshold):
        assert f"{threshold:.4f}" in result.stdout, "the stored thresholds and the F1-optimal ones"
    words = " ".join(result.stdout.replace("│", " ").split())
    assert f"{evaluation.false_alarms} false alarms, {evaluation.missed} missed" in words
    page = (output / "index.html").read_text()
    assert "scratch/000" in page
    assert {path.name for path in output.iterdir()} == {"metrics.json", "index.html"}


def test_test_without_an_output_writes_nothing(model_path: Path, category: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    assert run("test", model_path, category).exit_code == 0
    assert files(tmp_path) == before


def test_mask_of_another_size_is_skipped_with_one_line_and_exit_code_1(model_path: Path, own_category: Path) -> None:
    mask = own_category / "ground_truth" / "scratch" / "001_mask.png"
    Image.new("L", (10, 12)).save(mask)
    result = run("test", model_path, own_category)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert str(mask) in line
    assert str(own_category / "test" / "scratch" / "001.png") in line
    assert "3 good and 2 defective" in result.stdout
    assert "1 image(s) were skipped" in result.stdout


@pytest.mark.parametrize("kind", ["good", "scratch"])
def test_category_with_one_kind_of_test_image_is_measured_as_far_as_it_goes(
    model_path: Path, own_category: Path, tmp_path: Path, kind: str
) -> None:
    shutil.rmtree(own_category / "test" / kind)
    result = run("test", model_path, own_category, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["image_auroc"] is None
    assert (tmp_path / "out" / "index.html").is_file()


def test_model_without_thresholds_predicts_and_is_tested(model: CFlowAD, category: Path, tmp_path: Path) -> None:
    model.thresholds.fill_(math.nan)
    model.save(tmp_path / "m.safetensors")
    result = run("test", tmp_path / "m.safetensors", category, "-o", tmp_path / "test")
    assert result.exit_code == 0, result.output
    assert "stored thresholds" not in result.stdout
    assert (tmp_path / "test" / "index.html").is_file()
    result = run("predict", tmp_path / "m.safetensors", category / "test" / "good", "-o", tmp_path / "predict")
    assert result.exit_code == 0, result.output
    assert not list((tmp_path / "predict").glob("*_mask.png"))


def test_calibrate_gives_new_thresholds_and_leaves_the_weights(
    model: CFlowAD, model_path: Path, category: Path, tmp_path: Path
) -> None:
    before = model_path.read_bytes()
    good = category / "train" / "good"
    options = ("--holdout", 0.25, "--false-alarm-rate", 0.3, "--seed", 5)
    result = run("calibrate", model_path, good, "-o", tmp_path / "new.safetensors", *options)
    assert result.exit_code == 0, result.output
    assert model_path.read_bytes() == before
    fitting.calibrate(model, fitting.split_images(find_images(good), 0.25, seed=5), 0.3)
    new = CFlowAD.load(tmp_path / "new.safetensors")
    assert same_tensors(new, model)
    assert new.false_alarm_rate.item() == pytest.approx(0.25), "one of four: three images were held out"
    assert f"threshold {new.image_threshold:.4f}, at most 25.0% of good images raise an alarm" in result.stdout
    run("calibrate", model_path, good, *options)
    assert same_tensors(CFlowAD.load(model_path), new), "MODEL itself where nothing else is said"


def test_calibrate_can_settle_another_precision(model_path: Path, category: Path) -> None:
    run("calibrate", model_path, category / "train" / "good", "--precision", "bf16")
    assert CFlowAD.load(model_path).precision == "bf16"


def test_calibrate_says_what_so_few_images_can_promise_and_what_it_skipped(
    model_path: Path, own_category: Path
) -> None:
    bad = own_category / "train" / "good" / "003.png"
    bad.write_text("no image")
    result = run("calibrate", model_path, own_category / "train" / "good")
    assert result.exit_code == 0
    skipped, note = sorted(result.stderr.splitlines(), key=lambda line: line.startswith("Note"))
    assert str(bad) in skipped
    assert note.startswith("Note: ")
    assert "held-out images cannot promise a false alarm rate of 0.05" in note


def test_info_says_what_a_model_is(model: CFlowAD, model_path: Path) -> None:
    result = run("info", model_path)
    assert result.exit_code == 0
    for text in ("resnet18", "layer1, layer2", "64, 128", f"{model.image_threshold}", "fp32"):
        assert text in result.stdout
    facts = json.loads(run("info", model_path, "--json").stdout, parse_constant=pytest.fail)
    assert facts["image threshold"] == model.image_threshold
    assert facts["promised false alarm rate"] == 0.2
    assert facts["largest log p / D"] == pytest.approx(model.log_prob_max.tolist(), abs=1e-4)
    assert facts["decoder parameters"] == sum(parameter.numel() for parameter in model.decoders.parameters())


def test_info_of_a_model_that_is_not_calibrated_is_still_json(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "m.safetensors")
    facts = json.loads(run("info", tmp_path / "m.safetensors", "--json").stdout, parse_constant=pytest.fail)
    assert (facts["largest log p / D"], facts["image threshold"], facts["promised false alarm rate"]) == (None,) * 3
