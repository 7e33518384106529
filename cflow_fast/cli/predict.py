"""`cflow-fast predict`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import torch

from cflow_fast.cli.common import Skipped, console, image_paths, loading_options, model_argument
from cflow_fast.datasets import load_images
from cflow_fast.images import read_image
from cflow_fast.model import CFlowAD
from cflow_fast.output import ResultWriter
from cflow_fast.prediction import Prediction


@click.command()
@model_argument
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("predictions"))
@loading_options
def predict(
    model: Path, images: tuple[Path, ...], output: Path, device: torch.device, batch_size: int, workers: int
) -> None:
    """Inspect IMAGES, files or folders, with MODEL.

    Writes a heatmap and a mask for each, and scores.csv and scores.json. An image that cannot be read is left out, the
    others are not lost; the exit code is 1 then.
    """
    loaded = CFlowAD.load(model, device)
    paths = image_paths(images)
    skipped = Skipped()
    writer = ResultWriter(output, loaded)
    seconds = 0.0
    for batch in load_images(paths, loaded.image_size, batch_size, workers, on_skip=skipped):
        start = time.perf_counter()
        predictions = loaded.predict_resized(batch.images, batch.original_sizes)
        seconds += time.perf_counter() - start
        for index, prediction in zip(batch.indices, predictions, strict=True):
            writer.add(paths[index], read_image(paths[index]), prediction)
            console.print(_line(paths[index], prediction), markup=False, soft_wrap=True)
    writer.finish(skipped.paths)
    done = len(writer.records)
    speed = f", {done / seconds:.1f} images/s without reading and writing" if done else ""
    console.print(f"wrote {output}: {done} of {len(paths)} images{speed}", markup=False, soft_wrap=True)
    sys.exit(1 if skipped.paths else 0)


def _line(path: Path, prediction: Prediction) -> str:
    if prediction.is_defective is None:
        return f"{path}  {prediction.score:.4f}"
    if not prediction.is_defective:
        return f"{path}  {prediction.score:.4f}  good"
    if not prediction.defects:
        return f"{path}  {prediction.score:.4f}  DEFECTIVE"
    largest = prediction.defects[0]
    size = f"{largest.right - largest.left} x {largest.bottom - largest.top} px"
    where = f"largest {size} at x {largest.left}, y {largest.top}"
    return f"{path}  {prediction.score:.4f}  DEFECTIVE: {len(prediction.defects)} region(s), {where}"
