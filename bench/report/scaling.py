"""Time against one axis at a time, with the exponent that fits it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cflow_fast.bench.report import words
from cflow_fast.bench.report.charts import Axis, Curve, curve_chart
from cflow_fast.bench.report.data import Measured, grouped, number, positive
from cflow_fast.bench.report.sections import Column, Figure, Section, table
from cflow_fast.bench.report.style import look
from cflow_fast.bench.scaling import fit_exponent


@dataclass(frozen=True)
class Sweep:
    """Rows of one contender, precision and device along an axis, at two values of it or more, in its order."""

    axis: str
    rest: str  # what stays, in words
    rows: list[Measured]

    @property
    def place(self) -> str:
        return self.rows[0].place

    @property
    def values(self) -> list[float]:
        return [_value(m) or 0.0 for m in self.rows]

    def curve(self) -> Curve:
        row, series = self.rows[0].row, self.rows[0].series
        milliseconds = [1e3 * _seconds(m) for m in self.rows]
        titles = [f"{m.row.case}, {series}: {words.milliseconds(_seconds(m))} ms" for m in self.rows]
        exponent = fit_exponent(self.values, milliseconds).value
        points = list(zip(self.values, milliseconds, titles, strict=True))
        return Curve(f"{series}: {exponent:.2f}", points, look(row.contender, row.precision))


def scaling_section(rows: Sequence[Measured]) -> Section | None:
    """A plot for every axis and device that a contender was timed along."""
    rows = [m for m in rows if m.is_good and m.row.bench == "scaling"]
    sweeps = list(_sweeps([m for m in rows if _value(m) and positive(_seconds(m))]))
    if not sweeps:
        return None
    figures = []
    for axis, rest, place in dict.fromkeys((s.axis, s.rest, s.place) for s in sweeps):
        same = [s for s in sweeps if (s.axis, s.rest, s.place) == (axis, rest, place)]
        values = tuple(sorted({value for sweep in same for value in sweep.values}))
        x = Axis(words.AXIS_TITLES.get(axis, axis.replace("_", " ")), values=values)
        title = f"Time against {x.label}: {rest}"
        drawing = curve_chart(title, [sweep.curve() for sweep in same], x, Axis("ms per call"))
        figures.append(Figure("", title, place, drawing))
    text = (
        "Median time per call, both axes logarithmic. The number behind a name is the exponent of the fitted line: 0 "
        "where time does not depend on the axis, 1 where it is in proportion, 2 where it grows with the square. Above "
        "the exponent of the counted work it is a surprise."
    )
    times: list[Column] = [("ms per call", lambda m: words.milliseconds(_seconds(m)))]
    tables = [table("Scaling", [m for sweep in sweeps for m in sweep.rows], times)]
    fitted = [m for m in rows if "exponent" in m.row.extra]
    if fitted:
        tables.insert(0, table("Exponents", fitted, EXPONENTS))
    return Section("scaling", "Scaling", text, rows, figures, tables)


def _two_places(value: object) -> str:
    found = number(value)
    return words.NOT_MEASURED if found is None else f"{found:.2f}"


def _bounds(m: Measured) -> str:
    low, high = (number(m.row.extra.get(end)) for end in ("low", "high"))
    return words.NOT_MEASURED if low is None or high is None else words.interval(low, high)


EXPONENTS: list[Column] = [
    ("exponent", lambda m: _two_places(m.row.extra.get("exponent"))),
    ("two standard errors", _bounds),
    ("of the counted work", lambda m: _two_places(m.row.extra.get("counted"))),
    ("surprise", lambda m: "yes" if m.row.extra.get("surprise") else "no"),
]


def _sweeps(rows: Sequence[Measured]) -> Iterator[Sweep]:
    for (axis, rest, _, _), same in grouped(rows, lambda m: (_axis(m), _rest(m), m.place, m.series)).items():
        if len({_value(m) for m in same}) > 1:
            yield Sweep(axis, rest, sorted(same, key=lambda m: _value(m) or 0.0))


def _axis(m: Measured) -> str:
    return str(m.row.axes.get("axis", ""))


def _rest(m: Measured) -> str:
    return words.axes_text({name: v for name, v in m.row.axes.items() if name not in ("axis", _axis(m))})


def _value(m: Measured) -> float | None:
    return positive(m.row.axes.get(_axis(m)))


def _seconds(m: Measured) -> float:
    return m.row.seconds.median if m.row.seconds else 0.0
