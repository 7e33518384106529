"""`cflow-fast calibrate`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from cflow_fast import fitting
from cflow_fast.cli.common import Skipped, console, loading_options, model_argument
from cflow_fast.datasets import find_images
from cflow_fast.model import CFlowAD
from cflow_fast.precision import PRECISIONS


@click.command()
@model_argument
@click.argument("good", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="  [default: MODEL itself]")
@click.option("--holdout", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.5)
@click.option("--false-alarm-rate", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05)
@click.option("--precision", type=click.Choice(PRECISIONS), default=None, help="  [default: the model's]")
@click.option("--seed", type=int, default=0)
@loading_options
def calibrate(
    model: Path,
    good: Path,
    output: Path | None,
    holdout: float,
    false_alarm_rate: float,
    precision: str | None,
    seed: int,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> None:
    """Give MODEL new maxima and thresholds from a folder of fresh GOOD images, without training.

    A share --holdout of the images sets the thresholds, the others the maxima.
    """
    loaded = CFlowAD.load(model, device)
    loaded.precision = precision or loaded.precision
    split = fitting.split_images(find_images(good), holdout, seed)
    fitting.calibrate(loaded, split, false_alarm_rate, batch_size, workers, Skipped())
    loaded.save(output or model)
    promise = f"at most {float(loaded.false_alarm_rate):.1%} of good images raise an alarm"
    text = f"wrote {output or model}: threshold {loaded.image_threshold:.4f}, {promise}"
    console.print(text, markup=False, soft_wrap=True)
