"""What methods cost: images a second and sizes beside the paper's figures (Table 6), and formulas (Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cflow_fast.bench import paper
from cflow_fast.bench.report import words
from cflow_fast.bench.report.charts import Axis, Look, Mark, Span, row_chart
from cflow_fast.bench.report.data import Measured, grouped, number, positive
from cflow_fast.bench.report.sections import NAMES, NOTE, Column, Figure, Section, table
from cflow_fast.bench.report.style import look
from cflow_fast.bench.report.tables import extra_columns

PAPER = Look("paper", "diamond", hollow=True)
"""The paper's figures: on other hardware, so with a mark of their own."""


def complexity_sections(rows: Sequence[Measured]) -> Iterator[Section]:
    """Speed and size against the paper's, and the table of formulas, each where there are rows for it."""
    rows = [m for m in rows if m.row.bench == "complexity"]
    yield from _speed([m for m in rows if "paper_fps" in m.row.extra])
    yield from _size([m for m in rows if m.is_good and positive(_megabytes(m))])
    costs = [m for m in rows if m.row.extra.get("table") == 1 and m.is_good]
    if costs:
        columns = extra_columns(costs)
        formulas = [column for column in columns if column[0] in ("train", "test", "memory")]
        numbers: list[Column] = [column for column in columns if "GFLOP" in column[0]]
        numbers.append(("model, MB", lambda m: words.megabytes(m.row.model_bytes)))
        text = "Training, testing and memory as formulas of the algorithms, and counted for one encoder (Table 1)."
        yield Section(
            "cost-formulas", "Cost", text, costs, [], [table("Cost", costs, numbers, (*NAMES[:2], *formulas))]
        )


def _speed(rows: list[Measured]) -> Iterator[Section]:
    shown = [m for m in rows if (m.is_good and positive(m.row.images_per_second)) or _paper(m, "paper_fps")]
    if not any(m.is_good for m in shown):
        return
    figures = [
        _figure(panel, place, "images/s", "paper_fps", lambda m: m.row.images_per_second)
        for (_, place), panel in grouped(shown, lambda m: (m.facet, m.place)).items()
    ]
    text = (
        "Images per second from image to anomaly map, and of the encoder alone. The open diamond is the paper's figure "
        "(Table 6). What it was measured on is not known to us, so that its distance from ours is no speed-up; the "
        "paper's time includes the data loader and leaves out the anomaly map."
    )
    columns: list[Column] = [
        ("images/s", lambda m: words.figures(m.row.images_per_second)),
        ("ms per call", lambda m: words.milliseconds(m.row.seconds.median if m.row.seconds else None)),
        ("paper, images/s", lambda m: _shown(_paper(m, "paper_fps"))),
        ("model, MB", lambda m: words.megabytes(m.row.model_bytes)),
        NOTE,
    ]
    yield Section("paper-speed", "Speed beside the paper's", text, shown, figures, [table("Speed", shown, columns)])


def _size(rows: list[Measured]) -> Iterator[Section]:
    if not rows:
        return
    figures = [
        _figure(panel, "counted, on no device", "MB", "paper_megabytes", _megabytes)
        for panel in grouped(rows, lambda m: (m.facet,)).values()
    ]
    columns: list[Column] = [
        ("counted, MB", lambda m: words.figures(_megabytes(m), 4)),
        ("with the encoder, MB", lambda m: words.figures(number(m.row.extra.get("megabytes_with_encoder")), 4)),
        ("paper, MB", lambda m: _shown(_paper(m, "paper_megabytes"))),
    ]
    text = "What a model stores, counted, in units of 10^6 bytes. The open diamond is the paper's figure (Table 6)."
    yield Section(
        "paper-size", "Size beside the paper's", text, rows, figures, [table("Size", rows, columns, NAMES[:2])]
    )


def _figure(
    rows: Sequence[Measured],
    place: str,
    unit: str,
    key: str,
    ours: Callable[[Measured], float | None],
) -> Figure:
    groups: dict[str, list[Span]] = {}
    for m in rows:
        own, published = positive(ours(m)) if m.is_good else None, _paper(m, key)
        marks = [Mark(published, PAPER, f"the paper: {words.figures(published)} {unit}")] if published else []
        marks += [Mark(own, look(m.row.contender, m.row.precision), f"{words.figures(own)} {unit}")] if own else []
        text = words.figures(own) + (f" ({words.figures(published)})" if published else "")
        if marks:
            groups.setdefault(_variant(m), []).append(Span(m.series, text, marks, title=m.row.case))
    title, axis = rows[0].facet, Axis(f"{unit}; open diamond, (): the paper's")
    return Figure("", title, place, row_chart(title, list(groups.items()), axis))


def _variant(m: Measured) -> str:
    """What a size's case says behind its colon: it tells rows of one contender apart."""
    return m.row.case.split(": ", 1)[-1] if m.row.seconds is None and m.is_good else ""


def _megabytes(m: Measured) -> float | None:
    return number(m.row.extra.get("megabytes"))


def _paper(m: Measured, key: str) -> float | None:
    return positive(m.row.extra.get(key))


def _shown(published: float | None) -> str:
    return paper.MISSING if published is None else words.figures(published)
