"""What a section of the report holds, and the tables beside its plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cflow_fast.bench.report import words
from cflow_fast.bench.report.data import Measured


@dataclass(frozen=True)
class Figure:
    """A drawing (SVG): the case it shows, the place that was measured in, and the kind of figures it is one of."""

    kind: str
    title: str
    place: str
    drawing: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `labels` columns name a row, the others are numbers; `absent` names those left out."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    labels: int
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """`anchor` is the section's id in the page; `rows` are those that it shows, from which its sources follow."""

    anchor: str
    title: str
    text: str
    rows: list[Measured]
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


Column = tuple[str, Callable[[Measured], str]]

CASE: Column = ("case", lambda m: m.row.case)
PLACE: Column = ("device", lambda m: m.place)
CONTENDER: Column = ("contender", lambda m: m.row.contender)
PRECISION: Column = ("precision", lambda m: m.row.precision)
NOTE: Column = ("note", lambda m: m.row.note)
NAMES = (CASE, CONTENDER, PRECISION, PLACE)


def table(title: str, rows: Iterable[Measured], numbers: Sequence[Column], names: Sequence[Column] = NAMES) -> Table:
    """One line a row. A column in which nothing was measured is left out and named."""
    rows = list(rows)
    cells = [[show(m) for m in rows] for _, show in numbers]
    kept = [i for i, column in enumerate(cells) if any(cell not in ("", words.NOT_MEASURED) for cell in column)]
    head = (*(name for name, _ in names), *(numbers[i][0] for i in kept))
    lines = [(*(show(m) for _, show in names), *(cells[i][n] for i in kept)) for n, m in enumerate(rows)]
    absent = [name for (name, _), column in zip(numbers, cells, strict=True) if words.NOT_MEASURED in column]
    return Table(title, head, lines, len(names), tuple(name for name in absent if name not in head))
