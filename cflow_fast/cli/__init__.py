"""The command line, `cflow-fast`: one module per command."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from cflow_fast.cli.bench import bench
from cflow_fast.cli.calibrate import calibrate
from cflow_fast.cli.demo import demo
from cflow_fast.cli.info import info
from cflow_fast.cli.parity import parity
from cflow_fast.cli.predict import predict
from cflow_fast.cli.test import test
from cflow_fast.cli.train import train
from cflow_fast.cli.tune import tune
from cflow_fast.errors import CFlowFastError
from cflow_fast.interruption import INTERRUPTED


class _Commands(click.Group):
    """Errors that a user can mend end in one line and exit code 1; click itself exits with 2 for a usage error."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CFlowFastError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="cflow-fast")
def main() -> None:
    """CFLOW-AD, fast: find defects in images after seeing good ones only."""
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [_Warnings()]


class _Warnings(logging.Handler):
    """Warnings as one line on the standard error, without Python's source line below."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        message = text.split("Warning: ", 1)[-1].splitlines()[0]
        click.echo(f"Note: {message}", err=True)


for command in (train, test, predict, calibrate, info, demo, parity, tune, bench):
    main.add_command(command)
