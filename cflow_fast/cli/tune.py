"""`cflow-fast tune`."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from click.core import ParameterSource
from rich.box import SIMPLE
from rich.table import Table as Shown

from cflow_fast import ops
from cflow_fast.bench.cases import BATCHES, HEADLINE_ENCODERS, SIZES
from cflow_fast.bench.contenders import device_precisions
from cflow_fast.cli.bench_options import batch_option, check_sizes, comma_words, precision_option, size_option
from cflow_fast.cli.bench_show import print_wide
from cflow_fast.cli.bench_tables import INTERRUPTED, command_line
from cflow_fast.cli.common import console, errors, progress_bar
from cflow_fast.errors import CFlowFastError
from cflow_fast.files import check_writable
from cflow_fast.model import CFlowAD

if TYPE_CHECKING:
    from cflow_fast.bench.tune import Finding
    from cflow_fast.bench.tune_targets import Target
    from cflow_fast.kernels.tuning_table import Table

# What needs Triton is imported where it is used: there may be none here.

PREDICTED_CARDS = ("H100", "H200")


@click.command(epilog="Ctrl-C keeps what was measured. What was found before stays where nothing new is.")
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    default=HEADLINE_ENCODERS,
    callback=comma_words,
    help="Whose decoders, without MODEL; again, or comma separated, for more.",
)
@size_option(*SIZES)
@batch_option(*BATCHES)
@precision_option
@click.option("--device", default="cuda", help="cuda, cuda:1, ...")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=5.0, help="At most.")
@click.option("--predict", "predicted_card", type=click.Choice(PREDICTED_CARDS), help="Predict for it; needs no card.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The table's file.  [default: this card's in the cache; with --predict the shipped one]",
)
@click.pass_context
def tune(
    ctx: click.Context,
    model: Path | None,
    encoders: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    precisions: Sequence[str],
    device: str,
    minutes: float,
    predicted_card: str | None,
    output: Path | None,
) -> None:
    """Find the fastest configuration of every kernel, and whether PyTorch's own products are faster still.

    For MODEL's decoders at its image size, or for --encoder's at --size. Later runs on this card take what was found.
    """
    if model and any(ctx.get_parameter_source(name) != ParameterSource.DEFAULT for name in ("encoders", "sizes")):
        raise click.UsageError("MODEL has an encoder and an image size of its own: leave out --encoder and --size")
    if importlib.util.find_spec("triton") is None:
        raise CFlowFastError("there is nothing to tune: triton is not installed")
    if model is None:
        check_sizes(encoders, sizes)
    if predicted_card:
        _predict(predicted_card, output, _targets(model, "cpu", encoders, sizes, batches, precisions))
        return
    card = _card(device)
    wanted = _targets(
        model, card, encoders, sizes, batches, precisions or (() if model else device_precisions(card)[::-1])
    )
    sys.exit(_measure(card, wanted, _tails(model, encoders, sizes, batches), minutes, output))


def _card(name: str) -> torch.device:
    if not torch.cuda.is_available():
        raise CFlowFastError("there is no CUDA device here; `--predict H100` makes a table without one")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type != "cuda" or ops.backend(device) != "triton":
        raise CFlowFastError(f"there is nothing to tune: {name} does not run Triton's kernels")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _targets(
    model: Path | None,
    device: torch.device | str,
    encoders: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    precisions: Sequence[str],
) -> list[Target]:
    """In all precisions where none is asked for; MODEL's own then."""
    from cflow_fast.bench.headline import PRECISIONS
    from cflow_fast.bench.tune_targets import model_targets, targets

    if model is None:
        return targets(encoders, tuple(ops.KERNEL_PRECISIONS[p] for p in precisions) or PRECISIONS, sizes, batches)
    loaded = CFlowAD.load(model, device)
    wanted = precisions or (loaded.folded()[0].precision,)
    for precision in wanted:
        if precision not in ops.KERNEL_PRECISIONS:
            raise CFlowFastError(f"{model} predicts in {precision}, which no kernel multiplies: give --precision")
    return model_targets(loaded, batches, [ops.KERNEL_PRECISIONS[precision] for precision in wanted])


def _tails(
    model: Path | None, encoders: Sequence[str], sizes: Sequence[int], batches: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Anomaly maps, of a model at its image size where that is square: other images' sizes are any."""
    from cflow_fast.bench.tune_targets import tails

    if model is None:
        return tails(encoders, sizes, batches)
    loaded = CFlowAD.load(model)
    height, width = loaded.image_size
    return [(batch, len(loaded.decoders), height) for batch in batches] if height == width else []


def _predict(name: str, output: Path | None, wanted: list[Target]) -> None:
    import triton

    from cflow_fast.bench.prediction import CARDS
    from cflow_fast.bench.tune_predicted import ARCHITECTURE, choose_by_prediction
    from cflow_fast.kernels.chip import Chip
    from cflow_fast.kernels.tuning import shipped_path
    from cflow_fast.kernels.tuning_table import checked_target

    if triton.knobs.runtime.interpret:
        raise click.UsageError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    path = output or shipped_path(Chip().capability)
    checked_target(path, ARCHITECTURE)
    check_writable(path)
    card = next(card for card in CARDS if card.name == name)
    table = choose_by_prediction(card, wanted, report=lambda words: errors.print(words, markup=False, soft_wrap=True))
    _store(table, path)


def _measure(
    device: torch.device,
    wanted: list[Target],
    tails: list[tuple[int, int, int]],
    minutes: float,
    output: Path | None,
) -> int:
    """The exit code. What was found is stored however the search ends."""
    from cflow_fast.bench.tune import choose_by_measurement, table_of
    from cflow_fast.bench.tune_card import CardTimer
    from cflow_fast.bench.warm import compiling_ahead
    from cflow_fast.kernels.chip import Chip
    from cflow_fast.kernels.tuning import cache_path, shipped_table
    from cflow_fast.kernels.tuning_table import checked_target

    chip = Chip.of(device)
    path = output or cache_path(chip.name)
    checked_target(path, chip.name)
    check_writable(path)
    began, code = time.monotonic(), 0
    found: list[Finding] = []
    try:
        with compiling_ahead(wanted, device), progress_bar("tuning", 60 * minutes) as update:
            for finding in choose_by_measurement(
                wanted, chip, CardTimer(device), began + 60 * minutes, shipped_table(chip), tails
            ):
                found.append(finding)
                update(min(time.monotonic() - began, 60 * minutes), finding.target)
                if finding.note:
                    errors.print(f"{finding.target}: {finding.note}", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
        errors.print("interrupted: this is what was measured until then")
    finally:
        reached = {finding.decoder[0] for finding in found if finding.decoder}
        if missing := len({target.problem for target in wanted} - reached):
            errors.print(f"{missing} decoders were not reached or could not be compared: the rest takes more --minutes")
        if any(finding.kernel or finding.decoder for finding in found):
            _store(table_of(found, chip.name, chip.multiprocessors, _facts()), path)
        else:
            errors.print("nothing was measured", markup=False)
    return code


def _facts() -> dict[str, Any]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "command": command_line()}


def _store(table: Table, path: Path) -> None:
    from cflow_fast.bench.tune import in_words
    from cflow_fast.kernels import tuning
    from cflow_fast.kernels.tuning_table import store

    store(table, path)
    tuning.forget()
    for headings, rows in in_words(table):
        shown = Shown(box=SIMPLE, padding=(0, 1, 0, 0))
        for heading in headings:
            shown.add_column(heading, justify="left" if heading in headings[:2] else "right", overflow="fold")
        for row in rows:
            shown.add_row(*row)
        print_wide(shown)
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
