"""How well a model finds the defects of a category: the paper's metrics, and what thresholds would be best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cflow_fast.datasets import Sample, load_images, read_mask
from cflow_fast.errors import DataError
from cflow_fast.metrics import aupro, auroc, best_f1
from cflow_fast.model import CFlowAD
from cflow_fast.prediction import Prediction


@dataclass(frozen=True)
class ImageResult:
    """One test image, what the model says about it, and what is true."""

    sample: Sample
    prediction: Prediction
    ground_truth: np.ndarray  # (H, W) bool


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a category (NaN where a kind of image is missing) and its images in the order of the samples."""

    image_auroc: float
    pixel_auroc: float
    aupro: float
    image_f1: float
    image_f1_threshold: float
    pixel_f1: float
    pixel_f1_threshold: float
    false_alarms: int | None  # good images called defective at the model's threshold; None without one
    missed: int | None  # defective images called good
    good: int
    defective: int
    seconds_per_image: float  # encoding to anomaly map, reading not included
    results: list[ImageResult]

    def metrics(self) -> dict[str, float]:
        names = ("image_auroc", "pixel_auroc", "aupro", "image_f1", "image_f1_threshold", "pixel_f1")
        return {name: getattr(self, name) for name in (*names, "pixel_f1_threshold")}


def evaluate(
    model: CFlowAD,
    samples: Sequence[Sample],
    batch_size: int = 8,
    workers: int = 0,
    on_skip: Callable[[Path, str], None] = lambda path, reason: None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Predict every sample at its own size and compare with its mask.

    An image or mask that cannot be used is left out and reported by on_skip; DataError when none is left.
    """
    results: list[ImageResult] = []
    seconds = 0.0
    paths = [sample.path for sample in samples]
    for batch in load_images(paths, model.image_size, batch_size, workers, on_skip=on_skip):
        start = time.perf_counter()
        predictions = model.predict_resized(batch.images, batch.original_sizes)
        seconds += time.perf_counter() - start
        for index, size, prediction in zip(batch.indices, batch.original_sizes, predictions, strict=True):
            try:
                results.append(ImageResult(samples[index], prediction, read_mask(samples[index], size)))
            except DataError as error:
                on_skip(samples[index].path, str(error))
        on_progress(len(batch.indices))
    if not results:
        raise DataError("no test image could be used: see the reasons above")
    return _summarise(results, seconds / len(results), highest=float(len(model.decoders)))


def _summarise(results: list[ImageResult], seconds_per_image: float, highest: float) -> Evaluation:
    """What is not finite has the highest score there is: it is called defective too."""
    labels = [result.sample.is_defective for result in results]
    scores = np.array(
        [highest if r.prediction.non_finite else r.prediction.score for r in results],
        dtype=np.float32,  # as the thresholds are stored
    )
    maps = [np.nan_to_num(r.prediction.anomaly_map, nan=highest) for r in results]
    masks = [result.ground_truth for result in results]
    pixels, truth = (np.concatenate([array.ravel() for array in arrays]) for arrays in (maps, masks))
    image_f1_threshold, image_f1 = best_f1(labels, scores)
    pixel_f1_threshold, pixel_f1 = best_f1(truth, pixels)
    verdicts = [result.prediction.is_defective for result in results]
    judged = all(verdict is not None for verdict in verdicts)
    pairs = list(zip(verdicts, labels, strict=True))
    return Evaluation(
        image_auroc=auroc(labels, scores),
        pixel_auroc=auroc(truth, pixels),
        aupro=aupro(maps, masks),
        image_f1=image_f1,
        image_f1_threshold=image_f1_threshold,
        pixel_f1=pixel_f1,
        pixel_f1_threshold=pixel_f1_threshold,
        false_alarms=sum(bool(verdict) and not label for verdict, label in pairs) if judged else None,
        missed=sum(label and not verdict for verdict, label in pairs) if judged else None,
        good=labels.count(False),
        defective=labels.count(True),
        seconds_per_image=seconds_per_image,
        results=results,
    )
