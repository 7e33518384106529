"""How well CFLOW-AD, PaDiM and SPADE find a category's defects: the paper's Table 3 row, over several seeds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast.bench.baselines import SPADE, PaDiM
from cflow_fast.bench.baselines.maps import NotEnoughMemoryError
from cflow_fast.bench.results import Row
from cflow_fast.datasets import MVTecCategory, load_images, read_mask
from cflow_fast.encoders import Encoder, calibrate_batch_norm
from cflow_fast.errors import DataError
from cflow_fast.evaluation import evaluate
from cflow_fast.fitting import Fit
from cflow_fast.metrics import aupro, auroc
from cflow_fast.model import CFlowAD
from cflow_fast.precision import resolve_precision
from cflow_fast.recipes import Recipe

METHODS = ("cflow-fast", "padim", "spade")
METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
RESNET_TAPS = ("layer1", "layer2", "layer3")
"""PaDiM's and SPADE's features in a ResNet, as their papers take them."""

OnSkip = Callable[[Path, str], None]
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What all methods share, and what CFLOW-AD is trained with."""

    encoder: str
    recipe: Recipe
    image_size: int = 256
    layers: tuple[str, ...] | None = None  # CFLOW-AD's taps; None: the encoder's defaults
    baseline_layers: tuple[str, ...] | None = None  # PaDiM's and SPADE's; None: their papers', or else CFLOW-AD's
    encoder_weights: Path | None = None
    pretrained: bool = True
    permute_soft: bool = False
    coupling_blocks: int = 8
    condition: int = 128
    batch_size: int = 8
    workers: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009


@dataclass(frozen=True)
class Scores:
    """One run of one method. Metrics are NaN where the category has no good or no defective image."""

    image_auroc: float  # by the map's maximum, for every method
    pixel_auroc: float
    aupro: float
    fit_seconds: float  # from good images to a model, reading included
    seconds_per_image: float  # from an image to its map, reading not included
    model_bytes: int  # encoder up to its last tap, decoders or statistics or gallery
    neighbour_auroc: float | None = None  # SPADE's own image score: the mean squared distance of the nearest images


def measure(
    method: str,
    category: MVTecCategory,
    setting: Setting,
    seed: int,
    on_skip: OnSkip = lambda path, reason: None,
    on_progress: OnProgress = lambda text: None,
) -> Scores:
    """Fit a method to the good images and score the test images, each at its own size.

    Raises DataError for a category that cannot be used, EncoderError for an encoder that cannot be had.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, got {method!r}")
    torch.manual_seed(seed)
    if method == "cflow-fast":
        return _measure_cflow(category, setting, seed, on_skip, on_progress)
    return _measure_baseline(method, category, setting, seed, on_skip, on_progress)


def summary_row(method: str, category: str, setting: Setting, runs: Sequence[Scores], seeds: Sequence[int]) -> Row:
    """Means and deviations over the runs of a method."""
    extra: dict[str, object] = {"seeds": list(seeds), "image_score": "maximum of the map"}
    for name in (*METRICS, "neighbour_auroc", "fit_seconds"):
        values = [value for value in (getattr(run, name) for run in runs) if value is not None]
        if values:
            extra[name], extra[f"{name}_deviation"] = mean_and_deviation(values)
    per_image = statistics.fmean(run.seconds_per_image for run in runs)
    return Row(
        "accuracy",
        case_label(category, setting),
        _axes(category, setting),
        method,
        "fp32" if method != "cflow-fast" else resolve_precision("auto", setting.device),
        setting.device.type,
        note="no random choice in it: one run is all" if method == "spade" else "",
        images_per_second=1 / per_image,
        model_bytes=runs[0].model_bytes,
        extra=extra,
    )


def failed_row(method: str, category: str, setting: Setting, error: NotEnoughMemoryError) -> Row:
    return Row(
        "accuracy",
        case_label(category, setting),
        _axes(category, setting),
        method,
        "fp32",
        setting.device.type,
        status="out of memory",
        note=str(error),
    )


def case_label(category: str, setting: Setting) -> str:
    return f"{category}, {setting.encoder}, {setting.image_size} px"


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the sample's standard deviation; None for what does not exist."""
    if any(math.isnan(value) for value in values):
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def seeds_of(method: str, runs: int, seed: int) -> list[int]:
    """SPADE makes no random choice, so one run of it is all there is."""
    return [seed] if method == "spade" else [seed + run for run in range(runs)]


def fit_cflow(
    category: MVTecCategory, setting: Setting, seed: int, on_skip: OnSkip, on_progress: OnProgress
) -> CFlowAD:
    """A model trained on all good images; nothing is held out, as no threshold is asked for."""
    model = CFlowAD(
        setting.encoder,
        setting.layers,
        setting.coupling_blocks,
        setting.condition,
        setting.permute_soft,
        setting.pretrained and setting.encoder_weights is None,
        setting.encoder_weights,
        image_size=setting.image_size,
    ).to(setting.device)
    fit = Fit(
        model,
        category.train,
        setting.recipe,
        holdout=0,
        seed=seed,
        batch_size=setting.batch_size,
        workers=setting.workers,
        on_skip=on_skip,
    )
    if not setting.pretrained and setting.encoder_weights is None:
        calibrate_batch_norm(model.encoder, (images.to(setting.device) for images in fit.images()))
    fit.run(lambda progress: on_progress(f"training {progress.done:.0%}, loss {progress.loss:.3f}"))
    return model


