"""What a report is made of: results files found and read, each row with the place it was measured in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cflow_fast.bench.machine import plain_name
from cflow_fast.bench.report import words
from cflow_fast.bench.results import ForeignFileError, Results, Row, read_results
from cflow_fast.errors import CFlowFastError


@dataclass(frozen=True)
class Source:
    """A results file that was read."""

    name: str
    results: Results


@dataclass(frozen=True, eq=False)
class Measured:
    """A row, the file it comes from, and the device that nothing else may be mixed with in one curve."""

    row: Row
    source: Source
    place: str

    @property
    def key(self) -> tuple[str, ...]:
        """What a later run of the same measurement shares with it."""
        return (self.place, *self.row.key)

    @property
    def is_good(self) -> bool:
        """Whether it may be drawn and compared: it ran, and its result was not found wrong."""
        return self.row.status == "ok" and self.row.parity is not False

    @property
    def facet(self) -> str:
        """What the case is, but for its batch, and the rows that follow from it."""
        left_out = ("batch", "rows") if "batch" in self.row.axes else ()
        return words.axes_text({name: value for name, value in self.row.axes.items() if name not in left_out})

    @property
    def series(self) -> str:
        return f"{self.row.contender} {self.row.precision}".strip()

    @property
    def batch(self) -> float | None:
        return positive(self.row.axes.get("batch"))


def load(paths: Iterable[Path], skip: Callable[[str], None]) -> list[Source]:
    """Read results files, and those in folders and theirs; what cannot be read is told to `skip` in one line.

    JSON files of other things are passed over in folders. Raises CFlowFastError when nothing is left.
    """
    sources = []
    for path, name in _found(paths, skip).items():
        try:
            results = read_results(path)
        except (CFlowFastError, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            skip(reason if str(path) in reason else f"{path}: {reason}")
            continue
        if results.rows:
            sources.append(Source(name, results))
        else:
            skip(f"{path}: holds no measurement")
    if not sources:
        raise CFlowFastError("no results to report: give files that `cflow-fast bench ... --json FILE` wrote")
    return sources


def _found(paths: Iterable[Path], skip: Callable[[str], None]) -> dict[Path, str]:
    """Files, each once, and what the report calls them: the path below the folder that was given."""
    found: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            found.setdefault(path, path.name)
            continue
        files = [file for file in sorted(path.rglob("*.json")) if not (file.is_dir() or _is_foreign(file))]
        if not files:
            skip(f"{path}: no results file (*.json) in this folder")
        for file in files:
            found.setdefault(file, str(file.relative_to(path)))
    return found


def _is_foreign(path: Path) -> bool:
    """Whether a file is whole JSON of something else, as `make gpu` and `cflow-fast parity` write it too."""
    try:
        read_results(path)
    except (CFlowFastError, OSError) as error:
        return isinstance(error, ForeignFileError)
    return False


def measured(sources: Sequence[Source]) -> tuple[list[Measured], list[Measured]]:
    """(rows to show, rows superseded by a later run of the same measurement in the same place), in the files' order.

    A run that was interrupted supersedes none that was not.
    """
    rows = [
        Measured(row, source, place_name(source.results, row.device))
        for source in sources
        for row in source.results.rows
    ]
    ordered = sorted(rows, key=lambda m: (not m.source.results.interrupted, m.source.results.created))
    newest = {m.key: id(m.source) for m in ordered}
    kept = [m for m in rows if newest[m.key] == id(m.source)]
    return kept, [m for m in rows if newest[m.key] != id(m.source)]


def place_name(results: Results, device: str) -> str:
    """The device's name, and a processor's threads: NVIDIA H100 80GB HBM3; Intel Xeon Processor, 2 threads."""
    if not device:
        return "counted, on no device"
    machine = results.machine
    kind = "gpu" if device.startswith("cuda") else "cpu"
    name = plain_name(str(machine.get(kind) or f"unnamed {kind.upper()}"))
    if kind == "gpu" or "threads" not in machine:
        return name
    return f"{name}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def number(value: object) -> float | None:
    """A finite number of a size that measurements have, as a float; anything else is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        return None
    return float(value)


def positive(value: object) -> float | None:
    """A number that a logarithmic scale can show; anything else is none."""
    found = number(value)
    return found if found and found > 1e-30 else None


def grouped(
    rows: Iterable[Measured], key: Callable[[Measured], tuple[str, ...]]
) -> dict[tuple[str, ...], list[Measured]]:
    """Rows by key, keys and rows in the order in which they first come."""
    groups: dict[tuple[str, ...], list[Measured]] = {}
    for m in rows:
        groups.setdefault(key(m), []).append(m)
    return groups
