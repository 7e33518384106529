"""The anomaly map in compiled code: agreement with its twin, values that are not finite, faults."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_code import (
    SOURCES,
    assert_same_map,
    built,
    compiled,
    needs_compiler,
    scales_of,
)

from cflow_fast.kernels import cpu_map
from cflow_fast.kernels.anomaly_map import anomaly_map
from cflow_fast.kernels.cpu_library import Library

pytestmark = pytest.mark.usefixtures("stale_memory")

SIZES = [(1, 1), (7, 5), (16, 16), (1, 40), (33, 65), (3, 2)]


PIXELS_A_THREAD = cpu_map.PIXELS_A_THREAD


@pytest.fixture(autouse=True)
def _small_maps_have_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_map, "PIXELS_A_THREAD", 1)


@pytest.fixture(params=["avx2", "avx512"])
def float_lib(request: pytest.FixtureRequest) -> Library:
    return built(request.param)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_map_is_that_of_its_twin(
    float_lib: Library, batch: int, size: tuple[int, int], count: int, threads: Any
) -> None:
    threads(count)
    scales, maxima = scales_of(batch), [-1.0, 0.5]
    assert_same_map(cpu_map.anomaly_map(scales, size, maxima, float_lib), anomaly_map(scales, size, maxima))


def test_map_of_scales_in_any_strides_and_of_many(float_lib: Library) -> None:
    scales = [torch.randn(7, 5, 3).permute(2, 1, 0) - 2, *(torch.randn(3, n, n + 1) - 2 for n in range(1, 10))]
    maxima = [0.1 * k for k in range(10)]
    assert_same_map(cpu_map.anomaly_map(scales, (20, 31), maxima, float_lib), anomaly_map(scales, (20, 31), maxima))


def test_map_keeps_what_is_not_finite_to_its_neighbourhood_and_out_of_the_score(float_lib: Library) -> None:
    for value in (math.nan, math.inf, -math.inf):
        scales = scales_of(3)
        scales[0][1, 3, 4] = value
        scales[1][2] = value
        ours = cpu_map.anomaly_map(scales, (33, 65), [0.0, 0.0], float_lib)
        assert_same_map(ours, anomaly_map(scales, (33, 65), [0.0, 0.0]))
        assert ours[1].isnan().tolist() == [False, False, True]


def test_map_of_likelihoods_far_above_and_below_the_maxima(float_lib: Library) -> None:
    scales = [torch.tensor([[[5.0, -200.0, 3e38, -3e38]]])]
    ours, score = cpu_map.anomaly_map(scales, (1, 4), [0.0], float_lib)
    torch.testing.assert_close(ours, torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]), rtol=0, atol=1e-30)
    assert score.tolist() == [1.0]


MAP_FAULTS = {
    "corners are not aligned": ("(float)(inputs - 1) / (float)(outputs - 1)", "(float)inputs / (float)outputs"),
    "rows of the wrong image": ("(image * s->height + upper) * s->width", "upper * s->width"),
    "weights change places": (
        "* (1.0f - weight) + gather(from + 1, left) * weight",
        "* weight + gather(from + 1, left) * (1.0f - weight)",
    ),
    "the cap is missing": ("at_most(exponential(x - s->maximum), 1.0f)", "exponential(x - s->maximum)"),
    "the maximum is not taken off": ("exponential(x - s->maximum)", "exponential(x)"),
    "the score sees columns that are not there": ("value[i] = -INFINITY", "value[i] = 9.0f"),
    "not finite passes for 0": (
        "store(probabilities + i * VECTOR, p + nothing)",
        "store(probabilities + i * VECTOR, p)",
    ),
}


@needs_compiler
@pytest.mark.parametrize("fault", MAP_FAULTS)
def test_planted_fault_in_the_map_shows(fault: str, tmp_path: Path) -> None:
    built("avx2")
    right, wrong = MAP_FAULTS[fault]
    source = (SOURCES / "map.h").read_text()
    assert right in source, f"the code has changed: {right!r} is not in it"
    (tmp_path / "map.c").write_text(source.replace(right, wrong) + '#include "flow.h"\n#include "interface.h"\n')
    faulty = Library(compiled(tmp_path, tmp_path / "map.c", "avx2", "-O1"), torch.float32)
    scales = scales_of(3)
    scales[0][0, 0, 0], scales[0][1, 2, 2] = 4.0, -math.inf
    with pytest.raises(AssertionError):
        assert_same_map(
            cpu_map.anomaly_map(scales, (33, 65), [-1.0, 0.5], faulty), anomaly_map(scales, (33, 65), [-1.0, 0.5])
        )


def test_a_small_map_is_one_threads(monkeypatch: pytest.MonkeyPatch, float_lib: Library) -> None:
    """Where threads are short of cores they wait for each other longer than it takes."""
    taken: list[int] = []
    monkeypatch.setattr(type(float_lib), "run", lambda lib, name, task: taken.append(task.threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu_map, "PIXELS_A_THREAD", PIXELS_A_THREAD)
    for size in (64, 180, 256, 512):
        cpu_map.anomaly_map([torch.zeros(1, 2, 2)], (size, size), [0.0], float_lib)
    assert taken == [1, 1, 4, 4]
