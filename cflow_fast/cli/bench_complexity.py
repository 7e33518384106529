"""`cflow-fast bench complexity`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich.box import SIMPLE
from rich.table import Table

from cflow_fast.bench import complexity as bench
from cflow_fast.bench import cost_formulas, paper
from cflow_fast.bench.counting import MEGABYTE
from cflow_fast.bench.results import Change, Results, Row, compare
from cflow_fast.cli.bench_options import open_files
from cflow_fast.cli.bench_show import comparison_table, print_wide, size_changes
from cflow_fast.cli.bench_tables import compare_option, exit_code, json_option, number, results_of, store
from cflow_fast.cli.common import device_option, progress_bar
from cflow_fast.encoders import Encoder


@click.command()
@click.option("--size", "sizes", type=click.IntRange(32), multiple=True, default=bench.SIZES, help="Image size; again.")
@click.option("--encoder", "encoders", multiple=True, default=bench.ENCODERS, help="A timm model; again for more.")
@click.option("--no-speed", is_flag=True, help="Count sizes and costs only.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0, help="For each encoder and size.")
@click.option("--seed", type=int, default=0)
@json_option
@compare_option
@device_option
def complexity(
    sizes: tuple[int, ...],
    encoders: tuple[str, ...],
    no_speed: bool,
    seconds: float,
    seed: int,
    json_path: Path | None,
    old_path: Path | None,
    device: torch.device,
) -> None:
    """The paper's Table 6, sizes and images a second, and Table 1, costs: CFLOW-AD, PaDiM and SPADE.

    Encoders have random weights. Ctrl-C prints what has been measured.
    """
    old = open_files(json_path, old_path, "complexity")
    for name in encoders:
        Encoder(name, pretrained=False)  # an unknown one is an error before anything is printed
    counted = list(bench.size_rows(encoders, device))
    costs = [row for name in encoders for row in cost_formulas.cost_rows(name, device, sizes[0])]
    for table in (size_table(counted), formula_table(costs), cost_table(costs)):
        print_wide(table)
    speeds: list[Row] = []
    interrupted = False
    if not no_speed:
        interrupted = _measure(encoders, sizes, device, seed, seconds, speeds)
        print_wide(speed_table(speeds))
    results = results_of([*counted, *costs, *speeds], device, seed, interrupted)
    if old is not None:
        _print_changes(compare(old, results), old)
    store(json_path, results)
    sys.exit(exit_code(counted if no_speed else speeds, interrupted))


def _print_changes(changes: Sequence[Change], old: Results) -> None:
    """Of what was counted the bytes, of what was timed the time."""
    timed = [change for change in changes if change.new.case.startswith("speed, ")]
    counted = [change for change in changes if not change.new.case.startswith("speed, ")]
    if counted:
        print_wide(size_changes(counted, old))
    if timed or not counted:
        print_wide(comparison_table(timed, old))


def _measure(
    encoders: Sequence[str], sizes: Sequence[int], device: torch.device, seed: int, seconds: float, rows: list[Row]
) -> bool:
    """Append the rows; whether Ctrl-C ended it."""
    groups = [(encoder, size) for encoder in encoders for size in sizes]
    try:
        with progress_bar("complexity", len(groups)) as update:
            for done, (encoder, size) in enumerate(groups):
                label = f"{encoder}, {size} px"
                update(done, label)
                for row in bench.speed_rows(
                    encoder,
                    size,
                    device,
                    seed,
                    bench.Effort(seconds=seconds),
                    lambda share, spread, done=done, label=label: update(done + share, label),  # type: ignore[misc]
                ):
                    rows.append(row)
    except KeyboardInterrupt:
        return True
    return False


def size_table(rows: Sequence[Row]) -> Table:
    table = Table(title="Table 6, model size, MB (10^6 bytes), counted", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in ("counted", "with encoder", "paper"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        both = row.extra.get("megabytes_with_encoder")
        table.add_row(
            row.case.removeprefix("size, "),
            number(row.extra["megabytes"]),
            "" if both is None else number(both),
            number(row.extra["paper_megabytes"], 0, paper.MISSING),
        )
    return table


def formula_table(rows: Sequence[Row]) -> Table:
    """Each method's formulas, once."""
    table = Table(title="Table 1, costs", box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("method", "train", "test", "memory"):
        table.add_column(heading, overflow="fold")
    for row in {row.contender: row for row in rows}.values():
        table.add_row(row.contender, row.extra["train"], row.extra["test"], row.extra["memory"])
    table.caption = (
        f"{cost_formulas.SYMBOLS} The paper's own formulas: {paper.TABLE_1}; these are read off the methods. "
        f"What it says of memory: {paper.CAPTION_1}."
    )
    return table


def cost_table(rows: Sequence[Row]) -> Table:
    table = Table(title="Table 1, counted", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("case", overflow="fold")
    table.add_column("method", no_wrap=True)
    for heading in ("train, GFLOP an image", "test, GFLOP an image", "memory, MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.case.removeprefix("cost, "),
            row.contender,
            number(row.extra["train_gflop"]),
            number(row.extra["test_gflop"]),
            number(None if row.model_bytes is None else row.model_bytes / MEGABYTE),
        )
    table.caption = "training by one pass; times measured on real data: `cflow-fast bench accuracy`"
    return table


def speed_table(rows: Sequence[Row]) -> Table:
    table = Table(title="Table 6, speed, random weights, contenders taking turns", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("case", overflow="fold")
    table.add_column("precision")
    for heading in ("ms a call [95% interval]", "images/s", "paper, fps"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = row.seconds
        table.add_row(
            row.case.removeprefix("speed, "),
            row.precision,
            f"{row.status}: {row.note}"
            if times is None
            else f"{1e3 * times.median:.1f} [{1e3 * times.low:.1f}, {1e3 * times.high:.1f}]",
            number(row.images_per_second),
            number(row.extra.get("paper_fps"), 1, paper.MISSING),
        )
    table.caption = "the paper's fps include its data loader and leave out the anomaly map; ours are from image to map"
    return table
