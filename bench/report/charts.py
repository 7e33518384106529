"""The page's two kinds of chart: curves over an axis, and marks, intervals or bars in labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cflow_fast.bench.report import svg
from cflow_fast.bench.report.svg import FONT, Scale

WIDTH = 344.0
LABEL_STEP = 14.0
ROW_STEP, HEADER_STEP = 19.0, 21.0


@dataclass(frozen=True)
class Look:
    """How a series is told from the others, by colour and by shape."""

    colour: str  # a class of the style sheet
    mark: str = "circle"
    dash: str = ""
    hollow: bool = False

    @property
    def kind(self) -> str:
        return f"{self.colour} hollow" if self.hollow else self.colour


@dataclass(frozen=True)
class Curve:
    """A series over the axis; `points` are (x, y, text on hovering)."""

    name: str
    points: list[tuple[float, float, str]]
    look: Look
    is_joined: bool = True


@dataclass(frozen=True)
class Level:
    """A horizontal line that curves are judged by."""

    name: str
    value: float
    dash: str = ""


@dataclass(frozen=True)
class Mark:
    value: float
    look: Look
    title: str = ""


@dataclass(frozen=True)
class Span:
    """A labelled row: marks (at least one), an interval around them or a bar instead, and its text."""

    label: str
    text: str
    marks: list[Mark]
    interval: tuple[float, float] | None = None
    bar: tuple[float, float] | None = None
    title: str = ""


@dataclass(frozen=True)
class Axis:
    """`label` says the quantity and its unit; `values` are the ticks where not every round value makes sense."""

    label: str
    log: bool = True
    values: tuple[float, ...] = ()


def curve_chart(title: str, curves: Sequence[Curve], x: Axis, y: Axis, levels: Sequence[Level] = ()) -> str:
    """Curves with their names at their right ends, in the order of their last values."""
    curves = [replace(curve, points=sorted(curve.points)) for curve in curves if curve.points]
    names = [*(curve.name for curve in curves), *(level.name for level in levels)]
    reach = min(max(map(svg.text_width, names)), 0.48 * WIDTH)
    top, bottom = 26.0, 26.0 + max(170.0, LABEL_STEP * (len(names) + 1))
    heights = [p[1] for curve in curves for p in curve.points] + [level.value for level in levels]
    y_scale = svg.covering(heights, bottom, top, y.log)
    y_ticks = y_scale.ticks(is_vertical=True)
    left = 8 + max(svg.text_width(svg.short(value)) for value in y_ticks)
    right = WIDTH - reach - 24
    x_scale = svg.covering([p[0] for curve in curves for p in curve.points], left, right, x.log)
    x_ticks = x_scale.thinned(x.values) if x.values else x_scale.ticks()
    parts = [svg.text(0, 11, y.label, "axis"), svg.text((left + right) / 2, bottom + 34, x.label, "axis", "middle")]
    for value in y_ticks:
        parts.append(svg.line(left, y_scale(value), right, y_scale(value), "grid"))
        parts.append(svg.text(left - 6, y_scale(value) + 0.35 * FONT, svg.short(value), "tick", "end"))
    for value in x_ticks:
        parts.append(svg.line(x_scale(value), bottom, x_scale(value), bottom + 4, "rule"))
        parts.append(svg.text(x_scale(value), bottom + 17, svg.short(value), "tick", "middle"))
    parts.append(svg.line(left, bottom, right, bottom, "rule"))
    ends: list[tuple[float, float, str, Look | None]] = []
    for level in levels:
        place = y_scale(level.value)
        parts.append(svg.polyline([(left, place), (right, place)], "peak", level.dash))
        ends.append((right, place, level.name, None))
    for curve in curves:
        places = [(x_scale(a), y_scale(b)) for a, b, _ in curve.points]
        if curve.is_joined and len(places) > 1:
            parts.append(svg.polyline(places, f"curve {curve.look.colour}", curve.look.dash))
        ends.append((*places[-1], curve.name, curve.look))
    for curve in curves:  # above every line
        for a, b, hover in curve.points:
            parts.append(svg.mark(x_scale(a), y_scale(b), curve.look.mark, curve.look.kind, hover))
    parts += _end_labels(ends, right, reach, top, bottom)
    return svg.drawing(WIDTH, bottom + 40, title, parts)


def _end_labels(
    ends: Sequence[tuple[float, float, str, Look | None]], right: float, reach: float, top: float, bottom: float
) -> list[str]:
    """The names beside the plot, moved apart where they would overlap, each joined to its curve's end."""
    ends = sorted(ends, key=lambda end: end[1])
    places = spread([end[1] for end in ends], LABEL_STEP, top, bottom)
    parts = []
    for (x, y, name, look), place in zip(ends, places, strict=True):
        start = x + (6 if look else 0)
        parts.append(svg.polyline([(start, y), (right + 2, y), (right + 10, place), (right + 13, place)], "leader"))
        if look:
            parts.append(svg.mark(right + 17, place, look.mark, look.kind, size=3.2))
        shown = svg.fitted(name, reach + 3)
        parts.append(
            svg.text(right + 24 if look else right + 15, place + 0.35 * FONT, shown, "label" if look else "tick")
        )
    return parts


