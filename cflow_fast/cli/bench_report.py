"""`cflow-fast bench report`."""

from __future__ import annotations

from pathlib import Path

import click

from cflow_fast.cli.common import console, errors


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page.  [default: report.html, or none with --figure]",
)
@click.option("--figure", type=click.Path(path_type=Path, dir_okay=False), help="Draw the speed-up over FrEIA as PNG.")
def report(results: tuple[Path, ...], output: Path | None, figure: Path | None) -> None:
    """Make one HTML page of RESULTS, files that --json wrote or folders with them, or a figure, or both.

    Folders are searched with theirs. A file that cannot be read is named and left out; exits with 1 when none is left.
    """
    from cflow_fast.bench.report import load, throughput_figure, write_report

    sources = load(results, lambda reason: errors.print(f"skipped {reason}", markup=False, soft_wrap=True))
    if output is None and figure is None:
        output = Path("report.html")
    if output:
        write_report(output, sources)
        console.print(f"wrote {output}", markup=False, soft_wrap=True)
    if figure:
        throughput_figure(sources, figure)
        console.print(f"wrote {figure}", markup=False, soft_wrap=True)
