"""Which configuration a kernel is launched with, and which implementation a decoder runs on: tables before rules.

    the card's own table, which `cflow-fast tune` measures    ->  $CFLOW_FAST_CACHE, or cflow_fast in the user's cache
    the architecture's, shipped, predicted or measured        ->  tuned/sm_90.json
    the rules of `configs`

A table answers for a power of two of rows, for all numbers of them up to it and above the one before. It changes the
shape of tiles, whether a factor is laid down first, whether two products are one (which rounds otherwise, see
`merging`), and nothing else: what it names has to be among `configs.candidates`, whoever wrote it.
Tables are read once in a process; a choice is then found as fast as in a dict. A table that cannot be read is said
once and passed over.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import torch
import triton

from cflow_fast.kernels import configs
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import (
    TAIL_PRECISION,
    Config,
    CouplingConfig,
    LayingConfig,
    LinearConfig,
    MergingConfig,
    Problem,
    TailConfig,
    WholeFlowConfig,
    candidates,
)
from cflow_fast.kernels.tuning_table import Choice, DecoderProblem, Table, TableError, read_table

SHIPPED = Path(__file__).parent / "tuned"
REMEMBERED = 16384
"""Choices that are kept; rows are any number."""

Some = TypeVar("Some", LinearConfig, CouplingConfig, LayingConfig, MergingConfig, TailConfig, WholeFlowConfig)

_trial: ContextVar[Mapping[Problem, Config] | None] = ContextVar("trial", default=None)
_lock = threading.Lock()


def select_linear(
    rows: int, inputs: int, outputs: int, precision: str, chip: Chip, second: bool = False
) -> LinearConfig:
    problem = Problem("linear", precision, rows, (inputs, outputs, int(second)))
    return _tuned(problem, chip, LinearConfig) or configs.select_linear(rows, inputs, outputs, precision, chip, second)


def select_coupling(rows: int, inputs: int, half: int, precision: str, chip: Chip) -> CouplingConfig:
    problem = Problem("coupling", precision, rows, (inputs, half))
    return _tuned(problem, chip, CouplingConfig) or configs.select_coupling(rows, inputs, half, precision, chip)


def select_laying(rows: int, half: int, precision: str, chip: Chip) -> LayingConfig:
    problem = Problem("laying", precision, rows, (half,))
    return _tuned(problem, chip, LayingConfig) or configs.select_laying(rows, half, precision)


def select_merging(rows: int, hidden: int, half: int, precision: str, chip: Chip) -> MergingConfig:
    problem = Problem("merging", precision, rows, (hidden, half))
    return _tuned(problem, chip, MergingConfig) or configs.select_merging(rows, hidden, half, precision, chip)


def select_whole_flow(
    chip: Chip, features: int, rows: int, precision: str, own_condition: bool = False, hard: bool = False
) -> WholeFlowConfig | None:
    """None where the state does not fit the registers."""
    problem = Problem("whole_flow", precision, rows, (features, int(own_condition), int(hard)))
    return _tuned(problem, chip, WholeFlowConfig) or configs.select_whole_flow(
        chip.capability, features, rows, precision, own_condition, hard
    )


def select_tail(scales: int, batch: int, height: int, width: int, chip: Chip) -> TailConfig:
    problem = Problem("tail", TAIL_PRECISION, batch, (scales, height, width))
    return _tuned(problem, chip, TailConfig) or configs.select_tail(scales, batch, height, width)


@functools.lru_cache(REMEMBERED)
def choice(problem: DecoderProblem, chip: Chip) -> Choice | None:
    """What the tables say a decoder runs on; None where they say nothing."""
    key = problem._replace(rows=bucket(problem.rows))
    found = (table.decoders.get(key) for table in _all_tables(chip))
    return next((choice for choice in found if choice is not None), None)


def bucket(rows: int) -> int:
    """The power of two that stands for a number of rows."""
    return 1 << max(0, rows - 1).bit_length()


@contextmanager
def trying(configurations: Mapping[Problem, Config]) -> Iterator[None]:
    """Within it, in this thread: these, by problems in buckets, before the rules, and no table."""
    token = _trial.set(configurations)
    try:
        yield
    finally:
        _trial.reset(token)


def cache_path(card: str) -> Path:
    """Where a card's own table is kept; the card by the name that its driver has for it."""
    folder = os.environ.get("CFLOW_FAST_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cflow_fast"
    )
    return Path(folder, f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json")


def shipped_path(capability: tuple[int, int]) -> Path:
    return SHIPPED / f"sm_{capability[0]}{capability[1]}.json"


def shipped_table(chip: Chip) -> Table | None:
    """It holds for cards of its architecture with as many multiprocessors."""
    table = _read(shipped_path(chip.capability))
    return None if table is None or table.multiprocessors != chip.multiprocessors else table


def forget() -> None:
    """Read the tables anew at the next choice."""
    with _lock:
        for remembered in (_tables, _config, choice):
            remembered.cache_clear()


def _tuned(problem: Problem, chip: Chip, kind: type[Some]) -> Some | None:
    trial = _trial.get()
    config = _config(problem, chip) if trial is None else trial.get(_bucketed(problem))
    assert config is None or isinstance(config, kind)
    return config


@functools.lru_cache(REMEMBERED)
def _config(problem: Problem, chip: Chip) -> Config | None:
    key = _bucketed(problem)
    for table in _all_tables(chip):
        entry = table.kernels.get(key)
        if entry is None:
            continue
        known = next((config for config in candidates(key, chip) if config == entry.config), None)
        if known is not None:
            return known
        if not table.refused:
            table.refused = True
            warnings.warn(
                f"{table.path}: passed over {key}: this version would not launch {entry.config}", stacklevel=4
            )
    return None


def _bucketed(problem: Problem) -> Problem:
    return problem._replace(rows=bucket(problem.rows))


def _all_tables(chip: Chip) -> tuple[Table, ...]:
    with _lock:  # the first of several threads reads them
        return _tables(chip)


@functools.cache
def _tables(chip: Chip) -> tuple[Table, ...]:
    return tuple(table for table in (_own(chip), shipped_table(chip)) if table is not None)


def _own(chip: Chip) -> Table | None:
    if not chip.name:
        return None
    try:
        path = cache_path(chip.name)
    except RuntimeError:  # there is no home
        return None
    table = _read(path)
    if table is not None and table.card != chip.name:
        warnings.warn(f"{path} is passed over: it is of {table.card}, this card is {chip.name}", stacklevel=6)
        return None
    if table is not None and (reason := _outgrown(table, chip)):
        warnings.warn(f"{path} is passed over, defaults apply: {reason}; `cflow-fast tune` measures anew", stacklevel=6)
        return None
    return table


def _outgrown(table: Table, chip: Chip) -> str:
    """Why what was measured then says nothing now; empty where it does."""
    if table.multiprocessors != chip.multiprocessors:
        return f"it is of a card with {table.multiprocessors} multiprocessors, this one has {chip.multiprocessors}"
    for name, now in (("torch", torch.__version__), ("triton", triton.__version__)):
        if table.facts.get(name, now) != now:
            return f"it was measured with {name} {table.facts[name]}, this is {now}"
    return ""


def _read(path: Path) -> Table | None:
    try:
        return read_table(path)
    except FileNotFoundError:
        return None
    except (OSError, TableError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        warnings.warn(f"{path} is passed over, defaults apply: {reason}", stacklevel=6)
        return None
