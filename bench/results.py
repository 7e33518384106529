"""Stored results: what was measured, on what, by which command; written, read and compared.

A number that was not measured is None, and is shown as "not measured".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from cflow_fast.errors import CFlowFastError
from cflow_fast.files import write_text

FORMAT = 1
"""Version of the file's form; another one is refused."""

BENCHES = ("decoder", "map", "end-to-end", "training", "stages", "scaling", "complexity", "accuracy", "ablation")
STATUSES = ("ok", "not installed", "not available", "out of memory", "failed", "parity failed")


class BenchmarkFileError(CFlowFastError):
    """A file is not a results file, is cut short, or has another version's form."""


class ForeignFileError(BenchmarkFileError):
    """A whole JSON file that holds no results of any version."""


@dataclass(frozen=True)
class Summary:
    """Times of one call over the rounds, in seconds."""

    median: float
    low: float  # low, high: the 95% interval of the median
    high: float
    p50: float
    p99: float
    rounds: int


@dataclass(frozen=True)
class Speedup:
    """How many times faster than `against`, from rounds that timed both; low, high: its 95% interval."""

    against: str
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One contender on one case."""

    bench: str
    case: str
    axes: dict[str, str | int | float | bool]  # what plots group by: encoder, permutations, size, batch, D, rows, ...
    contender: str
    precision: str
    device: str
    status: str = "ok"
    note: str = ""
    seconds: Summary | None = None
    images_per_second: float | None = None
    tflops: float | None = None  # the case's counted work over the median
    share_of_peak: float | None = None  # of the device's measured matrix rate in this precision
    peak_memory_bytes: int | None = None  # of a call, beyond weights; what a captured graph holds for it counts
    model_bytes: int | None = None
    error_max: float | None = None  # error_max, error_rms: of log p / D (bench map: of the map) against float64
    error_rms: float | None = None
    parity: bool | None = None
    speedup: Speedup | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows of two files the same measurement."""
        axes = json.dumps(self.axes, sort_keys=True)  # an ablation's case does not name its encoder
        return self.bench, self.case, axes, self.contender, self.precision, self.device

    def number(self, name: str) -> float | None:
        """What `extra` holds by that name, where it is a number."""
        value = self.extra.get(name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Results:
    """One run: its rows, and everything needed to make it again."""

    command: str
    created: str  # ISO 8601
    machine: dict[str, Any]
    versions: dict[str, str]
    seed: int
    commit: str
    peak_flops: dict[str, float]  # precision to FLOP/s, measured
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False  # before the command's end: rows are missing, or have fewer rounds


@dataclass(frozen=True)
class Change:
    """A measurement in an older and in a newer file."""

    old: Row
    new: Row

    @property
    def time_ratio(self) -> float | None:
        """New median time over the old one; under 1 is faster now."""
        return self.ratio(lambda row: row.seconds.median if row.seconds else None)

    @property
    def speedup_ratio(self) -> float | None:
        """New speed-up over the old one, where both are against the same contender; over 1 is better now."""
        old, new = self.old.speedup, self.new.speedup
        if old is None or new is None or old.against != new.against:
            return None
        return _quotient(new.median, old.median)

    def ratio(self, value: Callable[[Row], float | None]) -> float | None:
        """A value of the newer row over the older one's."""
        old, new = value(self.old), value(self.new)
        return None if old is None or new is None else _quotient(new, old)


def write_results(path: Path, results: Results) -> None:
    """Write a run as JSON, atomically. Numbers that JSON does not have are an error, never NaN."""
    write_text(path, json.dumps({"format": FORMAT} | asdict(results), indent=1, allow_nan=False) + "\n")


def store_results(path: Path, results: Results) -> Path:
    """Write a run to `path`, or one that was interrupted beside it; where it was written to.

    Of r.json that is r.partial.json: a whole run in the file stays.
    """
    written = path.with_name(f"{path.stem}.partial{path.suffix}") if results.interrupted else path
    write_results(written, results)
    return written


def read_results(path: Path) -> Results:
    """Read a run. Raises BenchmarkFileError when the file is not one, and OSError when it cannot be opened.

    Of whole JSON without results of any version it is a ForeignFileError.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkFileError(f"{path}: not a whole results file of `cflow-fast bench` ({error})") from error
    if not isinstance(facts, dict) or not {"format", "rows"} <= facts.keys():
        raise ForeignFileError(f"{path}: not a results file of `cflow-fast bench`")
    if facts["format"] != FORMAT:
        raise BenchmarkFileError(f"{path}: its results have format {facts['format']!r}, this version reads {FORMAT}")
    try:
        rows = _rows(facts["rows"])
        return _made(Results, {name: value for name, value in facts.items() if name != "format"} | {"rows": rows})
    except (TypeError, ValueError) as error:
        raise BenchmarkFileError(f"{path}: not a results file of `cflow-fast bench` ({error})") from error


def compare(old: Results, new: Results) -> list[Change]:
    """The measurements that both runs have, in the newer one's order."""
    earlier = {row.key: row for row in old.rows}
    return [Change(earlier[row.key], row) for row in new.rows if row.key in earlier]


def _rows(facts: Any) -> list[Row]:
    if not isinstance(facts, list):
        raise TypeError(f"rows is {facts!r}, expected a list")
    rows = []
    for number, row in enumerate(facts, 1):
        try:
            rows.append(_row(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number}: {error}") from error
    return rows


def _row(facts: Any) -> Row:
    parts = dict(facts) if isinstance(facts, Mapping) else facts
    for name, kind in (("seconds", Summary), ("speedup", Speedup)):
        if isinstance(parts, dict) and parts.get(name) is not None:
            parts[name] = _made(kind, parts[name])
    row = _made(Row, parts)
    if row.status not in STATUSES:
        raise ValueError(f"status {row.status!r} is none of {', '.join(STATUSES)}")
    return row


Made = TypeVar("Made")

KINDS: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "dict": (dict,),
    "list": (list, Sequence),
}
"""What JSON may hold for a field, by the name its annotation starts with."""


def _made(kind: type[Made], facts: Any) -> Made:
    """A dataclass from a dictionary whose names and types must fit."""
    assert is_dataclass(kind)
    if not isinstance(facts, Mapping):
        raise TypeError(f"{kind.__name__} is {facts!r}, expected its fields")
    known = {spec.name: spec.default is MISSING and spec.default_factory is MISSING for spec in fields(kind)}
    absent = [name for name, is_needed in known.items() if is_needed and name not in facts]
    unknown = [str(name) for name in facts if name not in known]
    if absent or unknown:
        lacks, more = f"it lacks {', '.join(absent)}", f"it has the unknown {', '.join(unknown)}"
        raise TypeError("; ".join([lacks] * bool(absent) + [more] * bool(unknown)))
    for spec in fields(kind):
        if spec.name not in facts:
            continue
        value, annotation = facts[spec.name], str(spec.type)
        accepted = KINDS.get(annotation.split("[")[0].split(" ")[0])
        optional = annotation.endswith("| None")
        if accepted and not (value is None and optional) and not isinstance(value, accepted):
            raise TypeError(f"{spec.name} is {value!r}, expected {annotation}")
    return kind(**facts)


def _quotient(a: float, b: float) -> float | None:
    return a / b if b > 0 and math.isfinite(a) else None
