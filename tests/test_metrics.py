"""The metrics agree with implementations that do nothing clever: loops over thresholds, in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from cflow_fast.metrics import aupro, auroc, best_f1

quick = settings(max_examples=150, deadline=None, derandomize=True)
tied_scores = st.integers(0, 5).map(lambda value: value / 4)
distinct_scores = st.floats(-1e3, 1e3, width=32)


@st.composite
def labelled_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels with at least one of each class, and scores with or without many ties."""
    size = draw(st.integers(2, 40))
    labels = draw(arrays(bool, size).filter(lambda a: a.any() and not a.all()))
    return labels, draw(arrays(np.float32, size, elements=draw(st.sampled_from([tied_scores, distinct_scores]))))


@st.composite
def maps_and_masks(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images of different sizes with at least one defect and one normal pixel, with or without many ties."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
    elements = draw(st.sampled_from([tied_scores, distinct_scores]))
    maps = [draw(arrays(np.float32, shape, elements=elements)) for shape in shapes]
    masks = [draw(arrays(bool, shape)) for shape in shapes]
    masks.append(np.array([[True, False, True]]))
    maps.append(draw(arrays(np.float32, (1, 3), elements=elements)))
    return maps, masks


def regions_by_flood_fill(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The 8-connected regions of a mask, found pixel by pixel."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region, frontier = set(), [left.pop()]
        while frontier:
            y, x = frontier.pop()
            region.add((y, x))
            neighbours = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= neighbours
            frontier.extend(neighbours)
        regions.append(region)
    return regions


def brute_force_aupro(maps: list[np.ndarray], masks: list[np.ndarray], fpr_limit: float) -> float:
    """AUPRO by its definition: every distinct threshold, every region, in exact fractions."""
    regions = [
        [float(anomaly_map[pixel]) for pixel in region]
        for anomaly_map, mask in zip(maps, masks, strict=True)
        for region in regions_by_flood_fill(mask)
    ]
    normal = [value for anomaly_map, mask in zip(maps, masks, strict=True) for value in anomaly_map[~mask].tolist()]
    curve = [(Fraction(0), Fraction(0))]
    for threshold in sorted({value for anomaly_map in maps for value in anomaly_map.ravel().tolist()}, reverse=True):
        overlaps = [Fraction(sum(value >= threshold for value in region), len(region)) for region in regions]
        false_positives = Fraction(sum(value >= threshold for value in normal), len(normal))
        curve.append((false_positives, sum(overlaps, Fraction(0)) / len(regions)))
    limit, area = Fraction(fpr_limit), Fraction(0)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return float(area / limit)


@quick
@given(maps_and_masks(), st.sampled_from([0.05, 0.3, 1.0]))
def test_aupro_agrees_with_brute_force(data: tuple[list[np.ndarray], list[np.ndarray]], fpr_limit: float) -> None:
    maps, masks = data
    assert aupro(maps, masks, fpr_limit) == pytest.approx(brute_force_aupro(maps, masks, fpr_limit), rel=0, abs=1e-12)


@quick
@given(maps_and_masks(), st.floats(0, 1, exclude_min=True))
def test_aupro_is_exact_where_the_limit_falls_on_a_corner(
    data: tuple[list[np.ndarray], list[np.ndarray]], share: float
) -> None:
    maps, masks = data
    normal = sum(int((~mask).sum()) for mask in masks)
    fpr_limit = math.ceil(share * normal) / normal
    assert aupro(maps, masks, fpr_limit) == pytest.approx(brute_force_aupro(maps, masks, fpr_limit), rel=0, abs=1e-12)


def test_aupro_agrees_with_brute_force_on_an_image_of_many_regions() -> None:
    random = np.random.default_rng(0)
    masks = [random.random((24, 31)) < 0.2, np.zeros((16, 16), bool)]
    maps = [random.normal(mask, 1).round(1) for mask in masks]
    assert aupro(maps, masks) == pytest.approx(brute_force_aupro(maps, masks, 0.3), rel=0, abs=1e-12)


REGIONS = np.array([[True, True, False, True], [False, False, False, False]])  # one of two pixels, one of one
SCORES = np.array([[0.9, 0.5, 0.8, 0.7], [0.6, 0.4, 0.3, 0.2]])


def test_aupro_of_a_curve_worked_by_hand() -> None:
    """Corners (0, 1/4), (1/5, 1/4), (1/5, 3/4), (2/5, 3/4), (2/5, 1); to 0.3 that is 0.2/4 + 0.1 * 3/4 = 0.125."""
    assert aupro([SCORES], [REGIONS], 0.3) == pytest.approx(0.125 / 0.3, abs=1e-15)


def test_aupro_is_interpolated_at_the_limit_where_scores_are_tied() -> None:
    """One threshold for all pixels is a straight line from (0, 0) to (1, 1)."""
    assert aupro([np.ones((2, 4))], [REGIONS], 0.3) == pytest.approx(0.3**2 / 2 / 0.3, abs=1e-15)


def test_aupro_counts_the_pixels_of_good_images_as_normal() -> None:
    """Five more normal pixels, all below: the corners' rates are halved, so 0.1/4 + 0.1 * 3/4 + 0.1."""
    good = np.full((1, 5), 0.1)
    assert aupro([SCORES, good], [REGIONS, np.zeros((1, 5), bool)], 0.3) == pytest.approx(0.2 / 0.3, abs=1e-15)


def test_aupro_joins_regions_that_touch_at_a_corner() -> None:
    """A diagonal pair, half found, and a single pixel, missed: 1/4; as three regions it would be 1/3."""
    mask = np.array([[True, False, False, False], [False, True, False, True]])
    scores = np.where(mask, 0.0, 0.5)
    scores[0, 0] = 1.0
    assert aupro([scores], [mask], 0.3) == pytest.approx(0.25, abs=1e-15)


@quick
@given(labelled_scores())
def test_aupro_of_single_pixels_over_all_rates_is_auroc(data: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = data
    maps, masks = list(scores.reshape(-1, 1, 1)), list(labels.reshape(-1, 1, 1))
    assert aupro(maps, masks, 1.0) == pytest.approx(auroc(labels, scores), rel=0, abs=1e-12)


def test_a_perfect_map_has_aupro_1_and_its_opposite_0() -> None:
    assert aupro([REGIONS.astype(float)], [REGIONS]) == pytest.approx(1.0, abs=1e-15)
    assert aupro([-REGIONS.astype(float)], [REGIONS]) == 0.0


def test_aupro_is_nan_without_regions_or_without_normal_pixels() -> None:
    assert math.isnan(aupro([SCORES], [np.zeros_like(REGIONS)]))
    assert math.isnan(aupro([SCORES], [np.ones_like(REGIONS)]))
    assert math.isnan(aupro([], []))


def test_aupro_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\) and scores \(4, 2\)"):
        aupro([SCORES.T], [REGIONS])
    with pytest.raises(ValueError, match="got 1 anomaly maps and 2 masks"):
        aupro([SCORES], [REGIONS, REGIONS])
    with pytest.raises(ValueError, match="1 of 8 scores are NaN"):
        aupro([np.where(SCORES == 0.5, np.nan, SCORES)], [REGIONS])
    for limit in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fpr_limit is"):
            aupro([SCORES], [REGIONS], limit)


@quick
@given(labelled_scores())
def test_auroc_agrees_with_scikit_learn(data: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = data
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), rel=0, abs=1e-12)


def test_auroc_counts_pairs_and_ties_by_half() -> None:
    """Defective 3 and 1 against good 1 and 0: three pairs in order, one tied."""
    assert auroc([1, 1, 0, 0], [3.0, 1.0, 1.0, 0.0]) == 3.5 / 4


def test_auroc_takes_labels_and_scores_of_any_one_shape() -> None:
    assert auroc(REGIONS, SCORES) == auroc(REGIONS.ravel(), SCORES.ravel()) == 12 / 15


def test_auroc_is_nan_for_one_class() -> None:
    assert math.isnan(auroc([0, 0], [1.0, 2.0]))
    assert math.isnan(auroc([1, 1], [1.0, 2.0]))
    assert math.isnan(auroc([], []))


@pytest.mark.parametrize("metric", [auroc, best_f1])
def test_nan_scores_and_other_shapes_are_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        metric([0, 1], [1.0, float("nan")])
    with pytest.raises(ValueError, match=r"labels have shape \(2,\) and scores \(3,\)"):
        metric([0, 1], [1.0, 2.0, 3.0])


@quick
@given(labelled_scores())
def test_best_f1_is_the_best_over_every_distinct_score(data: tuple[np.ndarray, np.ndarray]) -> None:
    labels, scores = data
    threshold, f1 = best_f1(labels, scores)
    assert f1 == max(f1_by_counting(labels, scores >= cut) for cut in scores)
    assert f1_by_counting(labels, scores > threshold) == f1
    assert f1_by_counting(labels, scores > np.float32(threshold)) == f1, "the comparison is exact in float32 too"


def f1_by_counting(labels: np.ndarray, alarms: np.ndarray) -> float:
    right, wrong = int((labels & alarms).sum()), int((labels ^ alarms).sum())
    return 2 * right / (2 * right + wrong)


def test_best_f1_threshold_is_the_largest_score_that_raises_no_alarm() -> None:
    assert best_f1([0, 0, 1, 0, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == (0.2, 6 / 7)
    assert best_f1([0, 0, 1, 1], [0.1, 0.2, 0.5, 0.6]) == (0.2, 1.0)


def test_best_f1_of_equal_thresholds_is_the_one_that_alarms_least() -> None:
    """Calling 0.9 alone defective finds one of two, calling all four so adds two false alarms: F1 is 2/3 for both."""
    assert best_f1([1, 0, 0, 1], [0.9, 0.5, 0.4, 0.3]) == (0.5, 2 / 3)


def test_best_f1_can_call_everything_defective() -> None:
    threshold, f1 = best_f1([1, 1, 0], np.array([0.5, 0.5, 0.5], np.float32))
    assert threshold < 0.5
    assert np.float32(threshold) < np.float32(0.5)
    assert f1 == 0.8


def test_best_f1_is_nan_when_nothing_is_defective() -> None:
    assert all(math.isnan(value) for value in best_f1([0, 0], [1.0, 2.0]))
