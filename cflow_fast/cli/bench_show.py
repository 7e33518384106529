"""The timed benchmarks' rows as tables for a terminal, and what changed in any rows since an older file.

What was not measured is a dash, explained below the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cflow_fast.bench.accuracy import METRICS
from cflow_fast.bench.measurement import FEWEST_ROUNDS
from cflow_fast.bench.results import Change, Results, Row, Speedup, Summary
from cflow_fast.cli.common import console

MISSING = "-"
CHANGE = "change since the older file"
LEGEND = (
    "TFLOP/s: the work left after folding over the time. peak MB: what a call needs beyond the models. "
    f"Errors: of log p / D (a map's: of the map) against float64. {MISSING}: not measured."
)
WIDTH = 118
"""Numbers are never cut off: a narrower terminal wraps lines itself."""


def show(results: Results) -> None:
    """Print what was measured, each benchmark in its own form, and on what."""
    timed: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.bench not in ("stages", "scaling"):
            timed.setdefault(row.case, []).append(row)
    for case, rows in timed.items():
        print_wide(_time_table(case, rows))
        print_wide(_cost_table([row for row in rows if row.seconds]))
    for table in (
        _stage_table([row for row in results.rows if row.bench == "stages"]),
        _point_table([row for row in results.rows if row.bench == "scaling" and "exponent" not in row.extra]),
        _exponent_table([row for row in results.rows if "exponent" in row.extra]),
    ):
        if table.row_count:
            print_wide(table)
    if timed:
        console.print(LEGEND, markup=False, soft_wrap=True)
    for note in _notes(results.rows):
        console.print(note, markup=False, soft_wrap=True)
    console.print(_machine(results), markup=False, soft_wrap=True)


def _notes(rows: Iterable[Row]) -> list[str]:
    """Each once: a contender's own under its name, what went wrong under its precision too."""
    noted = [row for row in rows if row.note]
    own = [f"{row.contender}: {row.note}" for row in noted if row.status == "ok"]
    wrong = [f"{_name(row)}: {row.status}: {row.note}" for row in noted if row.status != "ok"]
    return list(dict.fromkeys([*own, *wrong]))


def print_wide(table: Table) -> None:
    Console(width=max(console.width, WIDTH), highlight=False).print(table)


def _time_table(case: str, rows: Sequence[Row]) -> Table:
    table = _table(case, "ms, median [95%]", "p99", "images/s", "speed-up [95%]", "over")
    for row in rows:
        ratio, seconds = row.speedup, row.seconds
        table.add_row(
            _name(row),
            MISSING if seconds is None else _with_interval(seconds, seconds.rounds, _ms),
            MISSING if seconds is None else _ms(seconds.p99),
            _shown(row.images_per_second, _significant),
            _with_interval(ratio, seconds.rounds, "{:.2f}".format) if ratio and seconds else _reason(row),
            ratio.against if ratio else "",
        )
    return table


def _cost_table(rows: Sequence[Row]) -> Table:
    headings = ("TFLOP/s", "of peak", "peak MB", "model MB", "max error", "RMS error")
    table = _table("", *headings)
    for row in rows:
        table.add_row(
            _name(row),
            _shown(row.tflops, _significant),
            _shown(row.share_of_peak, lambda share: f"{share:.0%}"),
            _shown(row.peak_memory_bytes, _megabytes),
            _shown(row.model_bytes, _megabytes),
            _shown(row.error_max, lambda error: f"{error:.1e}"),
            _shown(row.error_rms, lambda error: f"{error:.1e}"),
        )
    return table


def _stage_table(rows: Sequence[Row]) -> Table:
    title = f"{rows[0].case.rpartition(':')[0]}, decoders in {rows[0].precision}" if rows else ""
    table = _table(title, "ms an image", "share", first="stage")
    for row in rows:
        share = f"{row.extra['share']:.1%}"
        table.add_row(str(row.axes["stage"]), f"{row.extra['milliseconds_per_image']:.3f}", share)
    if rows:
        total = next((row for row in rows if row.axes["stage"] == "total"), rows[-1])
        parts = sum(row.extra["share"] for row in rows if row is not total)
        uncut = total.extra.get("uncut_milliseconds_per_image")
        beside = "" if uncut is None else f"; not cut into stages, predict takes {uncut:.1f} ms an image"
        table.caption = f"the stages add up to {parts:.1%}{beside}"
    return table


