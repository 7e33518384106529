"""`cflow-fast bench stages`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch

from cflow_fast.bench.contenders import device_precisions
from cflow_fast.bench.session import Session
from cflow_fast.bench.stages import StagesInterrupted, made_images, made_model, stage_rows, write_profile
from cflow_fast.cli.bench_options import check_sizes, effort_of, finish, open_files, run_options
from cflow_fast.cli.bench_tables import command_line
from cflow_fast.cli.common import console, progress_bar
from cflow_fast.datasets import find_images
from cflow_fast.files import check_writable
from cflow_fast.model import CFlowAD
from cflow_fast.precision import PRECISIONS

MADE_SIZE = (700, 700)
"""Height and width of the images that are made when none are given."""


@click.command()
@click.argument("images", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option("--model", "model_path", type=click.Path(path_type=Path, dir_okay=False), help="A trained model.")
@click.option("--encoder", default="wide_resnet50_2", help="Of a model with random weights, without --model.")
@click.option("--size", type=click.IntRange(1), default=256, help="Image size of that model.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="Of that model's decoders.")
@click.option("--batch", type=click.IntRange(1), default=8, help="Images encoded at once.")
@click.option("--count", type=click.IntRange(1), default=16, help="Images that are made, without IMAGES.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a PyTorch profiler trace of one more pass there, for ui.perfetto.dev.",
)
@run_options
def stages(
    images: Path | None,
    model_path: Path | None,
    encoder: str,
    size: int,
    precision: str,
    batch: int,
    count: int,
    profile: Path | None,
    device: torch.device,
    seed: int,
    seconds: float,
    rounds: int | None,
    json_path: Path | None,
    old_path: Path | None,
) -> None:
    """Where the time of `predict` on IMAGES, a folder, goes: read, decode, resize, copy, encode, decoders, map, write.

    Without IMAGES some are made, without --model one with random weights.
    """
    if model_path is None:
        check_sizes([encoder], [size])
        _check_precision(precision, device)
    old = open_files(json_path, old_path, "stages")
    if profile:
        check_writable(profile)
    paths = find_images(images) if images else []
    torch.manual_seed(seed)
    model = CFlowAD.load(model_path, device) if model_path else made_model(encoder, size, precision, device)
    session = Session(command_line(), device, seed, effort_of(seconds, rounds))
    interrupted = False
    with tempfile.TemporaryDirectory() as folder:
        paths = paths or made_images(Path(folder), count, MADE_SIZE, seed)
        try:
            with progress_bar("stages", 1.0) as update:
                session.rows += stage_rows(
                    model, paths, batch, session.effort, lambda share, spread: update(share, f"within ±{spread:.1%}")
                )
            if profile:
                write_profile(model, paths, batch, profile)
                console.print(f"wrote {profile}", markup=False, soft_wrap=True)
        except StagesInterrupted as interruption:
            session.rows += interruption.rows
            interrupted = True
        except KeyboardInterrupt:
            interrupted = True
    finish(session, interrupted, json_path, old)


def _check_precision(precision: str, device: torch.device) -> None:
    """Raise UsageError for one that the decoders would be timed without: they fall back to fp32."""
    known = ("auto", "fp64", *device_precisions(device))
    if precision not in known:
        raise click.UsageError(
            f"--precision: this {device.type} does not multiply {precision}; there are {', '.join(known)}"
        )
