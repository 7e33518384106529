"""What the report says first: how much faster, and who was the fastest; only from rows that passed parity."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cflow_fast.bench.contenders import AFTER_ONE_LINE, FLOOR, OUR_OWN
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
    """The first claim, both in the same precision; where only unequal ones were measured, each pair of them.

    Of many cases the median as well, and of how many devices: their extremes are of no single one.
    """
    if not claims:
        return "What cflow-fast bench measured"
    first = claims[0]
    same = [c for claim in claims if (claim.bench, claim.against) == (first.bench, first.against) for c in claim.found]
    alike = [c for c in same if c.is_like_with_like]
    ranges = {" or ".join(by_precision(alike)): alike} if alike else by_precision(same)
    parts = [f"{_times(c)} as fast as {first.against}, {name}" for name, c in ranges.items()]
    places = len({c.m.place for c in same})
    return f"{OURS} {VERBS[first.bench]} {'; '.join(parts)}{f', on {places} devices' if places > 1 else ''}"


MANY = 4
"""Cases of which a median says more than their extremes."""


def _times(found: Sequence[Comparison]) -> str:
    extremes = spread(found).removesuffix("x")
    if len(found) < MANY:
        return f"{extremes} times"
    middle = words.times(statistics.median(c.ratio.median for c in found)).removesuffix("x")
    return f"{middle} times (the median of {len(found)} cases, {extremes})"


def spread(found: Sequence[Comparison]) -> str:
    """From the smallest to the largest median."""
    medians = [c.ratio.median for c in found]
    return words.times_range(min(medians), max(medians))


def fastest_section(rows: Sequence[Measured]) -> Section | None:
    """For each case the fastest contender in any precision, beside the fastest rival, or ours where that is first."""
    sound = [m for m in rows if _is_sound(m) and m.row.seconds and positive(m.row.seconds.median)]
    sound = [m for m in sound if m.row.contender not in (FLOOR, *AFTER_ONE_LINE)]
    lines, shown, won = [], [], 0
    for (bench, case, place), same in grouped(sound, lambda m: (m.row.bench, m.row.case, m.place)).items():
        ordered = sorted(same, key=_seconds)
        best = ordered[0]
        others = [m for m in ordered if (m.row.contender in OUR_OWN) != (best.row.contender in OUR_OWN)]
        if not others:
            continue
        won += best.row.contender in OUR_OWN
        shown += same
        times = (words.milliseconds(_seconds(m)) for m in (best, others[0]))
        ratio = _paired_ratio(best, others[0])
        lines.append((f"{words.bench_title(bench)}: {case}", place, best.series, others[0].series, *times, ratio))
    if not lines:
        return None
    text = (
        "The contender with the shortest median time in each case, in the precision that suits it best, beside the "
        f"fastest rival. {OURS} is the fastest in {won} of {len(lines)}. Only results that passed parity count. "
        "A ratio is of two that were timed in turns; there is none where they were not."
    )
    head = ("case", "device", "fastest", "next", "fastest, ms", "next, ms", "ratio")
    return Section("fastest", "Who is fastest", text, shown, [], [Table("Who is fastest", head, lines, 4)])


def _paired_ratio(best: Measured, other: Measured) -> str:
    """As it was measured round by round, whichever of the two rows holds it; of one run's medians otherwise."""
    for m, than, inverse in ((best, other, False), (other, best, True)):
        stored = m.row.extra.get("speedups")
        facts = stored.get(than.series) if isinstance(stored, dict) else None
        ratio = positive(facts.get("median")) if isinstance(facts, dict) else None
        if m.source is than.source and ratio:
            return words.times(1 / ratio if inverse else ratio)
    return words.times(_seconds(other) / _seconds(best)) if best.source is other.source else ""


def _is_sound(m: Measured) -> bool:
    return m.row.bench in TIMED and m.is_good and m.row.parity is True


def _seconds(m: Measured) -> float:
    return m.row.seconds.median if m.row.seconds else 0.0
