"""The plots of timed cases: speed-up, throughput, latency, share of the peak, roofline; and their errors and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from cflow_fast.bench.report import words
from cflow_fast.bench.report.charts import Axis, Curve, Level, Mark, Span, curve_chart, row_chart
from cflow_fast.bench.report.comparisons import Comparison, comparisons
from cflow_fast.bench.report.data import Measured, grouped, positive
from cflow_fast.bench.report.sections import NAMES, NOTE, Column, Figure, Section, Table, table
from cflow_fast.bench.report.style import PRECISION_DASHES, look
from cflow_fast.bench.report.tables import extra_columns

TIMED = ("decoder", "map", "end-to-end", "training")
"""Benchmarks whose rows are the same work done by several contenders."""


def timed_sections(rows: Sequence[Measured]) -> Iterator[Section]:
    """A section for each kind of plot that there are rows for; rows that may not be compared are not in it."""
    rows = [m for m in rows if m.is_good and m.row.bench in TIMED]
    for make in (_speedup, _throughput, _latency, _share, _roofline, _cost):
        yield from make(rows)


def _speedup(rows: list[Measured]) -> Iterator[Section]:
    found = comparisons(rows)
    if not found:
        return
    figures: list[Figure] = []
    for bench in dict.fromkeys(c.m.row.bench for c in found):
        for against in dict.fromkeys(c.against for c in found if c.m.row.bench == bench):
            same = [c for c in found if (c.m.row.bench, c.against) == (bench, against)]
            figures += _speedup_figures(same, f"{words.bench_title(bench)} against {against}")
    text = (
        "How many times faster than another contender, from rounds in which both were timed one after the other: the "
        "median and its 95% interval. Right of the dashed line is faster."
    )
    head = ("case", "contender", "precision", "device", "against", "speed-up", "95% interval")
    lines = []
    for c in found:
        numbers = (c.ratio.against, words.times(c.ratio.median), words.interval(c.ratio.low, c.ratio.high))
        lines.append((*(show(c.m) for _, show in NAMES), *numbers))
    shown = [c.m for c in found]
    yield Section("speed-up", "Speed-up", text, shown, figures, [Table("Speed-up", head, lines, len(NAMES) + 1)])


def _speedup_figures(found: Sequence[Comparison], title: str) -> Iterator[Figure]:
    """A panel for each case and device, on one axis for all."""
    domain = [value for c in found for value in (c.ratio.low, c.ratio.high)]
    for _, facet, place, panel in _panels(dict.fromkeys(c.m for c in found)):
        groups: dict[str, list[Span]] = {}
        for c in (c for c in found if c.m in panel):
            batch = "" if c.m.batch is None else f"batch {c.m.row.axes['batch']}, "
            groups.setdefault(f"{batch}over {c.ratio.against}", []).append(_speedup_span(c))
        drawing = row_chart(title, list(groups.items()), Axis("times faster"), domain, (1.0, "equally fast"))
        yield Figure(title, facet, place, drawing)


def _speedup_span(c: Comparison) -> Span:
    text, row = words.times(c.ratio.median), c.m.row
    title = f"{row.case}, {c.m.series}: {text} {words.interval(c.ratio.low, c.ratio.high)} over {c.ratio.against}"
    mark = Mark(c.ratio.median, look(row.contender, row.precision), title)
    return Span(c.m.series, text, [mark], interval=(c.ratio.low, c.ratio.high))


def _throughput(rows: list[Measured]) -> Iterator[Section]:
    rows = [m for m in rows if positive(m.row.images_per_second) and m.batch]
    if not rows:
        return
    figures = []
    for kind, title, place, panel in _panels(rows):
        curves = _curves(panel, lambda m: (m.batch or 0.0, m.row.images_per_second or 0.0), "images/s")
        x = Axis("images in a batch", values=tuple(sorted({m.batch for m in panel if m.batch})))
        figures.append(Figure(kind, title, place, curve_chart(title, curves, x, Axis("images/s"))))
    text = "Images per second by batch size; higher is faster. Both axes are logarithmic."
    numbers: list[Column] = [
        ("images/s", lambda m: words.figures(m.row.images_per_second)),
        ("ms per call", lambda m: words.milliseconds(m.row.seconds.median if m.row.seconds else None)),
        ("95% interval", _interval),
        NOTE,
    ]
    yield Section("throughput", "Throughput", text, rows, figures, [table("Throughput", rows, numbers)])


def _latency(rows: list[Measured]) -> Iterator[Section]:
    rows = [m for m in rows if m.row.seconds and positive(m.row.seconds.p50) and positive(m.row.seconds.p99)]
    if not rows:
        return
    figures = []
    for kind, title, place, panel in _panels(rows):
        smallest = min(m.batch or 0.0 for m in panel)  # where waiting matters; at others throughput says the same
        groups = _by_batch([m for m in panel if (m.batch or 0.0) == smallest], _latency_span)
        figures.append(Figure(kind, title, place, row_chart(title, groups, Axis("ms per call, p50 to p99"))))
    text = (
        "Milliseconds per call at the smallest batch: the mark is the median (p50), the line ends at the 99th "
        "percentile (p99). Shorter is faster. The table has every batch."
    )
    numbers: list[Column] = [
        ("p50, ms", lambda m: words.milliseconds(m.row.seconds.p50 if m.row.seconds else None)),
        ("p99, ms", lambda m: words.milliseconds(m.row.seconds.p99 if m.row.seconds else None)),
        ("rounds", lambda m: str(m.row.seconds.rounds) if m.row.seconds else words.NOT_MEASURED),
    ]
    yield Section("latency", "Latency", text, rows, figures, [table("Latency", rows, numbers)])


def _latency_span(m: Measured) -> Span:
    assert m.row.seconds is not None
    p50, p99 = 1e3 * m.row.seconds.p50, 1e3 * m.row.seconds.p99
    title = f"{m.row.case}, {m.series}: p50 {words.figures(p50)} ms, p99 {words.figures(p99)} ms"
    mark = Mark(p50, look(m.row.contender, m.row.precision), title)
    return Span(m.series, f"{words.figures(p50)} / {words.figures(p99)}", [mark], interval=(min(p50, p99), p99))


def _share(rows: list[Measured]) -> Iterator[Section]:
    rows = [m for m in rows if positive(m.row.share_of_peak)]
    if not rows:
        return
    figures = []
    for kind, title, place, panel in _panels(rows):
        groups, axis = _by_batch(panel, _share_span), Axis("share of the measured matrix rate", log=False)
        figures.append(Figure(kind, title, place, row_chart(title, groups, axis, reference=(1.0, "measured peak"))))
    text = (
        "The case's counted work over its time, as a share of the rate that large matrix products reach on the same "
        "device in the same precision. Counted is the work that an exact computation needs at least, for all alike."
    )
    numbers: list[Column] = [
        ("share of peak", lambda m: words.percent(m.row.share_of_peak)),
        ("TFLOP/s", lambda m: words.figures(m.row.tflops)),
        ("peak, TFLOP/s", lambda m: words.figures(_peak(m))),
    ]
    yield Section("share-of-peak", "Share of peak", text, rows, figures, [table("Share of peak", rows, numbers)])


def _share_span(m: Measured) -> Span:
    share = m.row.share_of_peak or 0.0
    mark = Mark(share, look(m.row.contender, m.row.precision))
    text = words.percent(share)
    return Span(m.series, text, [mark], bar=(0.0, share), title=f"{m.row.case}, {m.series}: {text} of the peak")


def _roofline(rows: list[Measured]) -> Iterator[Section]:
    rows = [m for m in rows if positive(m.row.tflops) and positive(intensity(m))]
    if not rows:
        return
    figures = []
    for kind, title, place, panel in _panels(rows):
        curves = _curves(panel, lambda m: (intensity(m) or 0.0, m.row.tflops or 0.0), "TFLOP/s")
        peaks = {m.row.precision: _peak(m) for m in panel}
        levels = [Level(f"{p} peak", peak, PRECISION_DASHES.get(p, "5 5")) for p, peak in peaks.items() if peak]
        axes = Axis("FLOP for each byte of weights"), Axis("TFLOP/s")
        figures.append(Figure(kind, title, place, curve_chart(title, curves, *axes, levels)))
    text = (
        "Work done per second against work done for each byte of stored weights: a call reads its weights at least "
        "once, so that a larger batch lies further right. The lines are the matrix rates measured on the same device."
    )
    numbers: list[Column] = [
        ("FLOP per byte of weights", lambda m: words.figures(intensity(m))),
        ("TFLOP/s", lambda m: words.figures(m.row.tflops)),
        ("peak, TFLOP/s", lambda m: words.figures(_peak(m))),
    ]
    yield Section("roofline", "Roofline", text, rows, figures, [table("Roofline", rows, numbers)])


def _cost(rows: list[Measured]) -> Iterator[Section]:
    columns: list[Column] = [
        ("largest error", lambda m: words.figures(m.row.error_max, 2)),
        ("RMS error", lambda m: words.figures(m.row.error_rms, 2)),
        ("parity", lambda m: "passed" if m.row.parity else words.NOT_MEASURED),
        ("model, MB", lambda m: words.megabytes(m.row.model_bytes)),
        ("peak memory, MB", lambda m: words.megabytes(m.row.peak_memory_bytes)),
        *extra_columns(rows),
    ]
    rows = [m for m in rows if any(show(m) != words.NOT_MEASURED for _, show in columns)]
    if rows:
        text = (
            "The error against float64 is that of log p / D, in nats, or of the anomaly map. A megabyte is a million "
            "bytes; peak memory is what a call needs beside the model and its input. To prepare is to fold or compile, "
            "and to run once."
        )
        yield Section("cost", "Error and memory", text, rows, [], [table("Error and memory", rows, columns)])


def intensity(m: Measured) -> float | None:
    """FLOP of one call for each byte of the model's weights."""
    row = m.row
    if not (row.tflops and row.seconds and row.model_bytes):
        return None
    return 1e12 * row.tflops * row.seconds.median / row.model_bytes


