"""An evaluation in the terms of the result page and of the figure."""

from __future__ import annotations

import numpy as np

from cflow_fast.evaluation import Evaluation, ImageResult
from cflow_fast.images import read_image
from cflow_fast.model import CFlowAD
from cflow_fast.output import heat_range
from cflow_fast.page import Case, CategoryResult
from cflow_fast.render import Panel


def category_result(name: str, evaluation: Evaluation, model: CFlowAD) -> CategoryResult:
    """All images of a category; judged by the F1-optimal thresholds where the model has none of its own."""
    lower, upper = heat_range(model)
    threshold = model.image_threshold
    return CategoryResult(
        name=name,
        metrics={
            "image AUROC": evaluation.image_auroc,
            "pixel AUROC": evaluation.pixel_auroc,
            "AUPRO": evaluation.aupro,
        },
        images_per_second=1 / evaluation.seconds_per_image,
        cases=[_case(result, evaluation) for result in evaluation.results],
        threshold=evaluation.image_f1_threshold if threshold is None else threshold,
        lower=lower,
        upper=upper,
    )


def panel(caption: str, result: ImageResult, evaluation: Evaluation, model: CFlowAD) -> Panel:
    """One image as a row of the figure."""
    case, (lower, upper) = _case(result, evaluation), heat_range(model)
    return Panel(caption, case.image, case.ground_truth, case.anomaly_map, case.mask, upper, lower)


def _case(result: ImageResult, evaluation: Evaluation) -> Case:
    prediction, sample = result.prediction, result.sample
    mask = prediction.mask
    if mask is None:
        mask = np.nan_to_num(prediction.anomaly_map, nan=np.inf) > evaluation.pixel_f1_threshold
    return Case(
        title=f"{sample.defect}/{sample.path.stem}",
        image=read_image(sample.path),
        ground_truth=result.ground_truth if sample.is_defective else None,
        anomaly_map=prediction.anomaly_map,
        mask=mask,
        score=prediction.score,
        is_defective=sample.is_defective,
    )