def _measure_cflow(
    category: MVTecCategory, setting: Setting, seed: int, on_skip: OnSkip, on_progress: OnProgress
) -> Scores:
    start = time.perf_counter()
    model = fit_cflow(category, setting, seed, on_skip, on_progress)
    fit_seconds = time.perf_counter() - start
    found = evaluate(
        model,
        category.test,
        setting.batch_size,
        setting.workers,
        on_skip,
        _counter(len(category.test), on_progress),
    )
    stored = [*model.encoder.parameters(), *model.encoder.buffers(), *model.decoders.state_dict().values()]
    return Scores(
        found.image_auroc,
        found.pixel_auroc,
        found.aupro,
        fit_seconds,
        found.seconds_per_image,
        sum(tensor.numel() * tensor.element_size() for tensor in stored),
    )


def _measure_baseline(
    method: str, category: MVTecCategory, setting: Setting, seed: int, on_skip: OnSkip, on_progress: OnProgress
) -> Scores:
    start = time.perf_counter()
    encoder = baseline_encoder(method, setting)
    if not setting.pretrained and setting.encoder_weights is None:
        calibrate_batch_norm(encoder, _good_images(category, setting, on_skip))
    fitted: PaDiM | SPADE = PaDiM(encoder, seed=seed) if method == "padim" else SPADE(encoder)
    on_progress("fitting")
    fitted.fit(_good_images(category, setting, on_skip))
    fit_seconds = time.perf_counter() - start
    return _score(fitted, category, setting, fit_seconds, on_skip, on_progress)


def baseline_encoder(method: str, setting: Setting) -> Encoder:
    """The setting's encoder with a method's taps, in channels_last memory."""
    pretrained = setting.pretrained and setting.encoder_weights is None
    layers = baseline_layers(method, setting)
    encoder = Encoder(setting.encoder, layers, pretrained, setting.encoder_weights).to(setting.device)
    return encoder.to(memory_format=torch.channels_last)


def baseline_layers(method: str, setting: Setting) -> tuple[str, ...] | None:
    """The taps that the method's paper takes: in a ResNet layer1 to layer3, and for SPADE layer4 to find images.

    A weights file that ends at layer3 leaves SPADE layer3 to find them by. None: the encoder's defaults.
    """
    layers = setting.baseline_layers
    if layers is None and "resnet" in setting.encoder:
        layers = RESNET_TAPS if method == "padim" or setting.encoder_weights else (*RESNET_TAPS, "layer4")
    return layers or setting.layers


def _good_images(category: MVTecCategory, setting: Setting, on_skip: OnSkip) -> Iterator[Tensor]:
    size = (setting.image_size, setting.image_size)
    for batch in load_images(category.train, size, setting.batch_size, setting.workers, on_skip=on_skip):
        yield batch.images.to(setting.device)


def _score(
    fitted: PaDiM | SPADE,
    category: MVTecCategory,
    setting: Setting,
    fit_seconds: float,
    on_skip: OnSkip,
    on_progress: OnProgress,
) -> Scores:
    """Maps at every image's own size against its mask, as `evaluate` does for a CFlowAD."""
    maps: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    labels: list[bool] = []
    neighbour_scores: list[float] = []
    seconds, count = 0.0, _counter(len(category.test), on_progress)
    size = (setting.image_size, setting.image_size)
    paths = [sample.path for sample in category.test]
    for batch in load_images(paths, size, setting.batch_size, setting.workers, on_skip=on_skip):
        start = time.perf_counter()
        scores: Tensor | None = None
        if isinstance(fitted, SPADE):
            found, scores = fitted.predict(batch.images)
        else:
            found = fitted.anomaly_map(batch.images)
        at_own_size = [
            F.interpolate(one[None, None], size=own, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
            for one, own in zip(found, batch.original_sizes, strict=True)
        ]
        seconds += time.perf_counter() - start
        for i, (index, own) in enumerate(zip(batch.indices, batch.original_sizes, strict=True)):
            sample = category.test[index]
            try:
                masks.append(read_mask(sample, own))
            except DataError as error:
                on_skip(sample.path, str(error))
                continue
            maps.append(at_own_size[i])
            labels.append(sample.is_defective)
            if scores is not None:
                neighbour_scores.append(float(scores[i]))
        count(len(batch.indices))
    if not maps:
        raise DataError("no test image could be used: see the reasons above")
    pixels, truth = (np.concatenate([array.ravel() for array in arrays]) for arrays in (maps, masks))
    return Scores(
        auroc(labels, [one.max() for one in maps]),
        auroc(truth, pixels),
        aupro(maps, masks),
        fit_seconds,
        seconds / len(maps),
        fitted.model_bytes,
        auroc(labels, neighbour_scores) if neighbour_scores else None,
    )


def _axes(category: str, setting: Setting) -> dict[str, str | int | float | bool]:
    return {"category": category, "encoder": setting.encoder, "size": setting.image_size}


def _counter(total: int, on_progress: OnProgress) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(f"testing {done} of {total}")

    return advance