def _panels(rows: Iterable[Measured]) -> Iterator[tuple[str, str, str, list[Measured]]]:
    """(benchmark, case, place, rows) of what one panel may hold: one benchmark, a case but for its batch, a device.

    The same case comes once for every device before the next case.
    """
    for (bench, facet), same in grouped(rows, lambda m: (m.row.bench, m.facet)).items():
        for (place,), panel in grouped(same, lambda m: (m.place,)).items():
            yield words.bench_title(bench), facet, place, panel


def _by_batch(rows: Iterable[Measured], span: Callable[[Measured], Span]) -> list[tuple[str, list[Span]]]:
    groups = grouped(rows, lambda m: ("" if m.batch is None else words.axis_text("batch", m.row.axes["batch"]),))
    return [(title, [span(m) for m in same]) for (title,), same in groups.items()]


def _curves(rows: Iterable[Measured], point: Callable[[Measured], tuple[float, float]], unit: str) -> list[Curve]:
    curves = []
    for (label,), same in grouped(rows, lambda m: (m.series,)).items():
        points = [(*point(m), f"{m.row.case}, {label}: {words.figures(point(m)[1])} {unit}") for m in same]
        curves.append(Curve(label, points, look(same[0].row.contender, same[0].row.precision)))
    return curves


def _peak(m: Measured) -> float | None:
    """TFLOP/s that were measured in the row's precision."""
    peak = positive(m.source.results.peak_flops.get(m.row.precision))
    return peak and peak / 1e12


def _interval(m: Measured) -> str:
    if m.row.seconds is None:
        return words.NOT_MEASURED
    return f"[{words.milliseconds(m.row.seconds.low)}, {words.milliseconds(m.row.seconds.high)}]"
