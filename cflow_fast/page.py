"""The result page: one HTML file that holds its pictures, for a browser, a phone or paper; no network, no script."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from cflow_fast.files import write_text
from cflow_fast.page_style import STYLE
from cflow_fast.render import HEAT_COLOURS, mask_image, outline, overlay

SHOWN = 3  # best cases of a category and worst ones, in full; the others are folded away and smaller
FULL_SIZE, SMALL_SIZE = 256, 128  # pixels along an embedded picture's longer side


@dataclass(frozen=True)
class Case:
    """One image with its result. `is_defective` is the truth; the verdict follows from score and threshold.

    `ground_truth` and `mask` are (H, W) bool and `anomaly_map` is (H, W) float, all of the image's size; `ground_truth`
    is None where there is no defect or nobody has marked it.
    """

    title: str
    image: Image.Image
    ground_truth: np.ndarray | None
    anomaly_map: np.ndarray
    mask: np.ndarray
    score: float
    is_defective: bool


@dataclass(frozen=True)
class CategoryResult:
    """The results of one category; `lower` and `upper` are the scores at the two ends of its heat scale.

    An image raises an alarm when its score is above `threshold`, or is not a number.
    """

    name: str
    metrics: dict[str, float]
    images_per_second: float
    cases: list[Case]
    threshold: float
    lower: float
    upper: float


def write_page(
    path: str | os.PathLike[str], title: str, categories: Sequence[CategoryResult], notes: Sequence[str] = ()
) -> None:
    """Write the page atomically: an overview, then for each category the clearest cases, the most wrong, all others.

    A case is clearer the further its score lies on the right side of the threshold, and more wrong the further on the
    other; the clearest shown are defects while there are any.
    """
    sections = "\n".join(_section(number, category) for number, category in enumerate(categories))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}.scale {{ background: linear-gradient(to right, {_heat_gradient()}); }}
</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{"".join(f"<p>{escape(note)}</p>" for note in notes)}
{_overview(categories) if len(categories) > 1 else ""}
</header>
<main>
{sections}
</main>
</body>
</html>
"""
    write_text(path, page)


def _overview(categories: Sequence[CategoryResult]) -> str:
    metrics = list(dict.fromkeys(name for category in categories for name in category.metrics))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in [*metrics, "images/s"])
    rows = []
    for number, category in enumerate(categories):
        values = [_number(category.metrics.get(name, math.nan)) for name in metrics]
        cells = "".join(f"<td>{value}</td>" for value in [*values, _rate(category.images_per_second)])
        rows.append(f'<tr><th scope="row"><a href="#c{number}">{escape(category.name)}</a></th>{cells}</tr>')
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _section(number: int, category: CategoryResult) -> str:
    best, worst, others = _ranked(category)
    are_wrong = any(_is_wrong(case, category.threshold) for case in worst)
    metrics = [f"{escape(name)} <b>{_number(value)}</b>" for name, value in category.metrics.items()]
    metrics.append(f"<b>{_rate(category.images_per_second)}</b> images/s")
    parts = [
        f'<section id="c{number}"><h2>{escape(category.name)}</h2>',
        f'<p class="metrics">{" · ".join(metrics)}</p><p>{_counts(category)}</p>{_heat_scale(category)}',
        "<h3>Clearest</h3>" if best else "",
        *(_row(case, category, FULL_SIZE) for case in best),
        f"<h3>{'Most wrong' if are_wrong else 'Closest calls, all of them right'}</h3>" if worst else "",
        *(_row(case, category, FULL_SIZE) for case in worst),
    ]
    if others:
        rows = "\n".join(_row(case, category, SMALL_SIZE) for case in others)
        noun = "image" if len(others) == 1 else "images"
        parts.append(f'<details><summary>{len(others)} more {noun}</summary><div class="more">{rows}</div></details>')
    return "\n".join([*parts, "</section>"])


def _ranked(category: CategoryResult) -> tuple[list[Case], list[Case], list[Case]]:
    """(clearest, most wrong, all others), each from the more to the less so, the others in their own order."""
    cases = category.cases
    margins = [_margin(case, category.threshold) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: margins[i])
    worst = order[: min(SHOWN, len(order) // 2)]
    best = sorted(order[len(worst) :], key=lambda i: (not cases[i].is_defective, -margins[i]))[:SHOWN]
    others = [i for i in range(len(cases)) if i not in worst and i not in best]
    return [cases[i] for i in best], [cases[i] for i in worst], [cases[i] for i in others]


def _margin(case: Case, threshold: float) -> float:
    """How far the score lies on the right side of the threshold; a score that is not a number raises a sure alarm."""
    excess = math.inf if math.isnan(case.score) else case.score - threshold
    return excess if case.is_defective else -excess


def _is_alarm(case: Case, threshold: float) -> bool:
    return not case.score <= threshold


def _is_wrong(case: Case, threshold: float) -> bool:
    return _is_alarm(case, threshold) != case.is_defective


def _counts(category: CategoryResult) -> str:
    defective = [case for case in category.cases if case.is_defective]
    found = sum(_is_alarm(case, category.threshold) for case in defective)
    alarms = sum(_is_alarm(case, category.threshold) for case in category.cases) - found
    good = len(category.cases) - len(defective)
    return (
        f"Alarm above a score of {category.threshold:.3f}: {found} of {len(defective)} defective images found, "
        f"{alarms} of {good} good images flagged."
    )


def _heat_scale(category: CategoryResult) -> str:
    place = 100 * min(max((category.threshold - category.lower) / (category.upper - category.lower), 0.0), 1.0)
    return (
        f'<div class="legend"><span>{category.lower:.2f}</span>'
        f'<div class="scale"><i style="left:{place:.1f}%"></i></div><span>{category.upper:.2f}</span>'
        "<em>heatmap score; the mark is the image threshold</em></div>"
    )


def _row(case: Case, category: CategoryResult, size: int) -> str:
    title = escape(case.title)
    verdict = {
        (True, True): "✓ found",
        (True, False): "✗ missed",
        (False, False): "✓ passed",
        (False, True): "✗ false alarm",
    }[case.is_defective, _is_alarm(case, category.threshold)]
    heat = overlay(case.image, case.anomaly_map, category.upper, category.lower)
    if case.ground_truth is not None and case.ground_truth.any():
        truth = _picture(outline(case.image, case.ground_truth), "JPEG", size, f"{title}: ground truth outlined")
    else:
        truth = f'<div class="none">{"not marked" if case.is_defective else "no defect"}</div>'
    tiles = {
        "image": _picture(case.image.convert("RGB"), "JPEG", size, f"{title}: image"),
        "ground truth": truth,
        "heatmap": _picture(heat, "JPEG", size, f"{title}: heatmap"),
        "mask": _picture(mask_image(case.mask), "PNG", size, f"{title}: predicted mask"),
    }
    figures = "".join(f"<figure>{tile}<figcaption>{name}</figcaption></figure>" for name, tile in tiles.items())
    mark = "wrong" if _is_wrong(case, category.threshold) else "right"
    return (
        f'<article><p><b>{title}</b> <span class="{mark}">{verdict}</span> score {_number(case.score)}</p>'
        f'<div class="tiles">{figures}</div></article>'
    )


def _picture(image: Image.Image, form: str, size: int, alt: str) -> str:
    image = image.copy()
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, format=form, quality=82, subsampling=0, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/{form.lower()};base64,{data}" alt="{alt}" width="{image.width}" height="{image.height}">'
    )


def _heat_gradient() -> str:
    return ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in HEAT_COLOURS[::15])


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
