"""How tests call the command line."""

from __future__ import annotations

import logging
from pathlib import Path

from click.testing import CliRunner, Result

from cflow_fast.cli import main

TINY_OPTIONS = (
    *("--encoder", "resnet18", "--layers", "layer1,layer2", "--untrained", "--image-size", "64", "--precision", "fp32"),
    *("--coupling-blocks", "2", "--condition", "8", "--steps", "6", "--vectors", "64"),
)


def run(*arguments: object) -> Result:
    """Any way that it ends, but an exception that the user would see a traceback of. On the CPU if nothing is said."""
    words = [str(argument) for argument in arguments]
    if words[0] in ("train", "test", "predict", "calibrate") and "--device" not in words:
        words += ["--device", "cpu"]
    try:
        result = CliRunner().invoke(main, words, prog_name="cflow-fast")
    finally:
        logging.captureWarnings(False)  # what a process leaves behind at its end
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(data: Path, output: Path, *options: object) -> Result:
    """Train a tiny model in a moment."""
    return run("train", data, "-o", output, *TINY_OPTIONS, *options)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything below a folder, with what tells whether it was written."""
    return {path.relative_to(folder): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}
