"""`bench stages`: where the time of `predict` on a folder goes, stage by stage."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cflow_fast.anomaly import anomaly_map
from cflow_fast.bench.contenders import OURS
from cflow_fast.bench.measurement import Effort, Track, clock, summarize, take_turns
from cflow_fast.bench.results import Row
from cflow_fast.datasets import load_images
from cflow_fast.errors import DataError
from cflow_fast.files import atomic_path
from cflow_fast.images import as_rgb, read_image, resize, to_tensor
from cflow_fast.model import CFlowAD
from cflow_fast.output import ResultWriter
from cflow_fast.prediction import make_prediction

TOTAL = "total"


@dataclass
class Stopwatch:
    """Seconds spent in named stages, waiting for the device at the end of each."""

    device: torch.device
    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(name):
                yield
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start


@torch.no_grad()
def predict_in_stages(
    model: CFlowAD, paths: Sequence[Path], output: Path, batch_size: int, watch: Stopwatch
) -> ResultWriter:
    """What `cflow-fast predict` does, with the same results in `output`, each part under the stopwatch."""
    writer = ResultWriter(output, model)
    maxima = model.log_prob_max.tolist()
    folded = model.folded()
    for start in range(0, len(paths), batch_size):
        some = paths[start : start + batch_size]
        resized, sizes = [], []
        for path in some:
            with watch.stage("read"):
                content = path.read_bytes()
            with watch.stage("decode"):
                image = to_tensor(as_rgb(Image.open(io.BytesIO(content)), str(path)))
            with watch.stage("resize"):
                resized.append(resize(image[None], model.image_size))
            sizes.append((image.shape[1], image.shape[2]))
        with watch.stage("copy"):
            images = torch.cat(resized).to(model.device)
        with watch.stage("encode"):
            features = model.features(images)
        log_probs = []
        for scale, (decoder, maps) in enumerate(zip(folded, features, strict=True), 1):
            with watch.stage(f"decoder {scale} (D = {decoder.features})"):
                log_probs.append(decoder.log_prob(maps) / decoder.features)
        for index, (path, size) in enumerate(zip(some, sizes, strict=True)):
            with watch.stage("map"):
                own = [log_prob[index : index + 1] for log_prob in log_probs]
                values = anomaly_map(own, size, maxima)[0].float().cpu().numpy()
                prediction = make_prediction(values, model.image_threshold, model.pixel_threshold)
            with watch.stage("write"):  # the picture is read once more, to draw the heatmap over it
                writer.add(path, read_image(path), prediction)
    with watch.stage("write"):
        writer.finish()
    return writer


@torch.no_grad()
def predict_at_once(model: CFlowAD, paths: Sequence[Path], output: Path, batch_size: int) -> None:
    """The same as the command runs it: nothing is waited for between stages, on a card the model is one CUDA graph."""
    writer = ResultWriter(output, model)
    for batch in load_images(paths, model.image_size, batch_size, on_skip=_refuse):
        predictions = model.predict_resized(batch.images, batch.original_sizes)
        for index, prediction in zip(batch.indices, predictions, strict=True):
            writer.add(paths[index], read_image(paths[index]), prediction)
    writer.finish()


def _refuse(path: Path, reason: str) -> None:
    raise DataError(reason)


def stage_rows(
    model: CFlowAD,
    paths: Sequence[Path],
    batch_size: int,
    effort: Effort,
    on_round: Callable[[float, float], None] = lambda share, spread: None,
) -> list[Row]:
    """A row for each stage and one for the whole, in seconds of a pass through all images.

    A stage's share is that of each pass's own time, averaged over the passes, so that shares add up. Passes that are
    not cut into stages are timed in turn with them; the whole's row has their time too, as
    `uncut_milliseconds_per_image`.
    """
    passes: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            watch = Stopwatch(model.device)
            predict_in_stages(model, paths, Path(folder), batch_size, watch)
            passes.append(watch.spent)

        track = Track(run)
        uncut = Track(lambda: predict_at_once(model, paths, Path(folder), batch_size))
        uncut.run()
        run()
        passes.clear()
        interrupted: KeyboardInterrupt | None = None
        try:
            take_turns([track, uncut], clock(model.device), effort, on_round=on_round)
        except KeyboardInterrupt as interruption:
            interrupted = interruption
    for each in (track, uncut):
        if each.error is not None:
            raise each.error
    rows = _rows(model, len(paths), batch_size, passes[: len(track.seconds)], track.seconds)
    if rows:
        milliseconds = 1e3 * summarize(uncut.seconds).median / len(paths)
        rows[-1] = replace(rows[-1], extra=rows[-1].extra | {"uncut_milliseconds_per_image": milliseconds})
    if interrupted is not None:
        raise StagesInterrupted(rows) from interrupted
    return rows


class StagesInterrupted(KeyboardInterrupt):
    """Carries the rows of the passes that were finished."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


def _rows(
    model: CFlowAD, count: int, batch_size: int, passes: Sequence[dict[str, float]], totals: Sequence[float]
) -> list[Row]:
    if not totals:
        return []
    axes: dict[str, str | int | float | bool] = {
        "encoder": model.encoder.name,
        "size": model.image_size[0],
        "batch": batch_size,
    }
    label = f"{model.encoder.name}, {count} images to {model.image_size[0]} px, batch {batch_size}"
    total = summarize(totals).median
    arithmetic = model.folded()[0].arithmetic
    rows = []
    for name in (*passes[0], TOTAL):
        seconds = list(totals) if name == TOTAL else [spent[name] for spent in passes]
        share = sum(part / whole for part, whole in zip(seconds, totals, strict=True)) / len(totals)
        rows.append(
            Row(
                bench="stages",
                case=f"{label}: {name}",
                axes=axes | {"stage": name},
                contender=OURS,
                precision=arithmetic.precision,
                device=model.device.type,
                note=arithmetic.note,
                seconds=summarize(seconds),
                images_per_second=count / total if name == TOTAL else None,
                extra={"share": share, "milliseconds_per_image": 1e3 * share * total / count},
            )
        )
    return rows


QUIET = "99"
"""Above every level at which PyTorch's profiler logs to the terminal, from 0 on."""


def write_profile(model: CFlowAD, paths: Sequence[Path], batch_size: int, path: Path) -> None:
    """Write a trace of one pass in Chrome's format, for ui.perfetto.dev or chrome://tracing; stages are named in it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)  # read when the profiler starts for the first time
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        predict_in_stages(model, paths, Path(folder), batch_size, Stopwatch(model.device))
        with torch.profiler.profile(activities=activities) as profile:
            predict_in_stages(model, paths, Path(folder), batch_size, Stopwatch(model.device))
    with atomic_path(path) as temporary:
        profile.export_chrome_trace(str(temporary))


def made_images(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> list[Path]:
    """Write woven textures (H, W) as PNG files: pictures that compress about as photographs of materials do."""
    random = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    paths = []
    for number in range(count):
        weave = 128 + 50 * np.sin(rows / random.uniform(3, 6)) * np.sin(columns / random.uniform(3, 6))
        pixels = np.clip(weave[..., None] + random.normal(0, 4, (*size, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number:03}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def made_model(encoder: str, size: int, precision: str, device: torch.device, **options: Any) -> CFlowAD:
    """A model with random weights that can predict: its maxima and thresholds are made up."""
    model = CFlowAD(encoder, pretrained=False, image_size=size, precision=precision, **options).to(device).eval()
    model.log_prob_max.zero_()
    scales = len(model.decoders)
    model.set_thresholds(scales, scales)
    return model
