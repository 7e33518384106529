"""The README's figure: how many times faster than FrEIA, by device, permutations, batch and precision."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullFormatter, NullLocator

from cflow_fast.bench.report import svg, words
from cflow_fast.bench.report.comparisons import OURS
from cflow_fast.bench.report.data import Measured, Source, grouped, measured, positive
from cflow_fast.bench.report.style import LIGHT
from cflow_fast.errors import CFlowFastError
from cflow_fast.files import atomic_path

AGAINST = "freia"
LINE = 0.17
"""Inches that a precision of a case takes."""

INK, FAINT, GRID = "#1d2126", "#5b6570", "#e3e5e8"
PRECISION_MARKS = {"fp32": "o", "tf32": "s", "tf32x3": "D", "bf16": "^", "fp16": "v", "fp16x3": "P"}
PRECISION_COLOURS = dict(zip(PRECISION_MARKS, LIGHT, strict=False))


def throughput_figure(sources: Sequence[Source], path: Path) -> Path:
    """Write a PNG with a panel for each device, and below it the machine and the command; returns its path.

    Only decoders that passed parity. Raises CFlowFastError when no result compares them with FrEIA.
    """
    rows = [m for m in measured(sources)[0] if _is_shown(m)]
    if not rows:
        raise CFlowFastError(f"no result compares {OURS}'s decoders with {AGAINST}: nothing to draw")
    panels = grouped(rows, lambda m: (m.place,))
    counts = [len(panel) + len(_cases(panel)) for panel in panels.values()]
    caption = _caption(rows)
    height = 0.5 + sum(0.3 + LINE * count for count in counts) + 0.16 * len(caption)
    canvas = Canvas(figsize=(7.6, height), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axis, ((place,), panel) in zip(axes, panels.items(), strict=True):
        _draw(axis, place, panel)
    _label_times(axes[-1], rows)
    canvas.supxlabel("\n".join(caption), x=0.01, ha="left", fontsize=7, color=FAINT)
    with atomic_path(path) as temporary:
        canvas.savefig(temporary, format="png", metadata={"Description": "\n".join(caption)})
    return path


def _is_shown(m: Measured) -> bool:
    row = m.row
    return bool(
        row.bench == "decoder"
        and row.contender == OURS
        and m.is_good
        and row.parity
        and row.speedup
        and row.speedup.against.split()[0] == AGAINST
        and all(map(positive, (row.speedup.low, row.speedup.median, row.speedup.high)))
    )


def _cases(rows: Sequence[Measured]) -> dict[tuple[str, ...], list[Measured]]:
    return grouped(rows, lambda m: (m.row.case,))


def _draw(axis: Axes, place: str, rows: Sequence[Measured]) -> None:
    y, labels = 0.0, {}
    for (case,), same in _cases(rows).items():
        labels[y + (len(same) - 1) / 2] = case
        for m in same:
            ratio = m.row.speedup
            assert ratio is not None
            colour, shape = PRECISION_COLOURS.get(m.row.precision, FAINT), PRECISION_MARKS.get(m.row.precision, "P")
            ends = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axis.errorbar(ratio.median, y, xerr=ends, color=colour, marker=shape, ms=5, lw=1.4, capsize=2.5)
            label = f"{words.times(ratio.median)} {m.row.precision}"
            axis.annotate(
                label, (ratio.high, y), (6, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK
            )
            y += 1
        y += 1
    axis.axvline(1.0, color=INK, lw=1, ls="--")
    axis.set_title(place, loc="left", fontsize=9, color=INK, fontweight="bold")
    axis.set_yticks(list(labels), list(labels.values()), fontsize=8, color=INK)
    axis.set_ylim(y - 1.2, -0.8)
    axis.tick_params(length=0)
    axis.grid(axis="x", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)


def _label_times(axis: Axes, rows: Sequence[Measured]) -> None:
    ends = [value for m in rows if m.row.speedup for value in (m.row.speedup.low, m.row.speedup.high)]
    low, high = min([0.9, *ends]), max([1.5, *ends])
    scale = svg.Scale(low / 1.05, high * (high / low) ** 0.2, 0.0, 330.0, log=True)  # room for the last label
    axis.set_xscale("log")
    axis.set_xlim(scale.low, scale.high)
    ticks = scale.ticks()
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(ticks, [svg.short(tick) for tick in ticks], fontsize=8, color=FAINT)
    precisions = {m.row.speedup.against.partition(" ")[2] for m in rows if m.row.speedup} - {""}
    of = f" in {', '.join(sorted(precisions))}" if precisions else ""
    axis.set_xlabel(f"times as fast as FrEIA{of}", fontsize=8, color=FAINT)


def _caption(rows: Sequence[Measured]) -> list[str]:
    lines = ["Median and 95% interval, both timed in turns in one run; every result within its bound of float64."]
    for same in grouped(rows, lambda m: (str(id(m.source)),)).values():
        results = same[0].source.results
        torch = f"torch {results.versions['torch']}, " if "torch" in results.versions else ""
        lines += textwrap.wrap(f"{same[0].place}, {torch}{results.created[:10]}: {results.command}", 130)
    return lines
