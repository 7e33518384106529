"""`cflow-fast train`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import torch

from cflow_fast.cli.common import Skipped, console, loading_options, progress_bar, stop_on_interrupt
from cflow_fast.datasets import MVTecCategory, find_images
from cflow_fast.decoder import ACTIVATIONS
from cflow_fast.encoders import calibrate_batch_norm
from cflow_fast.errors import CFlowFastError
from cflow_fast.evaluation import evaluate
from cflow_fast.files import check_writable
from cflow_fast.fitting import Fit
from cflow_fast.model import CFlowAD
from cflow_fast.precision import ENCODER_PRECISIONS, PRECISIONS
from cflow_fast.recipes import LOSSES, PRESETS, SOFT_PRESETS, Recipe

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells know it: `train && test` stops."""

RECIPE_OPTIONS: dict[str, tuple[str, Any, str]] = {
    "learning_rate": ("--learning-rate", float, "Adam's, at its highest."),
    "epochs": ("--epochs", int, "Epochs; the learning rate decays over them."),
    "passes": ("--passes", int, "Passes through the images in each epoch."),
    "images": ("--images", int, "Images whose feature vectors are shuffled together; all when the preset says so."),
    "vectors": ("--vectors", int, "Feature vectors a step."),
    "steps": ("--steps", int, "Steps for each group of images and scale."),
    "drop_remainder": ("--drop-remainder/--keep-remainder", bool, "Leave out steps and groups that are not full."),
    "warmup_epochs": ("--warmup-epochs", float, "Epochs over which the learning rate rises."),
    "warmup_from": ("--warmup-from", float, "Share of the learning rate that it rises from."),
    "decay_to": ("--decay-to", float, "Share of the learning rate that it decays to."),
    "decay_every_step": ("--decay-every-step/--decay-every-epoch", bool, "When the learning rate decays."),
    "rotation": ("--rotation", float, "Random rotation of the images, in degrees to either side."),
    "loss": ("--loss", click.Choice(LOSSES), "-log p / D, or -logsigmoid of it."),
}


