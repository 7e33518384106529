"""What all benchmarks' commands share: storing their rows, and how numbers stand in the paper's tables."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from cflow_fast.bench.results import Results, Row, store_results
from cflow_fast.bench.session import Session
from cflow_fast.cli.common import console
from cflow_fast.interruption import INTERRUPTED

NOT_MEASURED = "not measured"

json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Store the rows there; folders that are missing are made.",
)
compare_option = click.option(
    "--compare",
    "old_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Show the change since that results file.",
)


def results_of(rows: Sequence[Row], device: torch.device, seed: int, interrupted: bool = False) -> Results:
    """The rows with the machine, the versions and the command line."""
    return Session(command_line(), device, seed, rows=list(rows), interrupted=interrupted).results()


def store(path: Path | None, results: Results) -> None:
    """Write them if a path was given; without a row, or after Ctrl-C, an older file there stays as it is."""
    if path is not None and not results.rows:
        console.print(f"nothing was measured, {path} was not written", markup=False, soft_wrap=True)
    elif path is not None:
        written = store_results(path, results)
        beside = "" if written == path else f"; {path} is for a whole run and was not touched"
        console.print(f"wrote {written}{beside}", markup=False, soft_wrap=True)
    if results.interrupted and results.rows:
        console.print("interrupted: this is what was measured until then")


def exit_code(rows: Sequence[Row], interrupted: bool) -> int:
    """130 after Ctrl-C; 1 when nothing could be measured."""
    return INTERRUPTED if interrupted else int(not any(row.status == "ok" for row in rows))


def command_line() -> str:
    """The command that makes a result, as a user would repeat it.

    Of a path from the root only the name is stored: where a machine keeps its data is no part of a result.
    """
    program, *words = sys.argv
    name = Path(program).name.replace("__main__.py", "cflow-fast")  # python -m cflow_fast
    return shlex.join([name, *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def number(value: float | None, places: int = 1, missing: str = NOT_MEASURED) -> str:
    return missing if value is None else f"{value:,.{places}f}"
