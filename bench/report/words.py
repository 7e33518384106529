"""Numbers and names as the report writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_MEASURED = "not measured"

AXES = ("category", "encoder", "permutations", "size", "D", "rows", "coupling_blocks", "condition")
"""The order in which a case's axes are named; others follow, the batch comes last."""

AXIS_TITLES = {
    "rows": "rows",
    "D": "features D",
    "size": "image size, px",
    "batch": "images in a batch",
    "blocks": "coupling blocks",
}

BENCH_TITLES = {
    "decoder": "Decoders",
    "map": "Anomaly map",
    "end-to-end": "Image to anomaly map",
    "training": "Training",
    "stages": "Stages",
    "scaling": "Scaling",
    "complexity": "Complexity",
    "accuracy": "Accuracy",
    "ablation": "Ablation",
}


def bench_title(bench: str) -> str:
    return BENCH_TITLES.get(bench, bench)


def axes_text(axes: Mapping[str, Any]) -> str:
    """{"permutations": "soft", "size": 256, "batch": 8} is "soft permutations, 256 px, batch 8"."""
    known = [name for name in AXES if name in axes]
    others = [name for name in axes if name not in known and name != "batch"]
    return ", ".join(axis_text(name, axes[name]) for name in [*known, *others, *(["batch"] if "batch" in axes else [])])


def axis_text(name: str, value: Any) -> str:
    name = name.replace("coupling_", "").replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    shown = f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
    if name in ("rows", "blocks", "permutations"):
        return f"{shown} {name}"
    if name == "size":
        return f"{shown} px"
    return shown if name in ("encoder", "category", "model") else f"{name} {shown}"


def figures(value: float | None, digits: int = 3, unit: str = "") -> str:
    """Significant figures, thousands apart; None was not measured."""
    if value is None:
        return NOT_MEASURED
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e7):
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    else:
        places = digits - 1
        while size >= 10 and places > 0:
            size, places = size / 10, places - 1
        while 0 < size < 0.9995 and places < 6:
            size, places = size * 10, places + 1
        text = f"{value:,.{places}f}"
    return f"{text} {unit}" if unit else text


def milliseconds(seconds: float | None) -> str:
    return figures(None if seconds is None else 1e3 * seconds)


def percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.{1 if share < 0.0995 else 0}f}%"


def megabytes(size: float | None) -> str:
    return figures(None if size is None else size / 1e6)


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 99.5 else f"{ratio:.0f}x"


def times_range(low: float, high: float) -> str:
    first, last = times(low), times(high)
    return last if first == last else f"{first.removesuffix('x')} to {last}"


def interval(low: float, high: float) -> str:
    digits = 2 if high < 99.5 else 0
    return f"[{low:.{digits}f}, {high:.{digits}f}]"
