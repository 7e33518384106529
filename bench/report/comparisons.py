"""Who was timed against whom: the speed-ups that a row holds, and those of them that say something."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cflow_fast.bench.contenders import AFTER_ONE_LINE
from cflow_fast.bench.report.data import Measured, positive
from cflow_fast.bench.results import Speedup

OURS = "cflow-fast"


@dataclass(frozen=True)
class Comparison:
    """A row and how many times faster it is than another entrant, which is a contender in a precision."""

    m: Measured
    ratio: Speedup

    @property
    def against(self) -> str:
        """The other contender, without its precision."""
        return _contender(self.ratio.against)

    @property
    def is_like_with_like(self) -> bool:
        """Whether both ran in the same precision."""
        return self.m.row.precision == _precision(self.ratio.against)

    @property
    def precisions(self) -> str:
        """bf16 against fp32; both fp32."""
        own, other = self.m.row.precision, _precision(self.ratio.against)
        return f"both {own}" if self.is_like_with_like else f"{own} against {other}" if other else own


def comparisons(rows: Iterable[Measured]) -> list[Comparison]:
    """Of every row that over the run's baseline; of ours those over every rival too.

    Ours is compared with another contender in the same precision, or in any where it was not run in that one.
    """
    found = []
    for m in rows:
        ratios = [m.row.speedup] if m.row.speedup else []
        if m.row.contender == OURS:
            ratios += _others(m)
        found += [Comparison(m, ratio) for ratio in ratios if all(map(positive, (ratio.low, ratio.median, ratio.high)))]
    return found


def _others(m: Measured) -> list[Speedup]:
    stored = m.row.extra.get("speedups")
    no_rivals = (OURS, *AFTER_ONE_LINE)
    names = [name for name in stored if _contender(name) not in no_rivals] if isinstance(stored, dict) else []
    baseline = m.row.speedup.against if m.row.speedup else ""
    chosen = []
    for name in names:
        same = f"{_contender(name)} {m.row.precision}"
        if name != baseline and (name == same or same not in names):
            facts = stored[name] if isinstance(stored, dict) and isinstance(stored[name], dict) else {}
            chosen.append(Speedup(name, *(positive(facts.get(part)) or 0.0 for part in ("median", "low", "high"))))
    return chosen


def _contender(name: str) -> str:
    return name.split(" ")[0]


def _precision(name: str) -> str:
    return name.partition(" ")[2]
