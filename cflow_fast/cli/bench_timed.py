"""`cflow-fast bench decoder`, `map`, `end-to-end` and `training`: ours and its peers, taking turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from cflow_fast.bench import decoder as decoders
from cflow_fast.bench import end_to_end as models
from cflow_fast.bench import maps as anomaly_maps
from cflow_fast.bench import training as steps
from cflow_fast.bench.cases import Case, DecoderCase, grid, scales_of
from cflow_fast.bench.contenders import Contender
from cflow_fast.bench.maps import MapCase
from cflow_fast.bench.session import Session, line_up
from cflow_fast.cli.bench_options import (
    against_option,
    batch_option,
    check_sizes,
    effort_of,
    encoder_option,
    finish,
    open_files,
    permutations_option,
    precision_option,
    precisions_on,
    run_cases,
    run_options,
    size_option,
)
from cflow_fast.cli.bench_tables import command_line

HEADLINE = (
    "Ctrl-C prints what has been measured. A peer that is not installed is a line that says so; exits with 1 when "
    "nothing could be measured."
)


@click.command(epilog=HEADLINE)
@encoder_option
@size_option(256)
@batch_option(1)
@permutations_option("soft")
@precision_option
@against_option(decoders.CONTENDERS, "freia")
@run_options
def decoder(encoders: Sequence[str], sizes: Sequence[int], precisions: Sequence[str], **options: Any) -> None:
    """The decoders alone, on features that are there already."""
    check_sizes(encoders, sizes)
    _grid(DecoderCase, "decoders", decoders.CONTENDERS, encoders, sizes, precisions, **options)


@click.command("end-to-end", epilog=HEADLINE)
@encoder_option
@size_option(256)
@batch_option(1)
@permutations_option("soft")
@precision_option
@against_option(models.CONTENDERS, "freia")
@run_options
def end_to_end(encoders: Sequence[str], sizes: Sequence[int], precisions: Sequence[str], **options: Any) -> None:
    """The whole model, from images in memory to anomaly maps; encoders have random weights."""
    check_sizes(encoders, sizes)
    _grid(models.ModelCase, "end to end", models.CONTENDERS, encoders, sizes, precisions, **options)


@click.command(epilog=HEADLINE)
@encoder_option
@size_option(256)
@batch_option(4)
@permutations_option("soft")
@against_option(steps.CONTENDERS, "freia", "cflow-ad-loop")
@run_options
def training(encoders: Sequence[str], sizes: Sequence[int], **options: Any) -> None:
    """A batch of images' vectors once through training, features made beforehand, in fp32."""
    check_sizes(encoders, sizes)
    _grid(steps.TrainingCase, "training", steps.CONTENDERS, encoders, sizes, ("fp32",), **options)


@click.command("map", epilog=HEADLINE)
@encoder_option
@size_option(256)
@batch_option(1)
@against_option(anomaly_maps.CONTENDERS, "eager")
@run_options
def maps(
    encoders: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    seed: int,
    **options: Any,
) -> None:
    """From each scale's likelihoods to the anomaly map, in fp32."""
    check_sizes(encoders, sizes)
    cases = [
        MapCase(encoder, scales_of(encoder), size, batch, seed, device)
        for encoder in encoders
        for size in sizes
        for batch in batches
    ]
    _run(cases, "maps", anomaly_maps.CONTENDERS, ("fp32",), device, seed, **options)


def _grid(
    kind: type[DecoderCase],
    description: str,
    contenders: Mapping[str, Contender],
    encoders: Sequence[str],
    sizes: Sequence[int],
    precisions: Sequence[str],
    batches: Sequence[int],
    permutations: Sequence[str],
    device: torch.device,
    seed: int,
    **options: Any,
) -> None:
    cases = grid(kind, encoders, permutations, sizes, batches, device, seed)
    _run(cases, description, contenders, precisions_on(device, precisions), device, seed, **options)


def _run(
    cases: Sequence[Case],
    description: str,
    contenders: Mapping[str, Contender],
    precisions: Sequence[str],
    device: torch.device,
    seed: int,
    against: Sequence[str],
    seconds: float,
    rounds: int | None,
    json_path: Path | None,
    old_path: Path | None,
) -> None:
    old = open_files(json_path, old_path, cases[0].bench)
    entrants, baseline = line_up(contenders, against, precisions)
    session = Session(command_line(), device, seed, effort_of(seconds, rounds))
    interrupted = run_cases(session, cases, entrants, baseline, description)
    finish(session, interrupted, json_path, old)
