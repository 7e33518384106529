"""What a model says about one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.measure import label, regionprops


@dataclass(frozen=True)
class Defect:
    """A connected region (8-neighbourhood) of the mask, in pixels of the original image."""

    top: int
    left: int
    bottom: int  # exclusive
    right: int  # exclusive
    area: int
    score: float  # largest anomaly inside, over what is finite; NaN where nothing is

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.top, self.left, self.bottom, self.right


@dataclass(frozen=True)
class Prediction:
    """Anomaly map, score and, for a model with thresholds, verdict, mask and defects; all at the image's own size.

    The score is the map's maximum, over what is finite. Pixels that are not finite (`non_finite` of them) come from
    features that are not: they are in the mask, and their image is defective whatever its score.
    """

    anomaly_map: np.ndarray  # (H, W) float32, from 0 to the number of scales
    score: float
    is_defective: bool | None
    mask: np.ndarray | None  # (H, W) bool
    defects: tuple[Defect, ...]
    non_finite: int


def make_prediction(
    anomaly_map: np.ndarray, image_threshold: float | None, pixel_threshold: float | None
) -> Prediction:
    """An alarm is a value strictly above its threshold."""
    finite = np.isfinite(anomaly_map)
    non_finite = int(anomaly_map.size - np.count_nonzero(finite))
    score = _highest(anomaly_map)
    if image_threshold is None or pixel_threshold is None:
        return Prediction(anomaly_map, score, None, None, (), non_finite)
    mask = ~finite
    mask[finite] = anomaly_map[finite] > pixel_threshold
    is_defective = non_finite > 0 or score > image_threshold
    return Prediction(anomaly_map, score, is_defective, mask, _defects(mask, anomaly_map), non_finite)


def _defects(mask: np.ndarray, anomaly_map: np.ndarray) -> tuple[Defect, ...]:
    """Largest first."""
    found = []
    for region in regionprops(label(mask, connectivity=2)):
        top, left, bottom, right = region.bbox
        highest = _highest(anomaly_map[region.slice][region.image])
        found.append(Defect(top, left, bottom, right, int(region.area), highest))
    return tuple(sorted(found, key=lambda defect: -defect.area))


def _highest(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else float("nan")