def recipe_options(command: Callable[..., object]) -> Callable[..., object]:
    """One option for every number of a recipe; without it the preset's number stands."""
    for name, (flags, kind, text) in reversed(RECIPE_OPTIONS.items()):
        kind = None if kind is bool else kind
        command = click.option(flags, name, type=kind, default=None, help=f"{text}  [default: the preset's]")(command)
    return command


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="  [default: <DATA>.safetensors]")
@click.option("--encoder", default="wide_resnet50_2", help="A timm model.")
@click.option("--layers", default=None, help="Its modules to tap, comma separated.  [default: strides 8, 16, 32]")
@click.option("--encoder-weights", type=click.Path(path_type=Path), help="A safetensors or pth file in timm's names.")
@click.option("--pretrained/--untrained", default=True, help="ImageNet weights, or random ones.")
@click.option("--reflect-padding", is_flag=True, help="Pad convolutions by reflection, as the published code.")
@click.option("--image-size", type=click.IntRange(1), default=256, help="Images are resized to this square.")
@click.option("--coupling-blocks", type=click.IntRange(1), default=8)
@click.option("--condition", type=click.IntRange(0), default=128, help="Channels of the positional encoding; 0: none.")
@click.option("--permute-soft/--permute-hard", default=None, help="  [default: soft for the published presets]")
@click.option("--activation", type=click.Choice(tuple(ACTIVATIONS)), default="relu", help="Of the subnets.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="Of the decoders, in predictions.")
@click.option("--encoder-precision", type=click.Choice(ENCODER_PRECISIONS), default="auto")
@click.option("--preset", type=click.Choice(tuple(PRESETS)), default="fast", help="How to train.")
@recipe_options
@click.option("--holdout", type=click.FloatRange(0, 1, max_open=True), default=0.2, help="Good images for thresholds.")
@click.option(
    "--false-alarm-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    help="Share of good images that may raise an alarm.",
)
@click.option(
    "--threshold",
    type=click.Choice(["conformal", "f1"]),
    default="conformal",
    help="From held-out good images, or F1-optimal on the category's labelled test images.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted, with the same options.")
@click.option("--seed", type=int, default=0)
@loading_options
def train(
    data: Path,
    output: Path | None,
    encoder: str,
    layers: str | None,
    encoder_weights: Path | None,
    pretrained: bool,
    reflect_padding: bool,
    image_size: int,
    coupling_blocks: int,
    condition: int,
    permute_soft: bool | None,
    activation: str,
    precision: str,
    encoder_precision: str,
    preset: str,
    holdout: float,
    false_alarm_rate: float,
    threshold: str,
    resume: bool,
    seed: int,
    device: torch.device,
    batch_size: int,
    workers: int,
    **overrides: Any,
) -> None:
    """Train on DATA: a category in MVTec AD's layout, or a folder of good images.

    Ctrl-C stops after the current step and leaves a usable model; --resume goes on with it.
    """
    category = MVTecCategory(data) if MVTecCategory.is_category(data) else None
    if threshold == "f1" and not (category and any(sample.is_defective for sample in category.test)):
        raise click.UsageError("--threshold f1 needs labelled defects: DATA must be a category with some in test/")
    paths = category.train if category else find_images(data)
    output = output or Path(f"{data.resolve().name}.safetensors")
    state = output.with_suffix(".resume.safetensors")
    skipped = Skipped()
    torch.manual_seed(seed)
    try:
        recipe = _recipe(preset, overrides)
        model = (
            _interrupted(output, state)
            if resume
            else CFlowAD(
                encoder,
                None if layers is None else tuple(layer.strip() for layer in layers.split(",")),
                coupling_blocks=coupling_blocks,
                condition=condition,
                permute_soft=preset in SOFT_PRESETS if permute_soft is None else permute_soft,
                pretrained=pretrained,
                encoder_weights=encoder_weights,
                reflect_padding=reflect_padding,
                activation=activation,
                image_size=image_size,
                precision=precision,
                encoder_precision=encoder_precision,
            )
        )
    except CFlowFastError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    model.to(device)
    check_writable(output)
    fit = Fit(model, paths, recipe, holdout, false_alarm_rate, seed, batch_size, workers, skipped)
    if resume:
        fit.restore(state)
    elif not pretrained and encoder_weights is None:
        calibrate_batch_norm(model.encoder, (images.to(device) for images in fit.images()))
    finished = _run(fit, f"training on {data.name}")
    if threshold == "f1" and category and finished:
        found = evaluate(model, category.test, batch_size, workers, skipped)
        model.set_thresholds(found.image_f1_threshold, found.pixel_f1_threshold)
    model.save(output)
    if finished:
        state.unlink(missing_ok=True)
    else:
        fit.save_state(state)
    _report(model, fit, output, finished)
    sys.exit(0 if finished else INTERRUPTED)


def _recipe(preset: str, overrides: dict[str, Any]) -> Recipe:
    return replace(PRESETS[preset], **{name: value for name, value in overrides.items() if value is not None})


def _interrupted(output: Path, state: Path) -> CFlowAD:
    if not state.is_file():
        raise CFlowFastError(f"there is no interrupted run to resume: {state} does not exist")
    return CFlowAD.load(output)


def _run(fit: Fit, description: str) -> bool:
    with progress_bar(description, 1.0) as update, stop_on_interrupt() as should_stop:
        return fit.run(
            lambda p: update(p.done, f"loss {p.loss:7.3f}  learning rate {p.learning_rate:.1e}"), should_stop
        )


def _report(model: CFlowAD, fit: Fit, output: Path, finished: bool) -> None:
    if not finished:
        console.print(
            f"interrupted: {output} can be used as it is; --resume with the same options goes on",
            markup=False,
            soft_wrap=True,
        )
    counts = f"{len(fit.split.fit)} images fitted, {len(fit.split.held_out)} held out"
    console.print(f"wrote {output} ({counts}; {model.encoder.source})", markup=False, soft_wrap=True)
    if model.image_threshold is None:
        console.print("no thresholds: nothing was held out; `cflow-fast calibrate` finds some")
        return
    rate = float(model.false_alarm_rate)
    promise = "F1-optimal on the test images" if rate != rate else f"at most {rate:.1%} of good images raise an alarm"
    console.print(f"threshold {model.image_threshold:.4f}: {promise}")


assert set(RECIPE_OPTIONS) == {field.name for field in fields(Recipe)}
