"""From an anomaly map to a verdict, a mask and its defects."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cflow_fast.prediction import Defect, make_prediction


def two_spots() -> np.ndarray:
    """A 3 x 2 spot with a diagonal neighbour, and a stronger single pixel at the border."""
    anomaly_map = np.full((8, 10), 0.125, np.float32)
    anomaly_map[2:5, 1:3] = 0.625
    anomaly_map[5, 3] = 0.75
    anomaly_map[0, 9] = 0.875
    return anomaly_map


def test_score_is_the_largest_anomaly() -> None:
    assert make_prediction(two_spots(), None, None).score == 0.875


@pytest.mark.parametrize(("threshold", "verdict"), [(0.874, True), (0.875, False), (1.5, False)])
def test_image_is_defective_strictly_above_its_threshold(threshold: float, verdict: bool) -> None:
    assert make_prediction(two_spots(), threshold, 0.5).is_defective is verdict


def test_mask_is_strictly_above_the_pixel_threshold() -> None:
    mask = make_prediction(two_spots(), 0.5, 0.625).mask
    assert mask is not None
    assert [tuple(position) for position in np.argwhere(mask)] == [(0, 9), (5, 3)]


def test_defects_are_the_regions_of_the_mask_largest_first() -> None:
    first, second = make_prediction(two_spots(), 0.5, 0.5).defects
    assert first == Defect(top=2, left=1, bottom=6, right=4, area=7, score=0.75), "diagonals connect"
    assert second == Defect(top=0, left=9, bottom=1, right=10, area=1, score=0.875)
    assert first.box == (2, 1, 6, 4)


def test_nothing_above_the_threshold_is_no_defect() -> None:
    prediction = make_prediction(two_spots(), 1.0, 1.0)
    assert (prediction.is_defective, prediction.defects) == (False, ())
    assert prediction.mask is not None
    assert not prediction.mask.any()


def test_without_thresholds_there_is_no_verdict() -> None:
    prediction = make_prediction(two_spots(), None, None)
    assert (prediction.is_defective, prediction.mask, prediction.defects) == (None, None, ())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_in_the_mask_and_makes_the_image_defective(value: float) -> None:
    anomaly_map = np.full((6, 6), 0.125, np.float32)
    anomaly_map[4, 2:5] = value
    prediction = make_prediction(anomaly_map, 0.5, 0.5)
    assert prediction.score == 0.125, "over what is finite"
    assert (prediction.is_defective, prediction.non_finite) == (True, 3)
    assert prediction.mask is not None
    np.testing.assert_array_equal(prediction.mask, ~np.isfinite(anomaly_map))
    (defect,) = prediction.defects
    assert (defect.box, defect.area) == ((4, 2, 5, 5), 3)
    assert math.isnan(defect.score)


def test_defect_that_is_partly_not_finite_has_the_score_of_the_rest() -> None:
    anomaly_map = two_spots()
    anomaly_map[3, 1] = np.nan
    assert [defect.score for defect in make_prediction(anomaly_map, 0.5, 0.5).defects] == [0.75, 0.875]


def test_map_with_nothing_finite_has_no_score_and_is_defective() -> None:
    prediction = make_prediction(np.full((2, 3), np.nan, np.float32), 0.5, 0.5)
    assert math.isnan(prediction.score)
    assert (prediction.is_defective, prediction.non_finite) == (True, 6)
