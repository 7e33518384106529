"""The result page: complete, self-contained, the clearest and the most wrong cases first."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cflow_fast.errors import CFlowFastError
from cflow_fast.page import Case, CategoryResult, write_page

VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(HTMLParser):
    """What a browser would see: images, links, ids, the text of rows and headings; fails on unbalanced tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.headings_and_rows: list[str] = []
        self.folded: list[bool] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self._text: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if tag == "img":
            self.images.append(given)
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("h3", "article"):
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("h3", "article"):
            self.headings_and_rows.append(" ".join("".join(self._text).split()))
            self.folded.append("details" in self._open)

    def handle_data(self, data: str) -> None:
        self._text.append(data + " ")


def _case(title: str, score: float, is_defective: bool, size: tuple[int, int] = (48, 32)) -> Case:
    mask = np.zeros(size[::-1], dtype=bool)
    mask[8:16, 10:20] = True
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, size[::-1], dtype=np.uint8))
    return Case(title, image, mask if is_defective else None, mask * score, mask & (score > 1.0), score, is_defective)


def _category(cases: list[Case], name: str = "tile") -> CategoryResult:
    metrics = {"image AUROC": 0.98765, "pixel AUROC": float("nan")}
    return CategoryResult(name, metrics, 31.4, cases, threshold=1.0, lower=0.0, upper=3.0)


CASES = [
    _case("good/000", 0.2, False),
    _case("good/001", 1.4, False),
    _case("good/002", 0.9, False),
    _case("crack/000", 2.9, True),
    _case("crack/001", 0.3, True),
    _case("crack/002", 2.5, True),
    _case("crack/003", 0.9, True),
    _case("crack/004", 2.7, True),
    _case("crack/005", 1.5, True),
]


def _written(path: Path, *categories: CategoryResult, title: str = "Results", notes: tuple[str, ...] = ()) -> _Page:
    write_page(path, title, categories, notes)
    return _Page(path.read_text(encoding="utf-8"))


def test_clearest_cases_come_first_then_the_most_wrong_then_all_others(tmp_path: Path) -> None:
    page = _written(tmp_path / "index.html", _category(CASES))
    labels = [re.sub(r" score .*", "", text) for text in page.headings_and_rows]
    assert labels == [
        *("Clearest", "crack/000 ✓ found", "crack/004 ✓ found", "crack/002 ✓ found"),
        *("Most wrong", "crack/001 ✗ missed", "good/001 ✗ false alarm", "crack/003 ✗ missed"),
        *("good/000 ✓ passed", "good/002 ✓ passed", "crack/005 ✓ found"),
    ]
    assert page.folded == [False] * 8 + [True] * 3


@pytest.mark.parametrize("count", range(9))
def test_every_case_is_shown_once_with_all_of_its_pictures(count: int, tmp_path: Path) -> None:
    page = _written(tmp_path / "index.html", _category(CASES[:count]), _category(CASES, "wood"))
    rows = [text for text in page.headings_and_rows if "/" in text]
    assert sorted(row.split()[0] for row in rows) == sorted(case.title for case in CASES[:count] + CASES)
    for row in rows:
        assert ("no defect" in row) == row.startswith("good")
        for name in ("image", "ground truth", "heatmap", "mask"):
            assert name in row
    shown = CASES[:count] + CASES
    assert len(page.images) == sum(4 if case.is_defective else 3 for case in shown)


def test_pictures_are_inside_the_page_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = _written(tmp_path / "index.html", _category(CASES), _category(CASES, "wood"))
    for image in page.images:
        form, data = re.fullmatch(r"data:image/(jpeg|png);base64,(.+)", image["src"]).groups()  # type: ignore[union-attr]
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        picture.load()
        assert picture.format == form.upper()
        assert picture.size == (int(image["width"]), int(image["height"])) == (48, 32)
        assert "/0" in image["alt"]
    assert {link.lstrip("#") for link in page.links} == {"c0", "c1"} == set(page.ids)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    source = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//|@import|url\(", source)


def test_pictures_have_a_size_for_a_page_and_not_the_camera_s(tmp_path: Path) -> None:
    cases = [_case(f"crack/{number:03d}", 1.0 + number / 10, True, size=(1200, 900)) for number in range(8)]
    page = _written(tmp_path / "index.html", _category(cases))
    assert {(image["width"], image["height"]) for image in page.images} == {("256", "192"), ("128", "96")}


def test_numbers_are_given_and_an_undefined_one_says_so(tmp_path: Path) -> None:
    _written(tmp_path / "index.html", _category(CASES))
    text = re.sub(r"<[^>]+>", "", (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "image AUROC 0.988 · pixel AUROC n/a · 31 images/s" in text
    assert "Alarm above a score of 1.000: 4 of 6 defective images found, 1 of 3 good images flagged." in text


def test_without_a_wrong_case_the_closest_calls_are_shown_as_what_they_are(tmp_path: Path) -> None:
    right = [case for case in CASES if (case.score > 1.0) == case.is_defective]
    page = _written(tmp_path / "index.html", _category(right))
    assert "Closest calls, all of them right" in page.headings_and_rows
    assert "Most wrong" not in page.headings_and_rows


def test_a_single_case_is_shown_in_full(tmp_path: Path) -> None:
    page = _written(tmp_path / "index.html", _category(CASES[:1]))
    assert page.headings_and_rows[0] == "Clearest"
    assert page.folded == [False, False]


def test_a_score_that_is_not_a_number_is_an_alarm(tmp_path: Path) -> None:
    cases = [_case("good/000", float("nan"), False), _case("crack/000", float("nan"), True)]
    rows = [text for text in _written(tmp_path / "index.html", _category(cases)).headings_and_rows if "/" in text]
    assert [row.split(" image")[0] for row in rows] == [
        "crack/000 ✓ found score n/a",
        "good/000 ✗ false alarm score n/a",
    ]


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<b>&\"'</b>"
    page = _written(
        tmp_path / "index.html", _category([_case(f"{evil}/0", 2.0, True)], evil), title=evil, notes=(evil,)
    )
    assert page.images[0]["alt"].startswith(evil)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert evil not in source


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "index.html"
    _written(target, _category(CASES))
    before = target.read_bytes()
    broken = [*CASES[:1], Case("odd/000", CASES[0].image, None, np.zeros((3, 3)), np.zeros((3, 3), bool), 0.0, False)]
    with pytest.raises(ValueError, match="anomaly map"):
        write_page(target, "Results", [_category(broken)], [])
    assert target.read_bytes() == before
    with pytest.raises(CFlowFastError, match="cannot write"):
        write_page(target / "index.html", "Results", [_category(CASES)], [])
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
