"""The report: one HTML file with its drawings inside, for a browser, a phone or paper; no network, no script."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from cflow_fast.bench.report import words
from cflow_fast.bench.report.complexity import complexity_sections
from cflow_fast.bench.report.data import Measured, Source, grouped, measured, positive
from cflow_fast.bench.report.headline import Claim, claims, fastest_section, headline, spread
from cflow_fast.bench.report.plots import timed_sections
from cflow_fast.bench.report.scaling import scaling_section
from cflow_fast.bench.report.sections import Figure, Section, Table
from cflow_fast.bench.report.stages import stage_section
from cflow_fast.bench.report.style import STYLE
from cflow_fast.bench.report.tables import problem_section, table_sections
from cflow_fast.files import write_text

LONG, MANY = 12, 12
"""Tables with more lines, and plots beyond that number, are folded away until they are asked for."""


def write_report(path: str | os.PathLike[str], sources: Sequence[Source]) -> None:
    """Write the page atomically. Raises CFlowFastError when the place cannot be written."""
    write_text(path, report(sources))


def report(sources: Sequence[Source]) -> str:
    """The page's HTML: the headline, a section for each kind of plot that there are rows for, machines and commands."""
    rows, superseded = measured(sources)
    found = claims(rows)
    made = [fastest_section(rows), *timed_sections(rows), stage_section(rows)]
    made += [scaling_section(rows), *complexity_sections(rows), *table_sections(rows), problem_section(rows)]
    sections = [section for section in made if section]
    title = headline(found)
    links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(_section(section) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_lead(found)}
<nav aria-label="sections"><ul>{links}<li><a href="#machines">Machines and commands</a></li></ul></nav>
</header>
<main>
{body}
{_machines(sources, superseded)}
</main>
</body>
</html>
"""


def _lead(found: Sequence[Claim]) -> str:
    if not found:
        return "<p>No speed-up was measured between contenders that agree with float64.</p>"
    parts = []
    for bench, place in dict.fromkeys((claim.bench, claim.place) for claim in found):
        tiles = "".join(_claim(claim) for claim in found if (claim.bench, claim.place) == (bench, place))
        parts.append(f'<h2>{escape(words.bench_title(bench))}, {escape(place)}</h2><ul class="claims">{tiles}</ul>')
    text = "Medians, from the smallest to the largest over the cases; below with their 95% intervals."
    return f"<p>{text}</p>{''.join(parts)}"


def _claim(claim: Claim) -> str:
    lines = [
        f"<li><b>{escape(spread(same))}</b> {escape(precisions)}</li>"
        for precisions, same in claim.by_precision.items()
    ]
    count = _count(len({c.m.row.case for c in claim.found}), "case")
    return f"<li><h3>as fast as {escape(claim.against)}</h3><ul>{''.join(lines)}</ul><p>{count}</p></li>"


def _section(section: Section) -> str:
    parts = [
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>',
        f"<p>{escape(section.text)}</p>" if section.text else "",
        _figures(section.figures),
        *(_table(table) for table in section.tables),
        _sources(section.rows),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _figures(figures: Sequence[Figure]) -> str:
    """All in one grid, or where there are many each kind folded under its name, the first one unfolded."""
    kinds = list(dict.fromkeys(figure.kind for figure in figures))
    if len(figures) <= MANY or len(kinds) == 1:
        return _grid(figures, has_kind=True) if figures else ""
    parts = []
    for kind in kinds:
        same = [figure for figure in figures if figure.kind == kind]
        is_open = " open" if kind == kinds[0] else ""
        summary = f"<summary>{escape(kind)} ({_count(len(same), 'plot')})</summary>"
        parts.append(f"<details{is_open}>{summary}{_grid(same, has_kind=False)}</details>")
    return "".join(parts)


def _grid(figures: Sequence[Figure], has_kind: bool) -> str:
    is_paired = len({figure.place for figure in figures}) % 2 == 0  # two devices: each case side by side
    cells = []
    for figure in figures:
        title = f"{figure.kind}: {figure.title}" if has_kind and figure.kind else figure.title
        caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(figure.place)}</span></figcaption>"
        cells.append(f"<figure>{caption}{figure.drawing}</figure>")
    return f'<div class="figures{" pairs" if is_paired else ""}">{"".join(cells)}</div>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_label(i < table.labels)}>{escape(name)}</th>' for i, name in enumerate(table.head)
    )
    lines = []
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        cells += [f"<td{_label(i < table.labels)}>{escape(cell)}</td>" for i, cell in enumerate(row) if i > 0]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    box = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    if table.absent:
        box += f"<p>{words.NOT_MEASURED}: {escape(', '.join(table.absent))}</p>"
    is_open = " open" if len(table.rows) <= LONG else ""
    summary = f"<summary>{escape(table.title)}: table, {_count(len(table.rows), 'row')}</summary>"
    return f"<details{is_open}>{summary}{box}</details>"


def _label(is_label: bool) -> str:
    return ' class="name"' if is_label else ""


def _sources(rows: Iterable[Measured]) -> str:
    """The commands that made the rows; several are folded away."""
    lines = [_made_by(same[0].source) for same in grouped(rows, lambda m: (m.source.name, str(id(m.source)))).values()]
    made_by = f'<ul class="sources">{"".join(lines)}</ul>'
    if len(lines) < 2:
        return made_by if lines else ""
    return f"<details><summary>Made by {_count(len(lines), 'command')}</summary>{made_by}</details>"


def _made_by(source: Source) -> str:
    results = source.results
    installed = {name: version for name, version in results.versions.items() if version != "not installed"}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    facts = [
        results.created[:16].replace("T", " "),
        "interrupted before its end" if results.interrupted else "",
        f"commit {results.commit[:12]}" if results.commit else "",
        versions,
    ]
    return (
        f"<li><code>{escape(results.command)}</code> <span>{escape(source.name)} · "
        f"{escape(' · '.join(fact for fact in facts if fact))}</span></li>"
    )


def _machines(sources: Sequence[Source], superseded: Sequence[Measured]) -> str:
    parts = ['<section id="machines"><h2>Machines and commands</h2>']
    for source in sources:
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(source))
        parts.append(f"<article><h3>{escape(source.name)}</h3><dl>{facts}</dl></article>")
    if superseded:
        names = ", ".join(dict.fromkeys(m.source.name for m in superseded))
        left_out = f"{_count(len(superseded), 'measurement')} of {escape(names)} left out"
        parts.append(f"<p>{left_out}: a later or a whole run on the same device has them too.</p>")
    return "\n".join([*parts, "</section>"])


def _facts(source: Source) -> Iterator[tuple[str, str]]:
    results = source.results
    yield "command", results.command
    yield "date", results.created.replace("T", " ")
    if results.interrupted:
        yield "interrupted", "before the command's end: rows are missing, or have fewer rounds"
    yield "commit", results.commit or "unknown"
    yield "seed", str(results.seed)
    for name, value in results.machine.items():
        if value not in (None, "", [], {}):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield (
                name.removesuffix("_bytes").replace("_", " "),
                f"{value / 1e9:.1f} GB" if _is_size(name, value) else shown,
            )
    rates = [f"{p} {words.figures(rate / 1e12)} TFLOP/s" for p, rate in results.peak_flops.items() if positive(rate)]
    yield "measured matrix rate", ", ".join(rates) or words.NOT_MEASURED
    yield "versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())


def _is_size(name: str, value: object) -> bool:
    return "memory" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 1e6


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
