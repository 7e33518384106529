"""`cflow-fast parity`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import torch
from rich.box import SIMPLE
from rich.table import Table

from cflow_fast import parity as checks
from cflow_fast.cli.common import console, device_option, progress_bar
from cflow_fast.files import check_writable, write_text
from cflow_fast.model import CFlowAD


@click.command()
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the table there too.")
@click.option("--seed", type=int, default=0)
@device_option
def parity(model: Path | None, json_path: Path | None, seed: int, device: torch.device) -> None:
    """Compare with float64, and with FrEIA's own rounding error when FrEIA is installed.

    Every decoder size with random parameters, or MODEL's own decoders; every precision that this machine has. Exits
    with 1 when a comparison fails.
    """
    if json_path:
        check_writable(json_path)
    cases: Iterable[checks.Case] = _random_cases(seed, device)
    total = 2 * len(checks.SIZES)
    if model:
        cases = own = _model_cases(model, seed, device)
        total = len(own)
    rows: list[checks.Row] = []
    with progress_bar("parity", total) as update:
        for done, case in enumerate(cases):
            update(done, case.name)
            rows += checks.check(case)
    console.print(_table(rows))
    if json_path:
        write_text(
            json_path, json.dumps({"torch": torch.__version__, "rows": [row.as_dict() for row in rows]}, indent=2)
        )
    failed = [row for row in rows if not row.passed]
    for row in failed:
        words = f"{row.case}, {row.backend}, {row.precision}: {'; '.join(row.failures)}"
        console.print(words, markup=False, soft_wrap=True)
    sys.exit(1 if failed else 0)


def _random_cases(seed: int, device: torch.device) -> Iterator[checks.Case]:
    for features in checks.SIZES:
        for permute_soft in (False, True):
            yield checks.random_case(features, permute_soft, seed=seed, device=device)


def _model_cases(path: Path, seed: int, device: torch.device) -> list[checks.Case]:
    model = CFlowAD.load(path, device)
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
            f"{row.ours.maximum:.1e}",
            f"{row.ours.rms:.1e}",
            f"{row.theirs.maximum:.1e}",
            f"{row.theirs.rms:.1e}",
            f"{row.ours.spearman:.6f}",
            "ok" if row.passed else "FAIL",
        )
    if rows:
        table.caption = f"reference: {rows[0].reference} in the same precision"
    return table
