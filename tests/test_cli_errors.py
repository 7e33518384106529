"""Whatever is wrong ends in one line that names it (exit code 2 for a usage error, 1 otherwise) and writes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from cli import TINY_OPTIONS, files, run
from PIL import Image
from safetensors.torch import save_file
from tiny import calibrated_model, tiny_model

from cflow_fast.fitting import Fit
from cflow_fast.model import CFlowAD
from cflow_fast.model_file import read_tensors


@pytest.fixture(scope="module")
def wrongs(category: Path, good_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all kinds of things that can be wrong; it stays as it is, as nothing is written."""
    folder = tmp_path_factory.mktemp("wrongs")
    _fill_with_images(folder, category)
    _fill_with_models(folder, calibrated_model(good_paths))
    return folder


@pytest.fixture
def place(wrongs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(wrongs)
    return wrongs


def _fill_with_images(folder: Path, category: Path) -> None:
    (folder / "file").write_text("mine")
    for name in ("empty", "unreadable", "single"):
        (folder / name).mkdir()
    for number in range(3):
        (folder / f"unreadable/{number}.png").write_text("no image")
    shutil.copytree(category, folder / "cloth")
    shutil.copytree(category / "train/good", folder / "good")
    shutil.copy(category / "train/good/000.png", folder / "single")
    shutil.copytree(category / "test", folder / "untrainable/test")
    shutil.copytree(category / "train", folder / "untestable/train")
    shutil.copytree(category / "test", folder / "maskless/test")
    shutil.copytree(category, folder / "flawless", ignore=shutil.ignore_patterns("scratch"))
    shutil.copytree(category, folder / "mismatched", ignore=shutil.ignore_patterns("good"))
    for mask in (folder / "mismatched/ground_truth/scratch").iterdir():
        Image.new("L", (10, 12)).save(mask)


def _fill_with_models(folder: Path, model: CFlowAD) -> None:
    path = folder / "model.safetensors"
    model.save(path)
    tiny_model().save(folder / "uncalibrated.safetensors")
    (folder / "cut.safetensors").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    tensors, metadata = read_tensors(path)
    save_file(tensors, folder / "version.safetensors", metadata | {"version": "7"})
    save_file({"weight": torch.zeros(1)}, folder / "weights.safetensors")
    torch.save({"weight": torch.zeros(1)}, folder / "pickle.safetensors")


def error_of(place: Path, line: str, exit_code: int) -> str:
    """Run a command line that has to fail with an exit code; the line that says why."""
    before = files(place)
    result = run(*line.replace("TINY", " ".join(TINY_OPTIONS)).split())
    assert result.exit_code == exit_code, result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.splitlines()[-1] == error
    assert files(place) == before, "nothing is written"
    return error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("missing", "missing is missing; name a folder of images"),
        ("file", "file is a file, not a folder"),
        ("empty", "empty holds no image; files that end in .*png.* are read"),
        ("untrainable", "untrainable has no folder train/good; a category is laid out as train/good/"),
        ("unreadable", "none of the 3 images can be read"),
        ("single", "1 good image.* too few to hold 1 out: add some"),
        ("untestable --threshold f1", "untestable has no folder test"),
        ("good --encoder resnet81", "no encoder 'resnet81' in timm: did you mean .*resnet18"),
        ("good --layers layer2,layer9", "resnet18 has no layer 'layer9'; it has .*layer"),
        ("good --encoder-weights missing.pth", "no weights file missing.pth"),
        ("good --encoder-weights cut.safetensors", "cannot read weights from cut.safetensors"),
        ("good --encoder-weights weights.safetensors", "weights.safetensors does not fit"),
        ("good -o file/m.safetensors", "cannot write file/m.safetensors: file is a file"),
        ("good -o /proc/m.safetensors", "cannot write /proc/m.safetensors"),
        ("good --learning-rate 1e8 --steps 30", "training diverged: .* lower the learning rate"),
        ("good --resume", "no interrupted run to resume: m.resume.safetensors does not exist"),
    ],
)
def test_train_says_what_is_wrong(place: Path, line: str, words: str) -> None:
    assert re.search(words, error_of(place, f"train -o m.safetensors TINY {line}", 1))


