"""A run that was interrupted, however often, and continued from its files ends bit by bit as an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import recipe, same_tensors, tiny_model

from cflow_fast.errors import CFlowFastError, ModelFileError
from cflow_fast.fitting import Fit
from cflow_fast.model import CFlowAD
from cflow_fast.recipes import Recipe

RECIPES: dict[str, dict[str, Any]] = {
    "like fast": {"steps": 12},
    "like cflow-ad": {
        "epochs": 2,
        "passes": 2,
        "images": 4,
        "steps": None,
        "vectors": 400,
        "drop_remainder": True,
        "warmup_epochs": 1,
        "decay_every_step": False,
        "loss": "logsigmoid",
    },
    "like paper": {"epochs": 2, "images": 5, "steps": None, "vectors": 400, "warmup_epochs": 1, "rotation": 5.0},
}


def after(steps: int) -> Callable[[], bool]:
    """A should_stop that lets so many steps pass."""
    left = steps

    def should_stop() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    return should_stop


def interrupted(folder: Path, paths: list[Path], numbers: Recipe, stops: list[int]) -> CFlowAD:
    """Train with interruptions after so many steps each; every part starts from the files of the one before."""
    model = tiny_model()
    for part, steps in enumerate([*stops, 10**6]):
        if part:
            model = CFlowAD.load(folder / "model.safetensors")
        fit = Fit(model, paths, numbers, false_alarm_rate=0.4, seed=3)
        if part:
            fit.restore(folder / "state.safetensors")
        torch.manual_seed(part)  # another process has another random state
        assert fit.run(should_stop=after(steps)) == (steps == 10**6)
        model.save(folder / "model.safetensors")
        fit.save_state(folder / "state.safetensors")
    return model


@pytest.fixture(scope="session")
def uninterrupted(good_paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, CFlowAD]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {name: interrupted(folder, good_paths, recipe(**numbers), []) for name, numbers in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stops", [[0], [5], [3, 0, 4, 1]], ids=str)
def test_continued_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, good_paths: list[Path], uninterrupted: dict[str, CFlowAD], name: str, stops: list[int]
) -> None:
    continued = interrupted(tmp_path, good_paths, recipe(**RECIPES[name]), stops)
    assert same_tensors(continued, uninterrupted[name])
    assert continued.precision == uninterrupted[name].precision


def test_stopped_run_leaves_a_usable_model(tmp_path: Path, good_paths: list[Path]) -> None:
    model = tiny_model()
    assert not Fit(model, good_paths, recipe(steps=50), false_alarm_rate=0.4).run(should_stop=after(10))
    model.save(tmp_path / "model.safetensors")
    prediction = CFlowAD.load(tmp_path / "model.safetensors").predict(good_paths[0])[0]
    assert prediction.is_defective is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": recipe(steps=13)}, "had another recipe: resume with the same options"),
        ({"seed": 4}, "had another seed"),
        ({"holdout": 0.5}, "had another count"),
    ],
)
def test_state_of_another_run_is_refused(
    tmp_path: Path, good_paths: list[Path], change: dict[str, Any], words: str
) -> None:
    options: dict[str, Any] = {"recipe": recipe(steps=12), "seed": 3}
    fit = Fit(tiny_model(), good_paths, **options)
    fit.save_state(tmp_path / "state.safetensors")
    other = Fit(tiny_model(), good_paths, **options | change)
    with pytest.raises(CFlowFastError, match=words):
        other.restore(tmp_path / "state.safetensors")


def test_state_cut_short_is_named(tmp_path: Path, good_paths: list[Path]) -> None:
    fit = Fit(tiny_model(), good_paths, recipe(), holdout=0)
    path = tmp_path / "state.safetensors"
    fit.run(should_stop=after(2))
    fit.save_state(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=r"state\.safetensors cannot be read .* cut short"):
        fit.restore(path)
