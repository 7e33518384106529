"""What several commands share: options, progress, notes about skipped files."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cflow_fast.datasets import find_images

Command = TypeVar("Command", bound=Callable[..., object])

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def model_argument(command: Command) -> Command:
    return click.argument("model", type=click.Path(path_type=Path, dir_okay=False))(command)


def loading_options(command: Command) -> Command:
    """--device, --batch-size and --workers."""
    for option in (
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes that read images ahead."),
        click.option("--batch-size", type=click.IntRange(1), default=8, help="Images encoded at once."),
    ):
        command = option(command)
    return device_option(command)


def device_option(command: Command) -> Command:
    text = "cpu, cuda, cuda:1, ...  [default: cuda if there is one]"
    return click.option("--device", callback=_device, default=None, help=text)(command)


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> torch.device:
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise click.BadParameter(f"{value!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def image_paths(images: Sequence[Path]) -> list[Path]:
    """Files as they are given, folders as the images in them."""
    return [path for given in images for path in (find_images(given) if given.is_dir() else [given])]


class Skipped:
    """Collects and prints files that were left out."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def __call__(self, path: Path, reason: str) -> None:
        self.paths.append(path)
        errors.print(f"skipped {reason}", markup=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar that is advanced to an absolute position by update(completed, text)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task(description, total=total, text="")
        yield lambda completed, text: progress.update(task, completed=completed, text=text)
        progress.update(task, completed=total)


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the yielded function true; a second one interrupts as usual."""
    stopped = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, previous)
        errors.print("stopping after this step; press Ctrl-C again to stop at once and lose it")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, previous)
