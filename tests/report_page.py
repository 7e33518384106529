"""A report read back: its sections, and where the marks of its drawings are."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from cflow_fast.bench.report.svg import FONT

VOID = {"meta", "img", "br", "link", "input", "hr"}


@dataclass
class Drawing:
    section: str
    title: str
    width: float
    height: float
    place: str = ""
    marks: list[tuple[str, float, float, str]] = field(default_factory=list)  # class, x, y, shape
    bars: list[tuple[float, float]] = field(default_factory=list)  # start, width
    whiskers: list[tuple[float, float]] = field(default_factory=list)  # from, to
    texts: list[tuple[str, str, float, float]] = field(default_factory=list)  # class, text, x, y
    dashes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [text for _, text, _, _ in self.texts]

    @property
    def all_marks(self) -> list[tuple[float, float]]:
        return [(x, y) for _, x, y, _ in self.marks]

    def marks_of(self, colour: str) -> list[tuple[float, float]]:
        return [(x, y) for kind, x, y, _ in self.marks if colour in kind.split()]

    @property
    def looks(self) -> list[tuple[str, bool, str]]:
        """(shape, hollow, colour) of the marks beside the names of a drawing of curves."""
        right = max(x for _, x, _, _ in self.marks)
        return [(shape[:12], "hollow" in kind, kind.split()[1]) for kind, x, _, shape in self.marks if x == right]

    def height_of(self, value: float) -> float:
        """The place on the logarithmic vertical axis, from its ticks' labels."""
        bottom = max(y for kind, _, _, y in self.texts if kind == "tick")
        ticks = [(t, y - 0.35 * FONT) for kind, t, _, y in self.texts if kind == "tick" and y < bottom - 10]
        return _interpolated(value, [(_value(t), y) for t, y in ticks])

    def place_of(self, value: float) -> float:
        """The same on the horizontal axis."""
        ticks = [(t, x, y) for kind, t, x, y in self.texts if kind == "tick" and re.match(r"[\d.]+k?$", t)]
        bottom = max(y for _, _, y in ticks)
        return _interpolated(value, [(_value(t), x) for t, x, y in ticks if y == bottom])


def _value(text: str) -> float:
    return float(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)


def _interpolated(value: float, ticks: list[tuple[float, float]]) -> float:
    (low, start), (high, end) = min(ticks), max(ticks)
    return start + (end - start) * math.log(value / low) / math.log(high / low)


class Page(HTMLParser):
    """What a browser would see; fails on unbalanced tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.headings: list[str] = []
        self.sections: dict[str, str] = {}
        self.drawings: list[Drawing] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self._section, self._caption = "", ""
        self._texts: list[str] = []
        self.feed(source)
        assert self._open == []
        self.text = " ".join(" ".join(self._texts).split())

    def drawing(self, section: str) -> Drawing:
        """The only one of a section."""
        (found,) = (d for d in self.drawings if d.section == section)
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append((tag, given))
        if tag == "section":
            self._section = given["id"]
            assert self._section not in self.sections
            self.sections[self._section] = ""
        elif tag == "h1":
            self.headings.append("")
        elif tag == "figcaption":
            self._caption = ""
        elif "href" in given:
            self.links.append(given["href"])
        self._draw(tag, given)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._draw(tag, {name: value or "" for name, value in attrs})

    def _draw(self, tag: str, given: dict[str, str]) -> None:
        if tag == "svg":
            width, height = map(float, given["viewbox"].split()[2:])
            self.drawings.append(Drawing(self._section, given["aria-label"], width, height, self._caption))
        elif tag == "path":
            found = (given["class"], float(given["data-x"]), float(given["data-y"]), given["d"])
            self.drawings[-1].marks.append(found)
        elif tag == "rect":
            self.drawings[-1].bars.append((float(given["x"]), float(given["width"])))
        elif tag == "line" and "whisker" in given["class"] and given["y1"] == given["y2"]:
            self.drawings[-1].whiskers.append((float(given["x1"]), float(given["x2"])))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if "style" in tags:
            return
        self._texts.append(data)
        if self._section:
            self.sections[self._section] += f" {data}"
        if "h1" in tags:
            self.headings[-1] += data
        if tags[-2:] == ["figcaption", "span"]:
            self._caption += data
        if tags and tags[-1] == "text":
            given = self._open[-1][1]
            self.drawings[-1].texts.append((given["class"], data, float(given["x"]), float(given["y"])))