def test_output_that_cannot_be_written_is_found_before_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fit, "run", lambda *arguments: pytest.fail("trained in vain"))
    error_of(place, "train -o file/m.safetensors TINY good", 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("test missing.safetensors cloth", "no model at missing.safetensors"),
        ("test model.safetensors missing", "missing is missing; name a category, laid out as"),
        ("test model.safetensors empty", "empty has no folder test"),
        ("test model.safetensors untestable", "untestable has no folder test"),
        ("test model.safetensors maskless", "000.png has no mask: there is no file maskless/ground_truth/scratch/000_"),
        ("test model.safetensors mismatched", "no test image could be used: see the reasons above"),
        ("test model.safetensors cloth -o file/out", "cannot write file/out/metrics.json"),
        ("test model.safetensors cloth -o /proc/out", "cannot write /proc/out/metrics.json"),
        ("predict model.safetensors empty", "empty holds no image"),
        ("predict model.safetensors good -o file/out", "cannot write file/out/000_heatmap.png"),
        ("predict model.safetensors good -o /proc/out", "cannot write /proc/out/000_heatmap.png"),
        ("calibrate model.safetensors missing", "missing is missing; name a folder of images"),
        ("calibrate model.safetensors empty", "empty holds no image"),
        ("calibrate model.safetensors single", "1 good image.* too few to hold 1 out"),
        ("calibrate model.safetensors unreadable", "calibration needs good images .* found none"),
        ("calibrate model.safetensors good -o file/m.safetensors", "cannot write file/m.safetensors: file is a file"),
    ],
)
def test_other_commands_say_what_is_wrong(place: Path, line: str, words: str) -> None:
    assert re.search(words, error_of(place, line, 1))


@pytest.mark.parametrize("command", ["test {} cloth", "predict {} good", "calibrate {} good -o new", "info {}"])
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("missing.safetensors", "no model at missing.safetensors: give the file that `cflow-fast train` wrote"),
        ("cut.safetensors", "cut.safetensors cannot be read .* cut short"),
        ("file", "file cannot be read .* no model"),
        ("pickle.safetensors", "pickle.safetensors cannot be read .* no model"),
        ("weights.safetensors", "weights.safetensors is not a cflow_fast model"),
        ("version.safetensors", "version.safetensors is a model of version 7, this package reads version 1"),
    ],
)
def test_bad_model_is_named_by_every_command(place: Path, command: str, file: str, words: str) -> None:
    assert re.search(words, error_of(place, command.format(file), 1))


@pytest.mark.parametrize("command", ["test {} cloth", "predict {} good"])
def test_model_that_is_not_calibrated_is_refused(place: Path, command: str) -> None:
    assert "not calibrated: train it, or run calibrate" in error_of(
        place, command.format("uncalibrated.safetensors"), 1
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("inspect", "No such command 'inspect'"),
        ("train", "Missing argument 'DATA'"),
        ("train good --fast", "No such option"),
        ("train good --preset turbo", "'turbo' is not one of 'paper', 'cflow-ad', 'fast'"),
        ("train good --device warp", "'warp' cannot be used here"),
        ("train good --device meta", "'meta' cannot be used here"),
        ("train good --epochs many", "'many' is not a valid integer"),
        ("train good --holdout 1", "1.* is not in the range"),
        ("train good --false-alarm-rate 0", "0.* is not in the range"),
        ("train good -o empty", "'empty' is a directory"),
        ("train TINY good --learning-rate -1", "learning_rate is positive, got -1"),
        ("train TINY good --rotation nan", "rotation is not negative, got nan"),
        ("train TINY good --vectors 0", "vectors is positive, got 0"),
        ("train TINY good --image-size 4", "image_size is at least 8, .* got 4"),
        ("train TINY good --condition 6", "condition is a multiple of 4 .* got 6"),
        ("train TINY good --threshold f1", "--threshold f1 needs labelled defects"),
        ("train TINY flawless --threshold f1", "--threshold f1 needs labelled defects"),
        ("test model.safetensors", "Missing argument 'DATA'"),
        ("test model.safetensors cloth --batch-size 0", "0 is not in the range"),
        ("predict model.safetensors", "Missing argument 'IMAGES...'"),
        ("predict model.safetensors good -o file", "'file' is a file"),
        ("calibrate model.safetensors good --holdout 0", "0.* is not in the range"),
        ("calibrate model.safetensors good --precision fp8", "'fp8' is not one of"),
    ],
)
def test_usage_error_ends_with_exit_code_2(place: Path, line: str, words: str) -> None:
    assert re.search(words, error_of(place, line, 2))


def test_predicting_nothing_but_unreadable_images_says_so_for_each(place: Path) -> None:
    result = run("predict", "model.safetensors", "unreadable", "missing.png", "-o", "out")
    assert result.exit_code == 1
    names = ("unreadable/0.png", "unreadable/1.png", "unreadable/2.png", "missing.png")
    for name, line in zip(names, result.stderr.splitlines(), strict=True):
        assert line.startswith(f"skipped cannot read image {name}: ")
    assert (place / "out" / "scores.json").is_file()
