"""`cflow-fast bench ablation`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE
from rich.table import Table

from cflow_fast.bench import ablation as bench
from cflow_fast.bench import paper
from cflow_fast.bench.accuracy import METRICS
from cflow_fast.bench.counting import MEGABYTE
from cflow_fast.bench.results import Row, compare
from cflow_fast.cli.bench_accuracy import SkippedOnce, setting_from, training_options
from cflow_fast.cli.bench_options import open_files
from cflow_fast.cli.bench_show import metric_changes, print_wide
from cflow_fast.cli.bench_tables import compare_option, exit_code, json_option, number, results_of, store
from cflow_fast.cli.common import console, loading_options, progress_bar
from cflow_fast.datasets import MVTecCategory
from cflow_fast.encoders import find_config
from cflow_fast.errors import EncoderError


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    default=("wide_resnet50_2",),
    help="The base's; again for others to compare, with their own ImageNet weights.",
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(32),
    multiple=True,
    default=bench.SIZES,
    help="The base's image size; again for others to compare.",
)
@click.option("--seed", type=int, default=0)
@training_options
@json_option
@compare_option
@loading_options
def ablation(
    data: Path,
    encoders: tuple[str, ...],
    sizes: tuple[int, ...],
    seed: int,
    json_path: Path | None,
    old_path: Path | None,
    device: torch.device,
    **options: Any,
) -> None:
    """The paper's Table 2 on DATA, a category in MVTec AD's layout: one factor at a time around a base.

    Coupling layers, pooling layers, image size, condition and encoder. Ctrl-C prints what has been measured; exits
    with 1 when nothing could be.
    """
    _check_names(encoders)
    category = MVTecCategory(data)
    category.check()
    old = open_files(json_path, old_path, "ablation")
    base = setting_from(encoders[0], sizes[0], device, **options)
    planned = bench.variations(base, sizes[1:], encoders[1:])
    rows: list[Row] = []
    interrupted = _measure(category, planned, seed, rows)
    print_wide(table(rows, planned[0]))
    results = results_of(rows, device, seed, interrupted)
    if old is not None:
        print_wide(metric_changes(compare(old, results), old))
    store(json_path, results)
    sys.exit(exit_code(rows, interrupted))


def _check_names(encoders: Sequence[str]) -> None:
    for encoder in encoders:
        try:
            find_config(encoder)
        except EncoderError as error:
            raise click.UsageError(f"--encoder: {error}") from error


def _measure(category: MVTecCategory, planned: Sequence[bench.Variation], seed: int, rows: list[Row]) -> bool:
    """Append a row for each variation; whether Ctrl-C ended it."""
    skip = SkippedOnce()
    interrupted = False
    try:
        with progress_bar(f"ablation on {category.name}", len(planned)) as update:

            def show(text: str) -> None:
                update(len(rows), f"{planned[len(rows)].label}: {text}")

            for row in bench.ablation_rows(category, planned, seed, skip, show):
                rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
    if skip.paths:
        console.print(f"{len(skip.paths)} image(s) were skipped")
    return interrupted


def table(rows: Sequence[Row], base: bench.Variation) -> Table:
    result = Table(title="Table 2: one factor at a time", box=SIMPLE, padding=(0, 1, 0, 0))
    result.add_column("category, factor: value", overflow="fold")
    for heading in (*METRICS.values(), "decoders, MB", "images/s", "fit, s"):
        result.add_column(heading, justify="right")
    for row in rows:
        if row.status != "ok":
            result.add_row(row.case, f"{row.status}: {row.note}")
            continue
        result.add_row(
            row.case,
            *(number(_percent(row.extra[name]), 2, "undefined") for name in METRICS),
            number(row.extra["decoder_bytes"] / MEGABYTE),
            number(row.images_per_second),
            number(row.extra["fit_seconds"]),
        )
    result.caption = f"base: {base.value}; one seed; the paper's figures: {paper.TABLE_2}"
    return result


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
