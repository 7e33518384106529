"""Exponents of time are fitted as they were made, and a super-linear surprise shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cflow_fast.bench.cases import Scales
from cflow_fast.bench.results import Row, Summary
from cflow_fast.bench.scaling import Spans, exponent_rows, fit_exponent, scaling_cases

SPANS = Spans(sides=(4, 8, 16), channels=(16, 32), blocks=(1, 2), sizes=(32, 64), batches=(1, 2))
CASES = scaling_cases("resnet18", Scales((16, 24), (8, 16)), "hard", SPANS)


def test_exponent_of_a_power_law_is_its_power() -> None:
    x = [1.0, 2.0, 5.0, 10.0]
    fitted = fit_exponent(x, [3 * value**1.7 for value in x])
    assert fitted.value == pytest.approx(1.7)
    assert fitted.high - fitted.low < 1e-6


def test_interval_of_a_noisy_exponent_holds_it() -> None:
    random = np.random.default_rng(0)
    x = [2.0**k for k in range(8)]
    inside = 0
    for _ in range(300):
        fitted = fit_exponent(x, [value**1.3 * float(np.exp(0.1 * random.standard_normal())) for value in x])
        inside += fitted.low <= 1.3 <= fitted.high
    assert inside > 0.88 * 300  # two standard errors with six degrees of freedom: 91%


@pytest.mark.parametrize("x", [[], [1.0], [2.0, 2.0]])
def test_exponent_of_one_point_is_refused(x: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two points"):
        fit_exponent(x, x)


def test_cases_vary_one_axis_each() -> None:
    points = [(case.axis, case.value) for case in CASES]
    assert [value for axis, value in points if axis == "rows"] == [16, 64, 256]
    assert [axis for axis, _ in points] == ["rows"] * 3 + ["D"] * 2 + ["blocks"] * 2 + ["size"] * 2 + ["batch"] * 2
    assert len({case.label for case in CASES}) == len(CASES)
    assert next(case for case in CASES if case.axis == "blocks").coupling_blocks == 1


def _timed(power: float) -> list[Row]:
    """Rows whose time is the counted work to a power, but for the axis `rows`, where it is exactly the work."""
    rows = []
    for case in CASES:
        seconds = (case.flop() or 0.0) ** (1.0 if case.axis == "rows" else power)
        summary = Summary(seconds, seconds, seconds, seconds, seconds, 11)
        rows.append(Row("scaling", case.label, case.axes, "cflow-fast", "fp32", "cpu", seconds=summary))
    return rows


def test_time_that_grows_faster_than_the_work_is_a_surprise() -> None:
    found = {str(row.axes["axis"]): row.extra for row in exponent_rows(_timed(1.5), CASES)}
    assert found.keys() == {"rows", "D", "blocks", "size", "batch"}
    assert found["rows"]["exponent"] == pytest.approx(1.0)
    assert found["rows"]["surprise"] is False
    assert found["rows"]["steps"] == [[16, 64, pytest.approx(1.0)], [64, 256, pytest.approx(1.0)]]
    assert found["blocks"]["counted"] == pytest.approx(1.0)
    assert found["blocks"]["exponent"] == pytest.approx(1.5)
    assert all(found[axis]["surprise"] for axis in ("D", "blocks", "size", "batch"))
    assert not any(row.extra["surprise"] for row in exponent_rows(_timed(1.0), CASES))


def test_what_failed_is_no_point() -> None:
    rows = [replace(row, status="failed", seconds=None) for row in _timed(1.0)]
    assert list(exponent_rows(rows, CASES)) == []
