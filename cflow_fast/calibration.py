"""Thresholds with a promise, from good images alone: split conformal prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cflow_fast.errors import DataError


@dataclass(frozen=True)
class ConformalThreshold:
    """A threshold and its promise: a new good image's score exceeds `threshold` with a chance of at most `rate`.

    The chance is over the held-out images as well as the new one, all of them exchangeable, and is `rate` itself when
    no two scores are equal. `rate` is the largest multiple of 1/(samples + 1) that is at most `wanted_rate`, or
    1/(samples + 1) when that is more than was wanted (`limited`).
    """

    threshold: float
    rate: float
    wanted_rate: float
    samples: int

    @property
    def limited(self) -> bool:
        """Whether there were too few images for the wanted rate."""
        return self.rate > self.wanted_rate


def conformal_threshold(scores: Sequence[float] | np.ndarray, false_alarm_rate: float) -> ConformalThreshold:
    """The split-conformal threshold for a wanted rate of good images with an alarm; alarm means score > threshold.

    `scores` are those of n good images that played no part in fitting. The threshold is the k-th smallest of them,
    k = ceil((n + 1)(1 - rate)) (Vovk et al., 2005; Lei et al., 2018); a rate below 1/(n + 1), for which k would be
    n + 1, becomes 1/(n + 1), and the threshold is the largest score.

    Raises DataError when there is no score or one is not finite, ValueError for a rate outside of (0, 1).
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate is {false_alarm_rate}; expected a number between 0 and 1")
    ordered = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    samples = ordered.size
    if samples == 0:
        raise DataError("a threshold needs the scores of good images that were not trained on, and there is none")
    if not np.isfinite(ordered).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(ordered))} of {samples} scores of good images are not finite")
    # The rate as it is written, not its binary neighbour: 0.29 of 100 is 29 alarms, not 28.
    alarms = max(1, math.floor((samples + 1) * Fraction(str(float(false_alarm_rate)))))
    threshold = float(ordered[samples - alarms])
    return ConformalThreshold(threshold, alarms / (samples + 1), float(false_alarm_rate), samples)
