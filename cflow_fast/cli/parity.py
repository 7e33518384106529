"""`cflow-fast parity`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.box import SIMPLE
from rich.table import Table

from cflow_fast import parity as checks
from cflow_fast.cli.bench_tables import results_of
from cflow_fast.cli.common import Skipped, console, device_option, image_paths, progress_bar
from cflow_fast.datasets import load_images
from cflow_fast.errors import DataError
from cflow_fast.files import check_writable, write_text
from cflow_fast.model import CFlowAD


@click.command()
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.argument("images", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--runs",
    type=click.IntRange(1),
    help=f"Of FrEIA on IMAGES, whose largest error is compared with.  [default: {checks.RUNS}]",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the table there too.")
@click.option("--seed", type=int, default=0)
@device_option
def parity(
    model: Path | None,
    images: tuple[Path, ...],
    runs: int | None,
    json_path: Path | None,
    seed: int,
    device: torch.device,
) -> None:
    """Compare with float64, and with FrEIA's own rounding error when FrEIA is installed.

    Every decoder size with random parameters; or MODEL's own decoders, on features drawn from them or on those of
    IMAGES, files or folders. Every precision that this machine has. Exits with 1 when a comparison fails, or an image
    cannot be read.

    On IMAGES with defects log p / D falls far below what was trained on, where a single position may be all of the
    largest error and rounding is chance. FrEIA has several --runs there, each with its sums in another order. A row is
    of positions down to -7000; a relative one is of all of them, with errors relative to the value. PyTorch's own
    products round as FrEIA's do, and have the relative row alone.
    """
    if runs is not None and not images:
        raise click.UsageError("--runs is of FrEIA on IMAGES: name some")
    if json_path:
        check_writable(json_path)
    skipped = Skipped()
    cases: Iterable[checks.Case] = _random_cases(seed, device)
    total = 2 * len(checks.SIZES)
    if model:
        loaded = CFlowAD.load(model, device)
        cases = own = (
            _image_cases(loaded, images, runs or checks.RUNS, skipped) if images else _model_cases(loaded, seed)
        )
        total = len(own)
    rows: list[checks.Row] = []
    with progress_bar("parity", total) as update:
        for done, case in enumerate(cases):
            update(done, case.name)
            for comparison in checks.compare(case):
                rows += comparison.trained_rows() if images else [comparison.row()]
    console.print(_table(rows))
    if json_path:
        made_by = asdict(results_of([], device, seed))  # as a benchmark's results say it
        write_text(json_path, json.dumps(made_by | {"rows": [row.as_dict() for row in rows]}, indent=1))
    failed = [row for row in rows if not row.passed]
    for row in failed:
        words = f"{row.case}, {row.backend}, {row.precision}: {'; '.join(row.failures)}"
        console.print(words, markup=False, soft_wrap=True)
    sys.exit(1 if failed or skipped.paths else 0)


def _random_cases(seed: int, device: torch.device) -> Iterator[checks.Case]:
    for features in checks.SIZES:
        for permute_soft in (False, True):
            yield checks.random_case(features, permute_soft, seed=seed, device=device)


def _image_cases(model: CFlowAD, images: Sequence[Path], runs: int, skipped: Skipped) -> list[checks.Case]:
    paths = image_paths(images)
    batches = [model.features(batch.images) for batch in load_images(paths, model.image_size, on_skip=skipped)]
    if not batches:
        raise DataError(f"none of the {len(paths)} images can be read: see the reasons above")
    return checks.image_cases(list(model.decoders), [torch.cat(maps) for maps in zip(*batches, strict=True)], runs)  # type: ignore[arg-type]


def _model_cases(model: CFlowAD, seed: int) -> list[checks.Case]:
    maps = model.features(torch.zeros(1, 3, *model.image_size))
    return checks.model_cases(list(model.decoders), [(m.shape[2], m.shape[3]) for m in maps], seed)  # type: ignore[arg-type]


def _table(rows: list[checks.Row]) -> Table:
    table = Table(title="error of log p / D against float64, nats", box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("case", "backend", "precision"):
        table.add_column(heading, overflow="fold")
    for heading in ("max", "RMS", "ref. max", "ref. RMS", "Spearman"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(
            row.case,
            row.backend,
            row.precision,
            *(f"{number:.1e}" for error in (row.ours, row.theirs) for number in _judged(error, row.relative)),
            f"{row.ours.spearman:.6f}",
            "ok" if row.passed else "FAIL",
        )
    if rows:
        of_runs = f", the largest of {len(rows[0].runs)} runs" if len(rows[0].runs) > 1 else ""
        table.caption = f"reference: {rows[0].reference} in the same precision{of_runs}"
    return table


def _judged(error: checks.Error, relative: bool) -> tuple[float, float]:
    return (error.bounded, error.relative_rms) if relative else (error.maximum, error.rms)
