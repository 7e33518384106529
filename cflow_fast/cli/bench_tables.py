"""What the commands that print the paper's tables share: storing their rows, and the width of their numbers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from cflow_fast.bench.results import Row, write_results
from cflow_fast.bench.session import Session
from cflow_fast.cli.common import console

NOT_MEASURED = "not measured"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells know it."""

json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Store the rows there."
)


def store(path: Path | None, rows: Sequence[Row], device: torch.device, seed: int) -> None:
    """Write the rows with the machine, the versions and the command line, if a path was given and there are any."""
    if path is None or not rows:
        return
    write_results(path, Session(command_line(), device, seed, rows=list(rows)).results())
    console.print(f"wrote {path}", markup=False, soft_wrap=True)


def command_line() -> str:
    """The command that makes a result, as a user would repeat it.

    Of a path from the root only the name is stored: where a machine keeps its data is no part of a result.
    """
    program, *words = sys.argv
    return shlex.join([Path(program).name, *(Path(word).name if Path(word).is_absolute() else word for word in words)])


def number(value: float | None, places: int = 1, missing: str = NOT_MEASURED) -> str:
    return missing if value is None else f"{value:,.{places}f}"