def spread(places: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Ascending places moved apart to at least `step`, within low and high while there is room, moved little."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + step) if moved else max(place, low))
    ceiling = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - step
    return moved


def row_chart(
    title: str,
    groups: Sequence[tuple[str, Sequence[Span]]],
    axis: Axis,
    domain: Sequence[float] = (),
    reference: tuple[float, str] | None = None,
) -> str:
    """Rows under headings, all on one axis that holds `domain` too; a reference is a vertical line with its name."""
    spans = [span for _, rows in groups for span in rows]
    left = 8 + min(max(svg.text_width(span.label) for span in spans), 0.4 * WIDTH)
    right = WIDTH - 8 - max(svg.text_width(span.text) for span in spans)
    values = [*domain, *(value for span in spans for value in span_values(span))]
    scale = svg.covering(values + ([reference[0]] if reference else []), left + 5, right - 5, axis.log)
    top = 18.0 if reference else 4.0
    bottom = top + ROW_STEP * len(spans) + HEADER_STEP * sum(bool(name) for name, _ in groups) + 2
    parts = []
    for value in scale.ticks():
        parts.append(svg.line(scale(value), top, scale(value), bottom, "grid"))
        parts.append(svg.text(scale(value), bottom + 14, svg.short(value), "tick", "middle"))
    parts.append(svg.text((left + right) / 2, bottom + 31, axis.label, "axis", "middle"))
    if reference:
        place = scale(reference[0])
        anchor = "middle" if left + 40 < place < WIDTH - 60 else "start" if place <= left + 40 else "end"
        parts.append(svg.line(place, top - 4, place, bottom, "level"))
        parts.append(svg.text(place, top - 7, reference[1], "tick", anchor))
    y = top
    for name, rows in groups:
        if name:
            y += HEADER_STEP
            parts.append(svg.text(0, y - 4, svg.fitted(name, WIDTH), "heading"))
        for span in rows:
            parts += _span(span, scale, y + ROW_STEP / 2, left, right)
            y += ROW_STEP
    return svg.drawing(WIDTH, bottom + 37, title, parts)


def span_values(span: Span) -> list[float]:
    return [*(mark.value for mark in span.marks), *(span.interval or ()), *(span.bar or ())]


def _span(span: Span, scale: Scale, y: float, left: float, right: float) -> list[str]:
    parts = [svg.text(left - 8, y + 0.35 * FONT, svg.fitted(span.label, left - 6), "label", "end")]
    look = span.marks[0].look
    if span.bar:
        start, end = scale(span.bar[0]), scale(span.bar[1])
        parts.append(svg.rectangle(start, y - 6, end - start, 12, f"fill {look.kind}", span.title))
    if span.interval:
        low, high = (scale(value) for value in span.interval)
        parts.append(svg.line(low, y, high, y, f"whisker {look.colour}"))
        parts += [svg.line(x, y - 4, x, y + 4, f"whisker {look.colour}") for x in (low, high)]
    for one in span.marks if not span.bar else []:
        parts.append(svg.mark(scale(one.value), y, one.look.mark, one.look.kind, one.title or span.title))
    parts.append(svg.text(right + 8, y + 0.35 * FONT, span.text, "value"))
    return parts
