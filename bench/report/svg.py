"""Drawing by hand: scales, their ticks, and the few SVG elements that a chart is made of. Text stays text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

FONT = 11.5
"""Size of a chart's text, in pixels of a panel that is as wide as a phone's screen."""

LEADS = (
    (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5),
    (1, 2, 5),
    (1, 3),
    (1,),
    (2,),
    (5,),
    (3,),
)
"""First digits of a logarithmic scale's ticks, in the order in which they are tried."""


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` laid out from `start` to `end`, in pixels; logarithmic values must be positive."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"a {'log ' if self.log else ''}scale needs low < high, got {self.low} and {self.high}")

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, is_vertical: bool = False) -> list[float]:
        """As many round values as have room for their labels beside each other."""
        fitting = [values for values in self._candidates() if values and self._fits(values, is_vertical)]
        return next((values for values in fitting if len(values) > 1), fitting[0] if fitting else [])

    def thinned(self, values: Sequence[float], is_vertical: bool = False) -> list[float]:
        """Of the given values those that have room, from the first on."""
        kept: list[float] = []
        for value in sorted(values):
            if self.low <= value <= self.high and self._fits([*kept, value], is_vertical):
                kept.append(value)
        return kept

    def _candidates(self) -> list[list[float]]:
        if not self.log:
            return _linear_candidates(self.low, self.high)
        exponents = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
        found = [[lead * 10.0**e for e in exponents for lead in leads] for leads in LEADS]
        found += [[10.0**e for e in exponents if e % step == 0] for step in (2, 3, 4, 6)]
        inside = [[v for v in values if _is_inside(v, self.low, self.high)] for values in found]
        few = self.high / self.low < 3  # not a whole decade: equal steps read better than first digits
        return _linear_candidates(self.low, self.high) + inside if few else inside

    def _fits(self, values: Sequence[float], is_vertical: bool) -> bool:
        sizes = [1.6 * FONT if is_vertical else text_width(short(value)) + 0.9 * FONT for value in values]
        places = [self(value) for value in values]
        pairs = zip(pairwise(places), pairwise(sizes), strict=True)
        return all(abs(b - a) >= (first + second) / 2 for (a, b), (first, second) in pairs)


def _linear_candidates(low: float, high: float) -> list[list[float]]:
    steps = sorted(lead * 10.0**e for e in range(-12, 13) for lead in (1, 2, 5))
    steps = [step for step in steps if 0.05 * (high - low) < step <= high - low]
    return [
        [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        for step in steps
    ]


def _is_inside(value: float, low: float, high: float) -> bool:
    return low * (1 - 1e-9) <= value <= high * (1 + 1e-9)


def covering(values: Sequence[float], start: float, end: float, log: bool = False, room: float = 0.06) -> Scale:
    """A scale that holds all values with some room at both ends; a linear one starts at zero.

    A logarithmic one spans at least a factor of two, so that noise does not look like a difference.
    """
    low, high = min(values), max(values)
    if not log:
        return Scale(0.0, high * (1 + room) if high > 0 else 1.0, start, end)
    reach = max((high / low) ** room, 1.05, math.sqrt(2 * low / high))
    return Scale(low / reach, high * reach, start, end, log=True)


def short(value: float) -> str:
    """A number in few characters, three digits at most: 0.013, 1.5, 250, 12k, 3.2M."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 1e-4 or size == 0 else f"{value:.0e}".replace("e-0", "e-")


def text_width(text: str, size: float = FONT) -> float:
    """An upper estimate, in pixels, for the fonts that a browser may choose."""
    return 0.62 * size * (len(text) + 0.55 * sum(letter in "%mwMW" for letter in text))


def fitted(text: str, width: float, size: float = FONT) -> str:
    """The text, cut with an ellipsis where it is wider."""
    if text_width(text, size) <= width:
        return text
    while len(text) > 1 and text_width(text, size) > width - 0.9 * size:
        text = text[:-1]
    return text.rstrip() + "…"


def drawing(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """An SVG picture that a screen reader announces by its title."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:.4g}" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(part for part in parts if part)
        + "\n</svg>"
    )


def text(x: float, y: float, content: str, kind: str = "label", anchor: str = "start") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{where}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    corners = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {corners}>{hover(title)}</rect>'


def polyline(points: Sequence[tuple[float, float]], kind: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"{dashes}/>'


def mark(x: float, y: float, shape: str, kind: str, title: str = "", size: float = 4.0) -> str:
    """A mark centred on a point, which is also kept as data-x and data-y."""
    r = size
    paths = {
        "circle": f"M{-r:g},0a{r:g},{r:g} 0 1,0 {2 * r:g},0a{r:g},{r:g} 0 1,0 {-2 * r:g},0z",
        "square": f"M{-0.88 * r:.3g},{-0.88 * r:.3g}h{1.76 * r:.3g}v{1.76 * r:.3g}h{-1.76 * r:.3g}z",
        "triangle": f"M0,{-1.15 * r:.3g}L{1.1 * r:.3g},{0.8 * r:.3g}H{-1.1 * r:.3g}z",
        "wedge": f"M0,{1.15 * r:.3g}L{1.1 * r:.3g},{-0.8 * r:.3g}H{-1.1 * r:.3g}z",
        "diamond": f"M0,{-1.3 * r:.3g}L{1.3 * r:.3g},0L0,{1.3 * r:.3g}L{-1.3 * r:.3g},0z",
        "cross": f"M{-r:g},{-r:g}L{r:g},{r:g}M{r:g},{-r:g}L{-r:g},{r:g}",
        "plus": f"M0,{-1.2 * r:.3g}V{1.2 * r:.3g}M{-1.2 * r:.3g},0H{1.2 * r:.3g}",
        "dash": f"M{-1.4 * r:.3g},0H{1.4 * r:.3g}",
        "bar": f"M0,{-1.4 * r:.3g}V{1.4 * r:.3g}",
    }
    where = f'transform="translate({x:.1f},{y:.1f})" data-x="{x:.2f}" data-y="{y:.2f}"'
    return f'<path class="mark {kind}" d="{paths[shape]}" {where}>{hover(title)}</path>'


def hover(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""
