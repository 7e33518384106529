"""The whole model, encoder included, against anomalib's Cflow as it ships; skipped where anomalib is not installed."""

from __future__ import annotations

from collections.abc import Callable

from cflow_fast.bench.cases import ENCODERS
from cflow_fast.bench.end_to_end import CONTENDERS, ModelCase
from cflow_fast.bench.results import Row

ENCODER = "wide_resnet50_2"


def test_one_image_against_anomalib(measure: Callable[..., Row]) -> None:
    """Same encoder, random weights, hard permutations, fp32; anomalib in its default fibers of 64 vectors."""
    row = measure(ModelCase(ENCODER, ENCODERS[ENCODER], 256, 1, "hard"), CONTENDERS, "anomalib")
    assert row.speedup is not None
    assert row.speedup.median >= 1.6
