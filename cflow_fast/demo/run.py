"""The demonstration: three small inspection tasks made from photographs of materials, from images to a result page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cflow_fast import fitting
from cflow_fast.datasets import MVTecCategory, find_images
from cflow_fast.demo.textures import make_textures
from cflow_fast.encoders import calibrate_batch_norm
from cflow_fast.errors import EncoderError
from cflow_fast.evaluation import Evaluation, evaluate
from cflow_fast.fitting import Fit, Split
from cflow_fast.images import read_image
from cflow_fast.model import CFlowAD
from cflow_fast.output import ResultWriter
from cflow_fast.page import write_page
from cflow_fast.recipes import PRESETS
from cflow_fast.render import Panel, figure
from cflow_fast.report import category_result, panel

ENCODER = "tf_efficientnet_lite0"
STEPS = 150
VALIDATION = 40  # fresh good images that the thresholds come from
FALSE_ALARM_RATE = 0.05
FIGURE_DEFECTS = ("scratch", "stain", "hole")


@dataclass(frozen=True)
class DemoResult:
    """One category of the demonstration."""

    name: str
    evaluation: Evaluation
    model: CFlowAD
    seconds: float  # for training, calibration and test


def run_demo(
    output: str | os.PathLike[str],
    seed: int = 0,
    steps: int = STEPS,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
    on_progress: Callable[[str, float], None] = lambda category, done: None,
) -> list[DemoResult]:
    """Make the three categories, train and test a model on each, and write everything below `output`.

    Written are data/<category> in MVTec AD's layout, <category>/ with heatmaps, masks and scores,
    <category>.safetensors, index.html with every test image beside its result, and figure.png. `say` gets what a person
    should know.
    """
    folder = Path(output)
    results = []
    for data in make_textures(folder / "data", seed, validation=VALIDATION):
        result = _run_category(data, folder, seed, steps, device, say, on_progress)
        results.append(result)
        say(_summary(result))
    _write_summary(folder, results)
    return results


def _summary(result: DemoResult) -> str:
    e = result.evaluation
    return (
        f"{result.name:<7} image AUROC {e.image_auroc:.3f}, pixel AUROC {e.pixel_auroc:.3f}, AUPRO {e.aupro:.3f}; "
        f"{e.missed} of {e.defective} defective images missed, {e.false_alarms} false alarms on {e.good} good ones; "
        f"{1 / e.seconds_per_image:.0f} images/s"
    )


def _run_category(
    data: Path,
    folder: Path,
    seed: int,
    steps: int,
    device: torch.device | str,
    say: Callable[[str], None],
    on_progress: Callable[[str, float], None],
) -> DemoResult:
    start = time.perf_counter()
    category = MVTecCategory(data)
    torch.manual_seed(seed)
    model, is_trained = _model(say)
    model.to(device)
    fit = Fit(model, category.train, replace(PRESETS["fast"], steps=steps), holdout=0, seed=seed)
    if not is_trained:
        calibrate_batch_norm(model.encoder, fit.images())
    fit.run(lambda progress: on_progress(category.name, progress.done))
    fresh = Split(category.train, find_images(data / "validation" / "good"))
    fitting.calibrate(model, fresh, FALSE_ALARM_RATE)
    model.save(folder / f"{category.name}.safetensors")
    evaluation = evaluate(model, category.test)
    writer = ResultWriter(folder / category.name, model)
    for result in evaluation.results:
        writer.add(result.sample.path, read_image(result.sample.path), result.prediction)
    writer.finish()
    return DemoResult(category.name, evaluation, model, time.perf_counter() - start)


def _model(say: Callable[[str], None]) -> tuple[CFlowAD, bool]:
    try:
        return CFlowAD(ENCODER), True
    except EncoderError as error:
        say(f"THE ENCODER IS UNTRAINED, expect poor results: {error}")
        return CFlowAD(ENCODER, pretrained=False), False


def _write_summary(folder: Path, results: list[DemoResult]) -> None:
    pages = [category_result(result.name, result.evaluation, result.model) for result in results]
    notes = [
        "The photographs of brick, gravel and grass come with scikit-image (CC0); the defects were drawn into them.",
        "Training images and test images are cut from different parts of a photograph.",
        f"The threshold comes from {VALIDATION} more good images, cut from the part that is tested on.",
    ]
    write_page(folder / "index.html", "Defects found after seeing good images only", pages, notes)
    figure(
        [_figure_row(result, kind) for result, kind in zip(results, FIGURE_DEFECTS, strict=False)],
        folder / "figure.png",
    )


def _figure_row(result: DemoResult, kind: str) -> Panel:
    found = [r for r in result.evaluation.results if r.sample.defect == kind]
    typical = sorted(found, key=lambda result: result.prediction.score)[len(found) // 2]
    return panel(f"{result.name}, {kind}", typical, result.evaluation, result.model)
