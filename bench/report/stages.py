"""Where the time of `predict` goes: a stage begins where the one before it ends, so that they add up to the whole."""

from __future__ import annotations

from collections.abc import Sequence

from cflow_fast.bench.report import words
from cflow_fast.bench.report.charts import Axis, Look, Mark, Span, row_chart
from cflow_fast.bench.report.data import Measured, grouped, number
from cflow_fast.bench.report.sections import NAMES, Figure, Section, table
from cflow_fast.bench.report.style import look
from cflow_fast.bench.stages import TOTAL

WHOLE = Look("paper")
"""The whole, in the ink of the text."""


def stage_section(rows: Sequence[Measured]) -> Section | None:
    """A plot for each model and device whose stages were timed."""
    rows = [m for m in rows if m.is_good and m.row.bench == "stages" and m.row.seconds and "stage" in m.row.axes]
    if not rows:
        return None
    figures = []
    for (setting, place, series), same in grouped(rows, lambda m: (_setting(m), m.place, m.series)).items():
        title = f"{setting}, {series}"
        figures.append(Figure("", title, place, row_chart(title, [_cascade(same)], Axis("ms an image", log=False))))
    text = "Milliseconds an image of the stages of predict, from file to results: medians over passes through a folder."
    columns = [
        ("ms an image", lambda m: words.figures(_milliseconds(m))),
        ("share", lambda m: words.percent(number(m.row.extra.get("share")))),
        ("ms in all", lambda m: words.milliseconds(m.row.seconds.median if m.row.seconds else None)),
        ("images/s", lambda m: words.figures(m.row.images_per_second) if m.row.images_per_second else ""),
    ]
    return Section("stages", "Where the time goes", text, rows, figures, [table("Stages", rows, columns, NAMES)])


def _cascade(rows: Sequence[Measured]) -> tuple[str, list[Span]]:
    """What the stages add up to, and their spans one after the other, the whole below them."""
    end, spans, whole = 0.0, [], None
    for m in rows:
        stage, taken = str(m.row.axes["stage"]), _milliseconds(m)
        text = words.figures(taken)
        title = f"{m.row.case}: {text} ms"
        if stage == TOTAL:
            whole = taken
            last = Span(stage, text, [Mark(taken, WHOLE)], bar=(0.0, taken), title=title)
        else:
            mark = Mark(end + taken, look(m.row.contender))
            spans.append(Span(stage, text, [mark], bar=(end, end + taken), title=title))
            end += taken
    if whole is None:
        return "", spans
    return f"the stages add up to {words.percent(end / whole)} of the total", [*spans, last]


def _milliseconds(m: Measured) -> float:
    """Of an image; of the whole pass where the number of images is not known."""
    per_image = number(m.row.extra.get("milliseconds_per_image"))
    return per_image if per_image is not None else 1e3 * (m.row.seconds.median if m.row.seconds else 0.0)


def _setting(m: Measured) -> str:
    return words.axes_text({name: value for name, value in m.row.axes.items() if name != "stage"})