def _point_table(rows: Sequence[Row]) -> Table:
    table = _table("points", "ms, median [95%]", "of peak", "max error", "", first="case")
    for row in rows:
        seconds = row.seconds
        table.add_row(
            _case(row),
            MISSING if seconds is None else _with_interval(seconds, seconds.rounds, _ms),
            _shown(row.share_of_peak, lambda share: f"{share:.0%}"),
            _shown(row.error_max, lambda error: f"{error:.1e}"),
            _reason(row),
        )
    return table


def _exponent_table(rows: Sequence[Row]) -> Table:
    table = _table("seconds = c x^e", "e [95%]", "counted", "from point to point", "", first="case")
    for row in rows:
        extra = row.extra
        table.add_row(
            _case(row),
            f"{extra['exponent']:.2f} [{extra['low']:.2f}, {extra['high']:.2f}]",
            f"{extra['counted']:.2f}",
            ", ".join(f"{step[2]:.2f}" for step in extra["steps"]),
            "surprise" if extra["surprise"] else "",
        )
    return table


def comparison_table(changes: Iterable[Change], old: Results) -> Table:
    """Time and speed-up of the rows that both files have, newer over older."""
    table = _table(CHANGE, "ms, old", "ms, new", "time, new / old", "speed-up, new / old", first="case")
    for change in changes:
        times = [MISSING if row.seconds is None else _ms(row.seconds.median) for row in (change.old, change.new)]
        table.add_row(
            _case(change.new),
            *times,
            _ratio(change.time_ratio),
            _ratio(change.speedup_ratio),
        )
    return _since(old, table)


def metric_changes(changes: Iterable[Change], old: Results) -> Table:
    """Metrics in percent, with what the newer has more; times newer over older."""
    table = _table(CHANGE, *METRICS.values(), "fit time, new / old", "images/s, new / old", first="case")
    for change in changes:
        table.add_row(
            _case(change.new),
            *(_metric_change(change, name) for name in METRICS),
            _ratio(change.ratio(lambda row: row.number("fit_seconds"))),
            _ratio(change.ratio(lambda row: row.images_per_second)),
        )
    return _since(old, table, old.command)  # which says the recipe, as no row does


def _metric_change(change: Change, name: str) -> str:
    old, new = change.old.number(name), change.new.number(name)
    if new is None:
        return MISSING
    return f"{100 * new:.2f}" + ("" if old is None else f" ({100 * (new - old):+.2f})")


def size_changes(changes: Iterable[Change], old: Results) -> Table:
    table = _table(CHANGE, "MB, old", "MB, new", "size, new / old", first="case")
    for change in changes:
        sizes = (_shown(row.model_bytes, _megabytes) for row in (change.old, change.new))
        table.add_row(_case(change.new), *sizes, _ratio(change.ratio(lambda row: row.model_bytes)))
    return _since(old, table)


def _since(old: Results, table: Table, *facts: str) -> Table:
    if not table.row_count:
        table.add_row("no measurement is in both files")
    ended = ["interrupted before its end"] if old.interrupted else []
    table.caption = Text(", ".join([f"older: {old.created}", *ended, f"commit {old.commit[:12]}", *facts]))
    return table


def _ratio(value: float | None) -> str:
    return _shown(value, "{:.2f}".format)


def _table(title: str, *numbers: str, first: str = "contender") -> Table:
    table = Table(title=Text(title), box=SIMPLE, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left")
    table.add_column(first, no_wrap=first != "case", overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _case(row: Row) -> Text:
    return Text(f"{row.case}: {_name(row)}")


def _name(row: Row) -> str:
    return f"{row.contender} {row.precision}"


def _reason(row: Row) -> str:
    return "" if row.status == "ok" else row.status


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return MISSING if value is None else form(value)


def _with_interval(value: Summary | Speedup, rounds: int, form: Callable[[float], str]) -> str:
    """Too few rounds, as after an interruption, give no 95% interval."""
    known = f"{form(value.low)}, {form(value.high)}" if rounds >= FEWEST_ROUNDS else f"{rounds} round(s)"
    return f"{form(value.median)} [{known}]"


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}"


def _machine(results: Results) -> str:
    machine = results.machine
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    able = f"capability {machine['capability']}" if "capability" in machine else ", ".join(machine["features"])
    rates = ", ".join(f"{precision} {rate / 1e12:.3g} TFLOP/s" for precision, rate in results.peak_flops.items())
    known = f"; matrix rate {rates}" if rates else ""
    return f"{name} ({able}){known}; torch {results.versions['torch']}, seed {results.seed}"
