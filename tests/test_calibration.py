"""The promised false-alarm rate is kept on data that is exchangeable, whatever its distribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import binom

from cflow_fast.calibration import conformal_threshold
from cflow_fast.errors import DataError


@pytest.mark.parametrize(
    ("samples", "rate", "rank", "promised"),
    [
        (19, 0.05, 19, 1 / 20),
        (39, 0.05, 38, 2 / 40),
        (40, 0.05, 39, 2 / 41),  # ceil(41 * 0.95) = ceil(38.95)
        (99, 0.29, 71, 29 / 100),  # in binary 100 * 0.29 is 28.999..., which would be a rank of 72
        (99, 0.07, 93, 7 / 100),
        (9, 0.1, 9, 1 / 10),
        (4, 0.5, 3, 2 / 5),
        (1, 0.5, 1, 1 / 2),
        (3, 0.99, 1, 3 / 4),
    ],
)
def test_threshold_is_the_conformal_order_statistic(samples: int, rate: float, rank: int, promised: float) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1, samples + 1))  # the k-th smallest is k
    result = conformal_threshold(scores, rate)
    assert result.threshold == rank
    assert result.rate == promised
    assert (result.wanted_rate, result.samples, result.limited) == (rate, samples, False)


@pytest.mark.parametrize("samples", [1, 5, 18])
def test_rate_that_so_few_images_cannot_promise_becomes_the_least_that_they_can(samples: int) -> None:
    result = conformal_threshold(np.arange(samples), 0.05)
    assert result.threshold == samples - 1, "the largest score"
    assert result.rate == 1 / (samples + 1)
    assert result.wanted_rate == 0.05
    assert result.limited


REPEATS = 20_000


@pytest.mark.parametrize(("samples", "rate"), [(42, 0.05), (10, 0.05), (100, 0.29), (7, 0.5)])
def test_false_alarms_of_exchangeable_scores_are_as_many_as_promised(samples: int, rate: float) -> None:
    """Each repeat draws held-out scores and a new one, dependent but exchangeable: they share a random factor."""
    random = np.random.default_rng(1)
    alarms = 0
    for scores in random.lognormal(size=(REPEATS, samples + 1)) * random.lognormal(size=(REPEATS, 1)):
        result = conformal_threshold(scores[:-1], rate)
        alarms += scores[-1] > result.threshold
    low, high = binom.interval(0.999, REPEATS, result.rate)
    assert low <= alarms <= high
    assert result.rate <= rate or result.limited


def test_false_alarms_of_tied_scores_are_at_most_as_many_as_promised() -> None:
    random = np.random.default_rng(2)
    alarms = 0
    for scores in random.integers(0, 5, size=(REPEATS, 43)):
        result = conformal_threshold(scores[:-1], 0.2)
        alarms += scores[-1] > result.threshold
    assert alarms <= binom.ppf(0.9995, REPEATS, result.rate)


def test_threshold_of_float32_scores_compares_exactly() -> None:
    scores = np.random.default_rng(3).random(40, dtype=np.float32)
    result = conformal_threshold(scores, 0.05)
    assert (scores > result.threshold).sum() == (scores > np.float32(result.threshold)).sum() == 1


def test_lists_and_numpy_rates_are_taken() -> None:
    assert conformal_threshold([3.0, 1.0, 2.0], 0.5) == conformal_threshold(np.array([1, 2, 3]), np.float64(0.5))


def test_result_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        conformal_threshold([1.0], 0.5).threshold = 0.0  # type: ignore[misc]


def test_no_scores_are_refused() -> None:
    with pytest.raises(DataError, match="needs the scores of good images"):
        conformal_threshold([], 0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="1 of 3 scores of good images are not finite"):
        conformal_threshold([1.0, value, 2.0], 0.05)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_rates_outside_of_0_1_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"false_alarm_rate is .*; expected a number between 0 and 1"):
        conformal_threshold([1.0, 2.0], rate)
