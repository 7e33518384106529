"""An evaluation's metrics are those of the model's own predictions, each image against its own mask."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

from cflow_fast.datasets import MVTecCategory, Sample
from cflow_fast.errors import CFlowFastError, DataError
from cflow_fast.evaluation import Evaluation, evaluate
from cflow_fast.metrics import aupro
from cflow_fast.model import CFlowAD


@pytest.fixture
def samples(category: Path) -> list[Sample]:
    return MVTecCategory(category).test


@pytest.fixture
def own_samples(category: Path, tmp_path: Path) -> list[Sample]:
    """Samples whose files the test may change."""
    return MVTecCategory(shutil.copytree(category, tmp_path / "cloth")).test


def pixels(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    truth = np.concatenate([result.ground_truth.ravel() for result in evaluation.results])
    return truth, np.concatenate([result.prediction.anomaly_map.ravel() for result in evaluation.results])


def test_metrics_are_those_of_the_predictions(model: CFlowAD, samples: list[Sample]) -> None:
    evaluation = evaluate(model, samples, batch_size=4)
    predictions = model.predict([sample.path for sample in samples])
    scores = [prediction.score for prediction in predictions]
    assert [result.sample for result in evaluation.results] == samples
    assert [result.prediction.score for result in evaluation.results] == pytest.approx(scores, abs=1e-6)
    labels = [sample.is_defective for sample in samples]
    truth, anomalies = pixels(evaluation)
    assert evaluation.image_auroc == pytest.approx(roc_auc_score(labels, scores))
    assert evaluation.pixel_auroc == pytest.approx(roc_auc_score(truth, anomalies), abs=1e-6)
    maps = [result.prediction.anomaly_map for result in evaluation.results]
    assert evaluation.aupro == aupro(maps, [result.ground_truth for result in evaluation.results])
    assert (evaluation.good, evaluation.defective) == (3, 3)
    assert evaluation.seconds_per_image > 0


def test_results_come_with_masks_of_their_images_sizes(model: CFlowAD, samples: list[Sample]) -> None:
    sizes = [result.ground_truth.shape for result in evaluate(model, samples).results]
    assert sizes == [(64, 64), (48, 80), (64, 64)] * 2
    areas = [result.ground_truth.sum() for result in evaluate(model, samples).results]
    assert areas == [0, 0, 0, 280, 280, 280]


def test_scratches_are_told_from_good_images(model: CFlowAD, samples: list[Sample]) -> None:
    """Even untrained decoders see that much, so that the other claims are about something."""
    evaluation = evaluate(model, samples)
    assert evaluation.image_auroc == 1.0
    assert evaluation.pixel_auroc > 0.8


def test_f1_thresholds_reach_their_f1_when_they_are_stored(model: CFlowAD, samples: list[Sample]) -> None:
    found = evaluate(model, samples)
    model.set_thresholds(found.image_f1_threshold, found.pixel_f1_threshold)
    again = evaluate(model, samples)
    labels = [sample.is_defective for sample in samples]
    verdicts = [result.prediction.is_defective for result in again.results]
    assert f1_score(labels, verdicts) == pytest.approx(found.image_f1)
    masks = [result.prediction.mask for result in again.results]
    mask = np.concatenate([mask.ravel() for mask in masks if mask is not None])
    assert f1_score(pixels(again)[0], mask) == pytest.approx(found.pixel_f1)


def test_f1_threshold_without_good_images_still_finds_every_defect(model: CFlowAD, samples: list[Sample]) -> None:
    """It lies just below the lowest score, in the precision that thresholds are stored in."""
    scratched = [sample for sample in samples if sample.is_defective]
    found = evaluate(model, scratched)
    model.set_thresholds(found.image_f1_threshold, found.pixel_f1_threshold)
    assert evaluate(model, scratched).missed == 0


@pytest.mark.parametrize(("threshold", "false_alarms", "missed"), [(-1.0, 2, 0), (2.0, 0, 3)])
def test_false_alarms_and_missed_defects_are_counted_at_the_stored_threshold(
    model: CFlowAD, samples: list[Sample], threshold: float, false_alarms: int, missed: int
) -> None:
    model.set_thresholds(threshold, threshold)
    evaluation = evaluate(model, samples[1:])
    assert (evaluation.false_alarms, evaluation.missed) == (false_alarms, missed)


def test_model_without_thresholds_is_measured_too(model: CFlowAD, samples: list[Sample]) -> None:
    model.thresholds.fill_(math.nan)
    evaluation = evaluate(model, samples)
    assert (evaluation.false_alarms, evaluation.missed) == (None, None)
    assert evaluation.image_auroc == 1.0


@pytest.mark.parametrize("kind", [True, False], ids=["defective", "good"])
def test_metrics_that_one_kind_of_image_cannot_give_are_nan(model: CFlowAD, samples: list[Sample], kind: bool) -> None:
    evaluation = evaluate(model, [sample for sample in samples if sample.is_defective is kind])
    assert math.isnan(evaluation.image_auroc)
    assert math.isnan(evaluation.aupro) is not kind, "defective images have good pixels"
    assert math.isnan(evaluation.image_f1) is not kind


def test_mask_of_another_size_and_unreadable_image_are_left_out_and_reported(
    model: CFlowAD, own_samples: list[Sample]
) -> None:
    mask_path = own_samples[3].mask_path
    assert mask_path is not None
    Image.new("L", (10, 12)).save(mask_path)
    own_samples[1].path.write_bytes(own_samples[0].path.read_bytes()[:700])
    reported: dict[Path, str] = {}
    evaluation = evaluate(model, own_samples, on_skip=reported.__setitem__)
    assert set(reported) == {own_samples[1].path, own_samples[3].path}
    assert str(mask_path) in reported[own_samples[3].path]
    assert [result.sample for result in evaluation.results] == [own_samples[i] for i in (0, 2, 4, 5)]


def test_no_usable_image_is_refused(model: CFlowAD, own_samples: list[Sample]) -> None:
    for sample in own_samples:
        sample.path.write_text("no image")
    with pytest.raises(DataError, match="no test image could be used"):
        evaluate(model, own_samples)


def test_progress_counts_images(model: CFlowAD, samples: list[Sample]) -> None:
    counts: list[int] = []
    evaluate(model, samples, batch_size=4, on_progress=counts.append)
    assert counts == [4, 2]


@pytest.mark.parametrize("whole", [False, True])
def test_features_that_are_not_finite_count_as_the_worst_anomaly(
    model: CFlowAD, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """In a good image they are the worst false alarm, in a defective one a find; no metric breaks on them."""
    encode = model.features

    def damaged(images: Tensor) -> list[Tensor]:
        features = [feature.clone() for feature in encode(images)]
        features[0][0, :, :1] = torch.nan
        if whole:
            features[0][0] = torch.nan
        return features

    monkeypatch.setattr(model, "features", damaged)
    with pytest.warns(UserWarning, match="not finite"):
        good_first = evaluate(model, samples)
    assert good_first.image_auroc == pytest.approx(2 / 3)
    assert good_first.false_alarms == 1 + sum(bool(r.prediction.is_defective) for r in good_first.results[1:3])
    with pytest.warns(UserWarning, match="not finite"):
        defective_first = evaluate(model, samples[::-1])
    assert defective_first.image_auroc == 1.0
    for evaluation in (good_first, defective_first):
        assert all(math.isfinite(value) for value in evaluation.metrics().values())


def test_model_without_calibration_is_refused(model: CFlowAD, samples: list[Sample]) -> None:
    model.log_prob_max.fill_(math.nan)
    with pytest.raises(CFlowFastError, match="not calibrated"):
        evaluate(model, samples)


def test_metrics_by_name_are_the_fields(model: CFlowAD, samples: list[Sample]) -> None:
    evaluation = evaluate(model, samples)
    metrics = evaluation.metrics()
    assert {"image_auroc", "pixel_auroc", "aupro", "image_f1_threshold", "pixel_f1_threshold"} <= set(metrics)
    assert replace(evaluation, **metrics) == evaluation  # type: ignore[arg-type]
