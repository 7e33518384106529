"""A tuning table as a file: what was found fastest for one card, with what was predicted and measured.

JSON that can be read, one entry a line. `kernels` has a configuration for each problem that one is chosen by,
`decoders` whether a decoder runs on Triton's kernels or on the plain path, and why. Times are microseconds; what was
not measured is null there and its source is "predicted".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from cflow_fast.errors import CFlowFastError
from cflow_fast.files import write_text
from cflow_fast.kernels.configs import (
    NUMBERS,
    Config,
    CouplingConfig,
    LayingConfig,
    LinearConfig,
    MergingConfig,
    Problem,
    TailConfig,
    WholeFlowConfig,
)

FORMAT = 1
BACKENDS = ("triton", "plain")

_CONFIGS: dict[str, type[Any]] = {
    "linear": LinearConfig,
    "coupling": CouplingConfig,
    "laying": LayingConfig,
    "merging": MergingConfig,
    "whole_flow": WholeFlowConfig,
    "tail": TailConfig,
}
_FLAGS = ("second", "own_condition", "hard")


class TableError(CFlowFastError):
    """A file is no tuning table that this version reads, or must not be written over."""


class DecoderProblem(NamedTuple):
    """A decoder and how many positions of feature maps it is given at once."""

    features: int
    condition: int
    blocks: int
    permutations: str  # "soft" or "hard"
    precision: str
    rows: int


@dataclass(frozen=True)
class Entry:
    """Microseconds of a launch, or of decoders side by side where no launch alone can tell: predicted, measured."""

    config: Config
    predicted_us: float | None = None
    measured_us: float | None = None

    @property
    def source(self) -> str:
        return "predicted" if self.measured_us is None else "measured"

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        if self.measured_us is None or not self.predicted_us:
            return None
        return round(self.measured_us / self.predicted_us, 2)


@dataclass(frozen=True)
class Choice:
    """Microseconds of a whole decoder by its two implementations, in a CUDA graph each where they were measured."""

    backend: str
    why: str
    source: str
    triton_us: float | None = None
    plain_us: float | None = None


@dataclass
class Table:
    """card: a card's name, or that of an architecture. facts: how it was made."""

    card: str
    multiprocessors: int
    kernels: dict[Problem, Entry] = field(default_factory=dict)
    decoders: dict[DecoderProblem, Choice] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)
    refused: bool = field(default=False, compare=False)  # whether it was said that an entry was

    def merged_into(self, older: Table) -> Table:
        """Both, this one's where both have an entry, but nothing predicted in the place of what was measured."""
        kernels, decoders = dict(older.kernels), dict(older.decoders)
        for problem, entry in self.kernels.items():
            if entry.measured_us is not None or problem not in kernels or kernels[problem].measured_us is None:
                kernels[problem] = entry
        for decoder, choice in self.decoders.items():
            if choice.source == "measured" or decoder not in decoders or decoders[decoder].source != "measured":
                decoders[decoder] = choice
        return Table(self.card, self.multiprocessors, kernels, decoders, older.facts | self.facts)


def read_table(path: Path) -> Table:
    """Raises OSError, or TableError with what is wrong. Entries that this version does not know are left out."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"it is damaged: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise TableError("it is no tuning table")
    if content["format"] != FORMAT:
        raise TableError(f"it has format {content['format']!r}, this version reads {FORMAT}")
    try:
        table = Table(str(content["card"]), int(content["multiprocessors"]), facts=dict(content["facts"]), path=path)
        kernels, decoders = list(content["kernels"]), list(content["decoders"])
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise TableError(f"it is damaged: {type(error).__name__}: {error}") from error
    for row in kernels:
        if (read := _kernel(row)) is not None:
            table.kernels[read[0]] = read[1]
    for row in decoders:
        if (chosen := _decoder(row)) is not None:
            table.decoders[chosen[0]] = chosen[1]
    return table


def checked_target(path: Path, card: str) -> Table | None:
    """The table that a new one is to be merged into, if there is one.

    Raises TableError where there is something else: it must not be written over.
    """
    try:
        table = read_table(path)
    except FileNotFoundError:
        return None
    except TableError as error:
        raise TableError(f"{path} is in the way: {error}; move it, or choose another --output") from error
    if table.card != card:
        raise TableError(f"{path} is in the way: it is of {table.card}, not of {card}; choose another --output")
    return table


def store(table: Table, path: Path) -> Table:
    """Merge with what is there now and write it atomically; gives what was written.

    Two processes that store at the same moment: the file is one of theirs, whole.
    """
    older = checked_target(path, table.card)
    merged = table if older is None else table.merged_into(older)
    write_text(path, as_text(merged))
    return merged


def as_text(table: Table) -> str:
    head = {"format": FORMAT, "card": table.card, "multiprocessors": table.multiprocessors, "facts": table.facts}
    kernels = _lines(_kernel_row(problem, table.kernels[problem]) for problem in sorted(table.kernels))
    decoders = _lines(key._asdict() | asdict(table.decoders[key]) for key in sorted(table.decoders))
    return f'{json.dumps(head)[:-1]},\n"kernels": [{kernels}],\n"decoders": [{decoders}]}}\n'


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(("," if i else "") + "\n" + json.dumps(row) for i, row in enumerate(rows))


def _kernel_row(problem: Problem, entry: Entry) -> dict[str, Any]:
    """Fields of the configuration that are as usual are left out."""
    numbers = dict(zip(NUMBERS[problem.kernel], problem.numbers, strict=True))
    numbers |= {name: bool(numbers[name]) for name in _FLAGS if name in numbers}
    config = {f.name: getattr(entry.config, f.name) for f in fields(entry.config)}
    usual = {f.name: f.default for f in fields(entry.config) if f.default is not MISSING}
    return {
        "kernel": problem.kernel,
        "precision": problem.precision,
        "rows": problem.rows,
        **numbers,
        "config": {name: value for name, value in config.items() if name not in usual or value != usual[name]},
        "source": entry.source,
        "predicted_us": entry.predicted_us,
        "measured_us": entry.measured_us,
        "ratio": entry.ratio,
    }


def _kernel(row: Any) -> tuple[Problem, Entry] | None:
    try:
        kernel = row["kernel"]
        numbers = tuple(int(row[name]) for name in NUMBERS[kernel])
        problem = Problem(kernel, str(row["precision"]), int(row["rows"]), numbers)
        times = (_time(row["predicted_us"]), _time(row["measured_us"]))
        return problem, Entry(_CONFIGS[kernel](**row["config"]), *times)
    except (KeyError, OverflowError, TypeError, ValueError):
        return None


def _decoder(row: Any) -> tuple[DecoderProblem, Choice] | None:
    try:
        key = DecoderProblem(*(f(row[name]) for name, f in _DECODER_TYPES.items()))
        backend, why, source = (str(row[name]) for name in ("backend", "why", "source"))
        choice = Choice(backend, why, source, _time(row["triton_us"]), _time(row["plain_us"]))
    except (KeyError, OverflowError, TypeError, ValueError):
        return None
    return (key, choice) if choice.backend in BACKENDS else None


_DECODER_TYPES: dict[str, type[Any]] = {
    "features": int,
    "condition": int,
    "blocks": int,
    "permutations": str,
    "precision": str,
    "rows": int,
}


def _time(value: Any) -> float | None:
    return None if value is None else float(value)
