"""The report as a browser lays it out: on a phone and on a desk, light and dark, nothing wider than the screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_results import CPU, GPU, row, run, timed

from cflow_fast.bench.report import report
from cflow_fast.bench.report.data import Source, load
from cflow_fast.bench.results import Row

WIDTHS = (360, 1280)
RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

MEASURE = """
addEventListener("load", () => {
  const results = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, overlaps = [], outside = [];
    page.querySelectorAll("details").forEach(one => one.open = true);
    for (const svg of page.querySelectorAll("svg")) {
      const frame = svg.getBoundingClientRect();
      const boxes = [...svg.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
      boxes.forEach(([text, a], i) => {
        if (a.left < frame.left - 2 || a.right > frame.right + 2) outside.push(text.textContent);
        for (const [other, b] of boxes.slice(i + 1)) {
          const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
          const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (wide > 0.5 && high > 3) overlaps.push(text.textContent + " | " + other.textContent);
        }
      });
    }
    const view = frame.contentWindow, body = view.getComputedStyle(page.body);
    return {
      width: view.innerWidth, scroll: page.scrollingElement.scrollWidth, overlaps, outside,
      texts: page.querySelectorAll("svg text").length, ink: body.color, paper: body.backgroundColor,
    };
  });
  document.body.textContent = "<<" + JSON.stringify(results) + ">>";
});
"""


def _rows(device: str, factor: float) -> list[Row]:
    """Curves that nearly touch, values from small to large, long names."""
    rows = [
        timed(contender, precision, batch, factor * speed * batch / (batch + 1), device)
        for batch in (1, 8, 32)
        for contender, precision, speed in (
            ("cflow-fast", "fp32", 1.5),
            ("cflow-fast", "bf16", 4.0),
            ("freia", "fp32", 1.0),
            ("freia", "bf16", 1.01),
            ("freia-compile", "fp32", 1.02),
            ("cflow-ad-loop-lists with a name that is long", "fp32", 0.3),
        )
    ]
    sizes = [replace(r, axes=r.axes | {"size": 512}, case=f"{r.case}, larger") for r in rows if r.axes["batch"] == 1]
    sweep = [timed("freia-compile", "bf16", 1, 5000.0 / n, device) for n in (1, 3, 11, 57, 300)]
    scaling = [replace(r, bench="scaling", axes={"axis": "rows", "rows": 64 * i + 1}) for i, r in enumerate(sweep)]
    paper = replace(
        row("cflow-fast", "auto", 1, device, images_per_second=factor), bench="complexity", extra={"paper_fps": 27.0}
    )
    failed = row("anomalib", "fp32", 1, device, status="failed", note="a reason without a space: " + "x" * 300)
    return [*rows, *sizes, *scaling, paper, failed]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the browser says of the page at both widths, first light, then dark."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome found to lay the page out")
    light = report(
        [Source("cpu.json", run(_rows("cpu", 3.7), CPU)), Source("gpu.json", run(_rows("cuda", 21000.0), GPU))]
    )
    dark = light.replace("prefers-color-scheme: dark", "min-width: 1px")
    return _measured([light, dark], tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same of the results that are kept with the project."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome found to lay the page out")
    files = sorted(RESULTS.glob("*.json"))
    page = report(load(files, skip=lambda reason: pytest.fail(reason)))
    return _measured([page], tmp_path_factory.mktemp("stored"))


def _measured(pages: list[str], folder: Path) -> list[dict[str, Any]]:
    frames = [
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for page in pages
        for width in WIDTHS
    ]
    harness = folder / "harness.html"
    harness.write_text(f"<!doctype html><body>{''.join(frames)}<script>{MEASURE}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [str(BROWSER), *flags, harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"&lt;&lt;(.*)&gt;&gt;", done.stdout, re.DOTALL)
    assert found, done.stderr
    results: list[dict[str, Any]] = json.loads(html.unescape(found.group(1)))
    assert [r["width"] for r in results] == [*WIDTHS] * len(pages)
    return results


def test_the_page_is_never_wider_than_the_screen(layouts: list[dict[str, Any]]) -> None:
    for layout in layouts:
        assert layout["scroll"] <= layout["width"]


def test_no_text_of_a_drawing_overlaps_another_or_leaves_it(layouts: list[dict[str, Any]]) -> None:
    for layout in layouts:
        assert layout["texts"] > 200
        assert layout["overlaps"] == []
        assert layout["outside"] == []


def test_stored_results_fit_a_phone_and_overlap_nowhere(stored: list[dict[str, Any]]) -> None:
    for layout in stored:
        assert layout["scroll"] <= layout["width"]
        assert (layout["overlaps"], layout["outside"]) == ([], [])


def test_dark_mode_has_light_ink_on_dark_paper(layouts: list[dict[str, Any]]) -> None:
    brightness = [
        [sum(map(int, re.findall(r"\d+", r[name])[:3])) for name in ("ink", "paper")] for r in (layouts[0], layouts[2])
    ]
    (light_ink, light_paper), (dark_ink, dark_paper) = brightness
    assert light_ink < 200 < 600 < light_paper
    assert dark_paper < 200 < 600 < dark_ink
