"""What the report says first: how much faster, and who was the fastest; only from rows that passed parity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cflow_fast.bench.contenders import AFTER_ONE_LINE, FLOOR
from cflow_fast.bench.report import words
from cflow_fast.bench.report.comparisons import OURS, Comparison, comparisons
from cflow_fast.bench.report.data import Measured, grouped, positive
from cflow_fast.bench.report.plots import TIMED
from cflow_fast.bench.report.sections import Section, Table

VERBS = {
    "decoder": "decodes",
    "map": "makes anomaly maps",
    "end-to-end": "goes from image to anomaly map",
    "training": "trains",
}


@dataclass(frozen=True)
class Claim:
    """How much faster we are than one contender in one benchmark on one device, by precision."""

    bench: str
    against: str
    place: str
    found: list[Comparison]

    @property
    def by_precision(self) -> dict[str, list[Comparison]]:
        return by_precision(self.found)


def claims(rows: Sequence[Measured]) -> list[Claim]:
    """The decoders' first, as the benchmarks are ordered."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in comparisons(m for m in rows if _is_sound(m) and m.row.contender == OURS):
        if c.against not in (OURS, FLOOR, *AFTER_ONE_LINE):
            groups.setdefault((c.m.row.bench, c.against, c.m.place), []).append(c)
    return sorted((Claim(*key, found) for key, found in groups.items()), key=lambda claim: TIMED.index(claim.bench))


def by_precision(found: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    precisions = dict.fromkeys(c.precisions for c in found)
    return {name: [c for c in found if c.precisions == name] for name in precisions}


def headline(claims: Sequence[Claim]) -> str:
    """The first claim, both in the same precision; where only unequal ones were measured, each pair of them."""
    if not claims:
        return "What cflow-fast bench measured"
    first = claims[0]
    same = [c for claim in claims if (claim.bench, claim.against) == (first.bench, first.against) for c in claim.found]
    alike = [c for c in same if c.is_like_with_like]
    ranges = {" or ".join(by_precision(alike)): alike} if alike else by_precision(same)
    parts = [f"{spread(c).removesuffix('x')} times as fast as {first.against}, {name}" for name, c in ranges.items()]
    return f"{OURS} {VERBS[first.bench]} {'; '.join(parts)}"


def spread(found: Sequence[Comparison]) -> str:
    """From the smallest to the largest median."""
    medians = [c.ratio.median for c in found]
    return words.times_range(min(medians), max(medians))


def fastest_section(rows: Sequence[Measured]) -> Section | None:
    """For each case the fastest contender in any precision, and the fastest of the others."""
    sound = [m for m in rows if _is_sound(m) and m.row.seconds and positive(m.row.seconds.median)]
    sound = [m for m in sound if m.row.contender not in AFTER_ONE_LINE]
    lines, shown, won = [], [], 0
    for (bench, case, place), same in grouped(sound, lambda m: (m.row.bench, m.row.case, m.place)).items():
        ordered = sorted(same, key=_seconds)
        best, others = ordered[0], [m for m in ordered if m.row.contender != ordered[0].row.contender]
        if not others:
            continue
        won += best.row.contender == OURS
        shown += same
        times = (words.milliseconds(_seconds(m)) for m in (best, others[0]))
        ratio = words.times(_seconds(others[0]) / _seconds(best))
        lines.append((f"{words.bench_title(bench)}: {case}", place, best.series, others[0].series, *times, ratio))
    if not lines:
        return None
    text = (
        "The contender with the shortest median time in each case, in the precision that suits it best, beside the "
        f"fastest of the others. {OURS} is the fastest in {won} of {len(lines)}. Only results that passed parity count."
    )
    head = ("case", "device", "fastest", "next", "fastest, ms", "next, ms", "ratio")
    return Section("fastest", "Who is fastest", text, shown, [], [Table("Who is fastest", head, lines, 4)])


def _is_sound(m: Measured) -> bool:
    return m.row.bench in TIMED and m.is_good and m.row.parity is True


def _seconds(m: Measured) -> float:
    return m.row.seconds.median if m.row.seconds else 0.0
