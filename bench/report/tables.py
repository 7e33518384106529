"""Tables without plots: accuracy, ablation, and what could not be measured or compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cflow_fast.bench import paper
from cflow_fast.bench.report import words
from cflow_fast.bench.report.data import Measured, number
from cflow_fast.bench.report.sections import NOTE, Column, Section, Table, table
from cflow_fast.bench.results import BENCHES

TEXTS = {
    "accuracy": "Detection and localisation on the test images, mean ± deviation over the runs.",
    "ablation": "What each choice of the recipe costs and gives, one changed at a time.",
}


def table_sections(rows: Sequence[Measured]) -> Iterator[Section]:
    """Accuracy, ablation, and what this version does not know: every number that was stored, one line a row."""
    unknown = dict.fromkeys(m.row.bench for m in rows if m.row.bench not in BENCHES)
    texts = TEXTS | dict.fromkeys(unknown, "A benchmark that this version does not know.")
    for number_of_table, (bench, text) in enumerate(texts.items()):
        own = [m for m in rows if m.is_good and m.row.bench == bench]
        if own:
            title, columns = words.bench_title(bench), [*extra_columns(own), *MEASURED]
            columns[len(METRICS) : len(METRICS)] = map(_published, METRICS) if bench == "accuracy" else []
            anchor = bench if bench in TEXTS else f"table-{number_of_table}"
            about = f"{text} {_about_the_paper(own)}" if bench == "accuracy" else text
            yield Section(anchor, title, about, own, [], [table(title, own, columns)])


def problem_section(rows: Sequence[Measured]) -> Section | None:
    """What is in no plot, and why."""
    bad = [m for m in rows if not m.is_good]
    if not bad:
        return None
    head = ("case", "contender", "precision", "device", "status", "reason")
    lines: list[tuple[str, ...]] = [
        (
            f"{words.bench_title(m.row.bench)}: {m.row.case}",
            m.row.contender,
            m.row.precision,
            m.place,
            _status(m),
            _why(m),
        )
        for m in bad
    ]
    text = "These are in no plot and in no comparison."
    return Section("not-compared", "Not compared", text, bad, [], [Table("Not compared", head, lines, len(head))])


def _status(m: Measured) -> str:
    return "parity failed" if m.row.status == "ok" else m.row.status


def _why(m: Measured) -> str:
    if m.row.note:
        return m.row.note
    if m.row.error_max is not None:
        return f"largest error of log p / D {words.figures(m.row.error_max, 2)} against float64"
    return "no reason given"


MEASURED: list[Column] = [
    ("images/s", lambda m: words.figures(m.row.images_per_second)),
    ("ms per call", lambda m: words.milliseconds(m.row.seconds.median if m.row.seconds else None)),
    ("model, MB", lambda m: words.megabytes(m.row.model_bytes)),
    ("peak memory, MB", lambda m: words.megabytes(m.row.peak_memory_bytes)),
    NOTE,
]


DEVIATION = "_deviation"


def _published(metric: str) -> Column:
    """The paper's figure of the row's category, method and encoder (Table 3), as a fraction."""

    def show(m: Measured) -> str:
        category = paper.TABLE_3.get(str(m.row.axes.get("category")))
        figures = category.figures(m.row.contender, str(m.row.axes.get("encoder"))) if category else None
        percent = getattr(figures, metric) if figures else None
        return paper.MISSING if percent is None else f"{percent / 100:.4f}"

    return f"paper {_title(metric)}", show


def _about_the_paper(rows: Sequence[Measured]) -> str:
    """As the command says it below its table."""
    conditions = paper.conditions(str(m.row.axes.get("category")) for m in rows)
    return f"{paper.BEST_EPOCH} {conditions[0].upper()}{conditions[1:]}."


METRICS = ("image_auroc", "pixel_auroc", "aupro")


def extra_columns(rows: Sequence[Measured]) -> list[Column]:
    """Whatever a benchmark stored beside the fields that all rows have, metrics first."""
    found = dict.fromkeys(name for m in rows for name in _flat(m.row.extra))
    first = [name for name in map(_title, METRICS) if name in found]
    names = [*first, *(name for name in found if name not in first)]
    return [(name, lambda m, name=name: _flat(m.row.extra).get(name, words.NOT_MEASURED)) for name in names]  # type: ignore[misc]


def _flat(extra: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b_c": 0.98}} is {"a b c": "0.980"}; a list's items stand side by side, a deviation behind its mean."""
    found: dict[str, str] = {}
    for key, value in extra.items():
        if key == "speedups":  # they have a section of their own
            continue
        name = _title(f"{prefix}{key}")
        if key.endswith(DEVIATION) and key.removesuffix(DEVIATION) in extra:
            continue
        deviation = number(extra.get(f"{key}{DEVIATION}"))
        if deviation is not None and number(value) is not None:
            found[name] = f"{value:.4f} ± {deviation:.4f}" if abs(value) <= 1 else f"{value:.4g} ± {deviation:.2g}"
        elif isinstance(value, dict):
            found |= _flat(value, f"{name} ")
        else:
            items = value if isinstance(value, list) else [value]
            found[name] = ", ".join(_cell(item) for item in items) or words.NOT_MEASURED
    return found


def _title(key: str) -> str:
    """image_auroc is image AUROC."""
    parts = key.replace("_", " ").split(" ")
    return " ".join(part.upper() if part in ("auroc", "aupro", "gflop") else part for part in parts)


def _cell(value: Any) -> str:
    if value is None:
        return words.NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    found = number(value)
    if found is None:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else words.figures(found)
