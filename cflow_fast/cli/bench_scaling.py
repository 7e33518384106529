"""`cflow-fast bench scaling`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from cflow_fast.bench.cases import scales_of
from cflow_fast.bench.decoder import CONTENDERS
from cflow_fast.bench.scaling import Spans, exponent_rows, scaling_cases
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


@click.command()
@encoder_option
@size_option(*Spans.sizes)
@batch_option(*Spans.batches)
@permutations_option("hard")
@precision_option
@against_option(CONTENDERS)
@run_options
def scaling(
    encoders: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    permutations: Sequence[str],
    precisions: Sequence[str],
    against: Sequence[str],
    device: torch.device,
    seed: int,
    seconds: float,
    rounds: int | None,
    json_path: Path | None,
    old_path: Path | None,
) -> None:
    """How time grows with rows, D, coupling blocks, image size and batch, with a fitted exponent for each.

    An exponent above the counted work's is called a surprise.
    """
    check_sizes(encoders, sizes)
    old = open_files(json_path, old_path, "scaling")
    spans = Spans(sizes=tuple(sizes), batches=tuple(batches))
    cases = [
        case
        for encoder in encoders
        for kind in permutations
        for case in scaling_cases(encoder, scales_of(encoder), kind, spans, device, seed)
    ]
    cases = list({case.label: case for case in cases}.values())  # one decoder is the same for every encoder
    entrants, baseline = line_up(CONTENDERS, against, precisions_on(device, precisions))
    session = Session(command_line(), device, seed, effort_of(seconds, rounds))
    interrupted = run_cases(session, cases, entrants, baseline, "scaling")
    session.rows += list(exponent_rows(session.rows, cases))
    finish(session, interrupted, json_path, old)
