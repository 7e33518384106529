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
    score: float  # largest anomaly inside

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
    score = float(anomaly_map[finite].max()) if finite.any() else float("nan")
    if image_threshold is None or pixel_threshold is None:
        return Prediction(anomaly_map, score, None, None, (), non_finite)
    mask = ~finite
    mask[finite] = anomaly_map[finite] > pixel_threshold
    is_defective = non_finite > 0 or score > image_threshold
    return Prediction(anomaly_map, score, is_defective, mask, _defects(mask, anomaly_map), non_finite)


def _defects(mask: np.ndarray, anomaly_map: np.ndarray) -> tuple[Defect, ...]:
    """Largest first."""
    regions = regionprops(label(mask, connectivity=2), intensity_image=anomaly_map)
    found = [Defect(*region.bbox, int(region.area), float(region.intensity_max)) for region in regions]
    return tuple(sorted(found, key=lambda defect: -defect.area))
