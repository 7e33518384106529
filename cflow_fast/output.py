"""Results as files: a heatmap and a mask for every image, and all scores as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from cflow_fast.files import atomic_path, write_text
from cflow_fast.model import CFlowAD
from cflow_fast.prediction import Prediction
from cflow_fast.render import mask_image, overlay

COLUMNS = ("image", "score", "is_defective", "defects", "defect_pixels", "non_finite_pixels", "heatmap", "mask")


def heat_range(model: CFlowAD) -> tuple[float, float]:
    """(lower, upper) of a model's heat scale: up to the highest score there is, with the threshold in the middle."""
    upper = float(len(model.decoders))
    threshold = model.pixel_threshold
    return (0.0 if threshold is None else min(max(0.0, 2 * threshold - upper), 0.95 * upper)), upper


class ResultWriter:
    """Writes the pictures of one image after the other, then the tables; every file atomically.

    Two images of one name get different files. Raises CFlowFastError when the folder cannot be written.
    """

    def __init__(self, folder: Path, model: CFlowAD) -> None:
        self.folder = folder
        self.lower, self.upper = heat_range(model)
        self.thresholds = {"image_threshold": model.image_threshold, "pixel_threshold": model.pixel_threshold}
        self.records: list[dict[str, Any]] = []
        self._names: set[str] = set()

    def add(self, path: Path, image: Image.Image, prediction: Prediction) -> None:
        name = self._free_name(path.stem)
        heatmap, mask = f"{name}_heatmap.png", None
        self._save(overlay(image, prediction.anomaly_map, self.upper, self.lower), heatmap)
        if prediction.mask is not None:
            mask = f"{name}_mask.png"
            self._save(mask_image(prediction.mask), mask)
        self.records.append(
            {
                "image": str(path),
                "score": _number(prediction.score),
                "is_defective": prediction.is_defective,
                "defects": [asdict(defect) | {"score": _number(defect.score)} for defect in prediction.defects],
                "non_finite_pixels": prediction.non_finite,
                "heatmap": heatmap,
                "mask": mask,
            }
        )

    def finish(self, skipped: Iterable[Path] = ()) -> None:
        """Write scores.csv and scores.json; the latter names what was skipped too."""
        facts = self.thresholds | {"images": self.records, "skipped": [str(path) for path in skipped]}
        write_text(self.folder / "scores.json", json.dumps(facts, indent=2) + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            defects = record["defects"]
            writer.writerow(record | {"defects": len(defects), "defect_pixels": sum(d["area"] for d in defects)})
        write_text(self.folder / "scores.csv", table.getvalue())

    def _free_name(self, stem: str) -> str:
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name)
        return name

    def _save(self, picture: Image.Image, name: str) -> None:
        with atomic_path(self.folder / name) as temporary:
            picture.save(temporary, format="PNG")


def _number(score: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(score) else score
