"""`cflow-fast train`: from a folder to a model file, every number an option, and Ctrl-C loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import TINY_OPTIONS, files, run, train
from tiny import same_tensors

from cflow_fast.datasets import MVTecCategory
from cflow_fast.evaluation import evaluate
from cflow_fast.model import CFlowAD
from cflow_fast.recipes import PRESETS, Recipe
from cflow_fast.training import Progress, Trainer

INTERRUPTED_IN_STEP_3 = """
import os, signal, sys
from cflow_fast.cli import main
from cflow_fast.training import Trainer

step = Trainer._step

def interrupted(self, *arguments):
    if self.position.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *arguments)

Trainer._step = interrupted
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def trained(category: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CFlowAD, str]:
    """A model trained by the command line, and all that it printed."""
    output = tmp_path_factory.mktemp("trained") / "cloth.safetensors"
    result = train(category, output)
    assert result.exit_code == 0, result.output
    assert [path.name for path in output.parent.iterdir()] == ["cloth.safetensors"]
    return CFlowAD.load(output), result.output


def test_training_on_a_category_writes_a_calibrated_model(trained: tuple[CFlowAD, str]) -> None:
    model, printed = trained
    assert model.is_calibrated
    assert model.image_threshold is not None
    assert model.options["layers"] == ["layer1", "layer2"]
    assert (model.options["coupling_blocks"], model.options["condition"]) == (2, 8)
    assert (model.image_size, model.precision) == ((64, 64), "fp32")
    assert model.encoder.state_dict()["network.bn1.running_mean"].any(), "an untrained encoder sees the images first"
    assert "(10 images fitted, 2 held out; none (random))" in printed
    assert f"threshold {model.image_threshold:.4f}: at most 33.3% of good images raise an alarm" in printed
    assert "Note: 2 held-out images cannot promise a false alarm rate of 0.05" in printed


def test_a_plain_folder_of_good_images_trains_the_same(
    trained: tuple[CFlowAD, str], category: Path, tmp_path: Path
) -> None:
    assert train(category / "train" / "good", tmp_path / "m.safetensors").exit_code == 0
    assert same_tensors(CFlowAD.load(tmp_path / "m.safetensors"), trained[0])


def test_another_seed_trains_another_model(trained: tuple[CFlowAD, str], category: Path, tmp_path: Path) -> None:
    assert train(category, tmp_path / "m.safetensors", "--seed", 1).exit_code == 0
    other = CFlowAD.load(tmp_path / "m.safetensors")
    assert not same_tensors(other.decoders, trained[0].decoders)
    weights = [model.encoder.state_dict()["network.conv1.weight"] for model in (other, trained[0])]
    assert not torch.equal(*weights), "the random encoder's too"


