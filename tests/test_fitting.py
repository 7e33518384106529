"""From a folder of good images to a calibrated model: who takes part in what, and what happens to bad files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import calibrated_model, read, recipe, same_tensors, save_image, texture, tiny_model

from cflow_fast.calibration import conformal_threshold
from cflow_fast.errors import DataError
from cflow_fast.fitting import Fit, Split, calibrate, split_images
from cflow_fast.model import CFlowAD

PATHS = [Path(f"{number}.png") for number in range(20)]


@pytest.fixture
def folder(category: Path, tmp_path: Path) -> Path:
    """Good images that the test may change."""
    return Path(shutil.copytree(category / "train" / "good", tmp_path / "good"))


def fitted(folder: Path, **options: Any) -> Fit:
    fit = Fit(tiny_model(), sorted(folder.iterdir()), recipe(), **{"false_alarm_rate": 0.4} | options)
    assert fit.run()
    return fit


def test_split_holds_out_a_random_share_and_keeps_the_order() -> None:
    split = split_images(PATHS, 0.2, seed=0)
    assert (len(split.fit), len(split.held_out)) == (16, 4)
    assert sorted([*split.fit, *split.held_out]) == sorted(PATHS)
    assert split.fit == [path for path in PATHS if path in split.fit]
    assert split == split_images(PATHS, 0.2, seed=0)
    assert split != split_images(PATHS, 0.2, seed=1)


@pytest.mark.parametrize(("holdout", "count"), [(0, 0), (0.001, 1), (0.07, 1), (0.5, 10), (0.95, 19)])
def test_held_out_is_at_least_one_image_when_any_is_wanted(holdout: float, count: int) -> None:
    assert len(split_images(PATHS, holdout, seed=0).held_out) == count


def test_too_few_images_to_hold_any_out_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 good image\(s\) are too few to hold 1 out"):
        split_images(PATHS[:1], 0.2, seed=0)
    assert split_images(PATHS[:1], 0, seed=0) == Split(PATHS[:1], [])


@pytest.mark.parametrize("holdout", [-0.1, 1, math.nan])
def test_impossible_share_is_refused(holdout: float) -> None:
    with pytest.raises(ValueError, match="holdout is at least 0 and under 1, got"):
        split_images(PATHS, holdout, seed=0)


def test_maxima_come_from_the_fitted_images_and_thresholds_from_the_others(folder: Path) -> None:
    fit = fitted(folder)
    model, split = fit.model, fit.split
    maxima = [log_prob.max().item() for log_prob in model.log_probs(read(split.fit))]
    assert model.log_prob_max.tolist() == pytest.approx(maxima, abs=1e-6)
    scores = [prediction.score for prediction in model.predict(split.held_out)]
    assert len(scores) == 2
    expected = conformal_threshold(scores, 0.4)
    assert model.image_threshold == model.pixel_threshold == pytest.approx(expected.threshold, abs=1e-6)
    assert model.false_alarm_rate.item() == pytest.approx(expected.rate)


def test_held_out_images_play_no_part_in_fitting_or_in_the_maxima(folder: Path) -> None:
    before = fitted(folder)
    for path in before.split.held_out:
        save_image(path, 255 - texture(np.random.default_rng(5)) // 2)
    after = fitted(folder)
    assert after.split == before.split
    assert same_tensors(before.model.decoders, after.model.decoders)
    assert before.model.log_prob_max.tolist() == after.model.log_prob_max.tolist()
    assert before.model.image_threshold != after.model.image_threshold


def test_nothing_held_out_gives_no_thresholds(folder: Path) -> None:
    model = fitted(folder, holdout=0).model
    assert model.is_calibrated
    assert (model.image_threshold, model.pixel_threshold) == (None, None)
    assert math.isnan(model.false_alarm_rate)


def test_rate_that_so_few_images_cannot_promise_is_reported(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 held-out images cannot promise a false alarm rate of 0\.05"):
        model = fitted(folder, false_alarm_rate=0.05).model
    assert model.false_alarm_rate.item() == pytest.approx(1 / 3)


def test_unreadable_images_are_left_out_and_reported(folder: Path) -> None:
    clean = fitted(folder)
    whole = (folder / "000.png").read_bytes()
    bad = [folder / "0000.png", folder / "zzz.jpg"]
    bad[0].write_bytes(whole[: len(whole) // 2])
    bad[1].write_text("no image")
    reported: dict[Path, str] = {}
    fit = fitted(folder, on_skip=reported.__setitem__)
    assert list(reported) == bad
    assert all(str(path) in reason and "\n" not in reason for path, reason in reported.items())
    assert fit.split == clean.split
    assert same_tensors(fit.model, clean.model)


def test_folder_without_a_readable_image_is_refused(tmp_path: Path, good_paths: list[Path]) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_text("no image")
    with pytest.raises(DataError, match="none of the 2 images can be read"):
        Fit(tiny_model(), paths, recipe())


def test_image_that_vanishes_during_the_run_is_named(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    fit = Fit(tiny_model(), paths, recipe())
    fit.split.fit[4].unlink()
    with pytest.raises(DataError, match=fit.split.fit[4].name):
        fit.run()


def test_calibration_replaces_maxima_and_thresholds_and_leaves_the_weights(model: CFlowAD, folder: Path) -> None:
    before = calibrated_model(sorted(folder.iterdir()))
    for path in folder.iterdir():
        save_image(path, texture(np.random.default_rng(int(path.stem) + 50)))
    split = split_images(sorted(folder.iterdir()), 0.5, seed=0)
    calibrate(model, split, false_alarm_rate=0.2)
    assert same_tensors(model.decoders, before.decoders)
    assert same_tensors(model.encoder, before.encoder)
    scores = [prediction.score for prediction in model.predict(split.held_out)]
    assert model.image_threshold == pytest.approx(max(scores), abs=1e-6), "the sixth of six: ceil(7 x 0.8)"
    assert model.log_prob_max.tolist() != before.log_prob_max.tolist()


def test_calibration_without_held_out_images_forgets_old_thresholds(model: CFlowAD, folder: Path) -> None:
    calibrate(model, Split(sorted(folder.iterdir()), []), false_alarm_rate=0.2)
    assert model.image_threshold is None


def test_calibration_reports_unreadable_images_and_needs_some_of_either_kind(model: CFlowAD, folder: Path) -> None:
    paths = sorted(folder.iterdir())
    paths[0].write_text("no image")
    reported: list[Path] = []
    calibrate(model, Split(paths[:6], paths[6:]), 0.2, on_skip=lambda path, reason: reported.append(path))
    assert reported == paths[:1]
    for split in (Split(paths[:1], paths[6:]), Split(paths[6:], paths[:1])):
        with pytest.raises(DataError):
            calibrate(model, split, 0.2)
