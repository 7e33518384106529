"""`bench scaling`: how a decoder's time grows with rows, D and blocks, and all decoders' with image size and batch.

Time along an axis is fitted by seconds = c x^e. An exponent above what the work counts up to is a surprise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from cflow_fast.bench.cases import CPU, DecoderCase, Scales
from cflow_fast.bench.results import Row

SURPRISE = 0.1
"""By how much an exponent may lie above the work's own before it is called one."""


@dataclass(frozen=True)
class ScalingCase(DecoderCase):
    """A point of an axis."""

    bench: str = "scaling"
    axis: str = "rows"
    value: int = 0

    @property
    def label(self) -> str:
        return f"{self._about}, {self.axis} = {self.value}"

    @property
    def _about(self) -> str:
        return f"{self.encoder}, {self.permutations} permutations"

    @property
    def axes(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "permutations": self.permutations, "axis": self.axis, self.axis: self.value}


@dataclass(frozen=True)
class Spans:
    """The points of every axis; the others stay at `features`, `side` and `blocks`, or at the least size and batch."""

    sides: tuple[int, ...] = (8, 16, 32, 64)  # rows are their squares
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)
    blocks: tuple[int, ...] = (2, 4, 8, 16)
    sizes: tuple[int, ...] = (128, 256, 512)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    features: int = 256
    side: int = 32


def scaling_cases(
    encoder: str, scales: Scales, permutations: str, spans: Spans, device: torch.device = CPU, seed: int = 0
) -> list[ScalingCase]:
    """One decoder along rows, D and blocks; the encoder's decoders along image size and batch."""

    def one(axis: str, value: int, features: int, side: int, blocks: int = 8) -> ScalingCase:
        single = Scales((features,), (1,))
        name = "one decoder"
        return ScalingCase(
            name, single, side, 1, permutations, blocks, seed=seed, device=device, axis=axis, value=value
        )

    def whole(axis: str, value: int, size: int, batch: int) -> ScalingCase:
        return ScalingCase(encoder, scales, size, batch, permutations, seed=seed, device=device, axis=axis, value=value)

    return [
        *(one("rows", side * side, spans.features, side) for side in spans.sides),
        *(one("D", d, d, spans.side) for d in spans.channels),
        *(one("blocks", count, spans.features, spans.side, count) for count in spans.blocks),
        *(whole("size", size, size, spans.batches[0]) for size in spans.sizes),
        *(whole("batch", batch, spans.sizes[0], batch) for batch in spans.batches),
    ]


@dataclass(frozen=True)
class Exponent:
    """e of seconds = c x^e, least squares over the points' logarithms, with two standard errors around it."""

    value: float
    low: float
    high: float


def fit_exponent(x: Sequence[float], seconds: Sequence[float]) -> Exponent:
    """With two points there is no error to estimate: the interval is the value. Raises ValueError for fewer."""
    if len(x) != len(seconds) or len(set(x)) < 2:
        raise ValueError(f"an exponent needs at least two points, got {len(set(x))}")
    a, b = [math.log(value) for value in x], [math.log(value) for value in seconds]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    spread = sum((value - mean_a) ** 2 for value in a)
    slope = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / spread
    residual = sum((q - mean_b - slope * (p - mean_a)) ** 2 for p, q in zip(a, b, strict=True))
    error = 2 * math.sqrt(residual / (len(a) - 2) / spread) if len(a) > 2 else 0.0
    return Exponent(slope, slope - error, slope + error)


def exponent_rows(rows: Sequence[Row], cases: Sequence[ScalingCase]) -> Iterator[Row]:
    """A row for each contender, precision and axis that was timed at two points at least.

    extra: exponent, low, high; counted: the exponent of the counted work; steps: the exponent between neighbouring
    points; surprise: whether it lies above the counted one.
    """
    flop = {case.label: case.flop() for case in cases}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.bench == "scaling" and row.seconds is not None and row.status == "ok" and row.case in flop:
            groups.setdefault((row.contender, row.precision, row.axes["encoder"], row.axes["axis"]), []).append(row)
    for (_, _, encoder, axis), same in groups.items():
        if len(same) < 2:
            continue
        x = [float(row.axes[axis]) for row in same]
        seconds = [row.seconds.median for row in same if row.seconds is not None]
        fitted, counted = fit_exponent(x, seconds), fit_exponent(x, [flop[row.case] or 0.0 for row in same])
        steps = [
            [first, last, fit_exponent((first, last), (before, after)).value]
            for (first, last), (before, after) in zip(pairwise(x), pairwise(seconds), strict=True)
        ]
        extra = {
            "exponent": fitted.value,
            "low": fitted.low,
            "high": fitted.high,
            "counted": counted.value,
            "steps": steps,
            "surprise": fitted.low > counted.value + SURPRISE,
        }
        axes = {name: value for name, value in same[0].axes.items() if name != axis}
        case = f"{encoder}, {axes['permutations']} permutations: exponent of time in {axis}"
        yield replace(_bare(same[0]), case=case, axes=axes, extra=extra)


def _bare(row: Row) -> Row:
    """What the row is of, without what it measured."""
    return Row(row.bench, row.case, row.axes, row.contender, row.precision, row.device)