def test_model_is_named_after_its_data_where_nothing_else_is_said(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", category, *TINY_OPTIONS).exit_code == 0
    assert list(files(tmp_path)) == [Path("cloth.safetensors")]


def test_unreadable_image_is_skipped_with_one_line(category: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(category / "train" / "good", tmp_path / "good"))
    (data / "005.png").write_bytes((data / "005.png").read_bytes()[:500])
    result = train(data, tmp_path / "m.safetensors")
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert str(data / "005.png") in line
    assert "(9 images fitted, 2 held out" in result.stdout


def test_nothing_held_out_says_that_there_are_no_thresholds(category: Path, tmp_path: Path) -> None:
    result = train(category, tmp_path / "m.safetensors", "--holdout", 0)
    assert "no thresholds: nothing was held out" in result.stdout
    assert CFlowAD.load(tmp_path / "m.safetensors").image_threshold is None


def test_f1_optimal_thresholds_come_from_the_labelled_images(category: Path, tmp_path: Path) -> None:
    result = train(category, tmp_path / "m.safetensors", "--threshold", "f1")
    assert "F1-optimal on the test images" in result.stdout
    model = CFlowAD.load(tmp_path / "m.safetensors")
    found = evaluate(model, MVTecCategory(category).test)
    assert model.image_threshold == pytest.approx(found.image_f1_threshold, abs=1e-6)
    assert model.pixel_threshold == pytest.approx(found.pixel_f1_threshold, abs=1e-6)
    assert model.false_alarm_rate.isnan()


def test_images_read_by_other_processes_train_the_same_model(category: Path, tmp_path: Path) -> None:
    assert train(category, tmp_path / "alone.safetensors").exit_code == 0
    assert train(category, tmp_path / "ahead.safetensors", "--workers", "2").exit_code == 0
    alone, ahead = (CFlowAD.load(tmp_path / f"{name}.safetensors") for name in ("alone", "ahead"))
    assert same_tensors(alone, ahead)


class StopHereError(Exception):
    """Ends the command where training would begin."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the training run is asked for."""
    arguments: dict[str, Any] = {}

    def keep(*values: Any) -> None:
        names = ("model", "paths", "recipe", "holdout", "false_alarm_rate", "seed", "batch_size", "workers", "on_skip")
        arguments.update(zip(names, values, strict=True))
        raise StopHereError

    monkeypatch.setattr(sys.modules["cflow_fast.cli.train"], "Fit", keep)
    return arguments


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_taken_whole(asked: dict[str, Any], category: Path, tmp_path: Path, preset: str) -> None:
    tiny = ("--encoder", "resnet18", "--layers", "layer2", "--untrained", "--coupling-blocks", "1", "--condition", "0")
    with pytest.raises(StopHereError):
        run("train", category, "-o", tmp_path / "m", *tiny, "--preset", preset)
    assert asked["recipe"] == PRESETS[preset]
    assert asked["model"].options["permute_soft"] == (preset != "fast"), "the published presets are soft"
    assert (asked["holdout"], asked["false_alarm_rate"], asked["seed"]) == (0.2, 0.05, 0)


def test_every_number_of_a_preset_is_an_option(asked: dict[str, Any], category: Path, tmp_path: Path) -> None:
    numbers = (
        *(
            "--learning-rate",
            "0.5",
            "--epochs",
            "3",
            "--passes",
            "4",
            "--images",
            "5",
            "--vectors",
            "6",
            "--steps",
            "7",
        ),
        *("--keep-remainder", "--warmup-epochs", "0.5", "--warmup-from", "0.25", "--decay-to", "0.125"),
        *("--decay-every-step", "--rotation", "1.5", "--loss", "likelihood"),
    )
    with pytest.raises(StopHereError):
        train(category, tmp_path / "m", "--preset", "cflow-ad", "--permute-hard", *numbers, "--holdout", "0.5")
    assert asked["recipe"] == Recipe(0.5, 3, 4, 5, 6, 7, False, 0.5, 0.25, 0.125, True, 1.5, "likelihood")
    assert asked["model"].options["permute_soft"] is False
    assert asked["holdout"] == 0.5


def test_interrupted_training_leaves_a_usable_model_and_resumes_to_the_same_end(
    trained: tuple[CFlowAD, str], category: Path, tmp_path: Path
) -> None:
    """A real Ctrl-C of a real process."""
    output = tmp_path / "cloth.safetensors"
    command = [sys.executable, "-c", INTERRUPTED_IN_STEP_3, "train", str(category), "-o", str(output), *TINY_OPTIONS]
    command += ["--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the same order
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert process.returncode == 130, process.stderr
    assert f"interrupted: {output} can be used as it is; --resume" in process.stdout
    assert "stopping after this step" in process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"cloth.safetensors", "cloth.resume.safetensors"}
    half_way = CFlowAD.load(output)
    assert half_way.image_threshold is not None
    assert not same_tensors(half_way.decoders, trained[0].decoders)

    result = train(category, output, "--resume")
    assert result.exit_code == 0, result.output
    assert same_tensors(CFlowAD.load(output), trained[0])
    assert [path.name for path in tmp_path.iterdir()] == ["cloth.safetensors"]


@pytest.fixture(autouse=True)
def python_hears_interrupts() -> Iterator[None]:
    """A shell's background job starts with Ctrl-C ignored, and so would everything in it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, *arguments: Any) -> Progress:
        if self.position.step == 2:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", interrupted)


def test_second_interrupt_stops_at_once_and_writes_nothing(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, times=2)
    result = train(category, tmp_path / "m.safetensors")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert files(tmp_path) == {}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_with_other_options_is_refused_and_keeps_the_checkpoint(
    category: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, times=1)
        assert train(category, tmp_path / "m.safetensors").exit_code == 130
    before = files(tmp_path)
    assert len(before) == 2
    for options, words in ((("--steps", 9), "another recipe"), (("--seed", 9), "another seed")):
        result = train(category, tmp_path / "m.safetensors", "--resume", *options)
        assert result.exit_code == 1
        assert words in result.stderr
        assert files(tmp_path) == before


def test_nothing_to_resume_is_said(category: Path, tmp_path: Path) -> None:
    result = train(category, tmp_path / "m.safetensors", "--resume")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: there is no interrupted run to resume:")
    assert files(tmp_path) == {}
