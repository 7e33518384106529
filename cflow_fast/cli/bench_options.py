"""What the timed benchmarks' commands share: options, the run with its progress, and what is printed and stored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import click
import torch

from cflow_fast.bench.cases import PERMUTATIONS, Case, scales_of
from cflow_fast.bench.contenders import PRECISIONS, Contender, device_precisions
from cflow_fast.bench.measurement import Effort
from cflow_fast.bench.results import BenchmarkFileError, Results, compare, read_results
from cflow_fast.bench.runner import Entrant
from cflow_fast.bench.session import Session
from cflow_fast.cli.bench_show import comparison_table, print_wide, show
from cflow_fast.cli.bench_tables import compare_option, exit_code, json_option, store
from cflow_fast.cli.common import device_option, progress_bar
from cflow_fast.files import check_writable

Command = TypeVar("Command", bound=Callable[..., object])


def comma_words(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """Repeated options and comma-separated ones alike, in order, each once."""
    return tuple(dict.fromkeys(word.strip() for value in values for word in value.split(",") if word.strip()))


def comma_numbers(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[int, ...]:
    numbers = []
    for word in comma_words(ctx, param, values):
        if not (word.isascii() and word.isdigit() and int(word) > 0):
            raise click.BadParameter(f"{word!r} is no whole number above 0")
        numbers.append(int(word))
    if not numbers:
        raise click.BadParameter("give at least one number")
    return tuple(dict.fromkeys(numbers))


def _choices(known: Sequence[str]) -> Callable[..., tuple[str, ...]]:
    def check(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
        words = comma_words(ctx, param, values)
        for word in words:
            if word not in known:
                raise click.BadParameter(f"{word!r} is none of {', '.join(known)}")
        return words

    return check


def size_option(*default: int) -> Callable[[Command], Command]:
    text = "Image size in pixels; again, or 256,512, for more."
    return click.option(
        "--size", "sizes", multiple=True, default=tuple(map(str, default)), callback=comma_numbers, help=text
    )


def batch_option(*default: int) -> Callable[[Command], Command]:
    text = "Images at once; 1,8,32 for several."
    return click.option(
        "--batch", "batches", multiple=True, default=tuple(map(str, default)), callback=comma_numbers, help=text
    )


def encoder_option(command: Command) -> Command:
    text = "A timm model; again, or comma separated, for more."
    default = ("wide_resnet50_2",)
    return click.option("--encoder", "encoders", multiple=True, default=default, callback=comma_words, help=text)(
        command
    )


def permutations_option(*default: str) -> Callable[[Command], Command]:
    text = f"Between coupling blocks: {', '.join(PERMUTATIONS)}."
    return click.option("--permutations", multiple=True, default=default, callback=_choices(PERMUTATIONS), help=text)


def precision_option(command: Command) -> Command:
    text = f"{', '.join(PRECISIONS)}; again, or comma separated, for more.  [default: all that the device has]"
    return click.option("--precision", "precisions", multiple=True, callback=_choices(PRECISIONS), help=text)(command)


def against_option(contenders: Mapping[str, Contender], *default: str) -> Callable[[Command], Command]:
    text = f"Peers, the first is the baseline: {', '.join(contenders)}."
    return click.option("--against", multiple=True, default=default, callback=_choices(tuple(contenders)), help=text)


def run_options(command: Command) -> Command:
    """--seconds, --rounds, --seed, --json, --compare and --device."""
    for option in (
        compare_option,
        json_option,
        click.option("--seed", type=int, default=0),
        click.option("--rounds", type=click.IntRange(1), help="Exactly so many.  [default: until ratios are known]"),
        click.option("--seconds", type=click.FloatRange(0, min_open=True), default=12.0, help="For a case, at most."),
    ):
        command = option(command)
    return device_option(command)


def effort_of(seconds: float, rounds: int | None) -> Effort:
    return Effort(seconds=seconds) if rounds is None else Effort(float("inf"), 1e-9, rounds, rounds)


def precisions_on(device: torch.device, precisions: Sequence[str]) -> tuple[str, ...]:
    return tuple(precisions) or device_precisions(device)


def check_sizes(encoders: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise click.UsageError for an image smaller than the largest stride, EncoderError for an unknown encoder."""
    if not encoders:
        raise click.UsageError("--encoder: give at least one")
    for encoder in encoders:
        stride = max(scales_of(encoder).strides)
        for size in sizes:
            if size < stride:
                raise click.UsageError(f"--size {size} is smaller than {stride}, the largest stride of {encoder}")


def open_files(json_path: Path | None, old_path: Path | None, bench: str) -> Results | None:
    """What can be wrong with files is found before anything is measured; gives the older results.

    Raises BenchmarkFileError for those of other benchmarks alone.
    """
    if json_path:
        check_writable(json_path)
    if old_path is None:
        return None
    old = read_results(old_path)
    others = dict.fromkeys(row.bench for row in old.rows)
    if others and bench not in others:
        raise BenchmarkFileError(f"{old_path}: its results are of {', '.join(others)}, none is of {bench}")
    return old


def run_cases(
    session: Session,
    cases: Sequence[Case],
    entrants: Sequence[Entrant],
    baseline: Entrant | None,
    description: str,
) -> bool:
    """Measure every case; whether Ctrl-C ended it."""
    try:
        with progress_bar(description, len(cases)) as update:
            for done, case in enumerate(cases):

                def tell(text: str, share: float, done: int = done) -> None:
                    update(done + share, f"case {done + 1}/{len(cases)}: {text}")

                session.measure(case, entrants, baseline, tell)
    except KeyboardInterrupt:
        return True
    return False


def finish(session: Session, interrupted: bool, json_path: Path | None, old: Results | None) -> NoReturn:
    """Print the rows, store them, compare them, and exit: with 1 when nothing could be measured."""
    session.interrupted = interrupted
    results = session.results()
    show(results)
    if old is not None:
        print_wide(comparison_table(compare(old, results), old))
    store(json_path, results)
    sys.exit(exit_code(results.rows, interrupted))
