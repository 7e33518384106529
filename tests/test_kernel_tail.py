"""The tail kernel against its twin in plain PyTorch, under the guards."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_guards import guarded
from torch import Tensor

from cflow_fast.kernels import anomaly_map as twin
from cflow_fast.kernels import anomaly_tail
from cflow_fast.kernels.configs import TailConfig, select_tail

TOLERANCE = 3e-7
"""For each scale, whose share of the map is at most 1: five roundings of it."""

MAXIMA = [-1.3, -1.2, -1.5, -1.4]


def log_probs(shapes: list[tuple[int, int]], batch: int = 2, seed: int = 0) -> list[Tensor]:
    """About -1.4 with some values above every maximum, and one defect far below."""
    generator = torch.Generator().manual_seed(seed)
    scales = [-1.4 + 0.3 * torch.randn(batch, *shape, generator=generator) for shape in shapes]
    scales[0][0, 0, -1] = -9.0
    return scales


def small_strips(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Several ragged strips on a map of a few pixels."""
    small = TailConfig(**({"rows": 4, "columns": 32, "warps": 1, "block": 64, "peak_programs": 2} | changes))
    monkeypatch.setattr(anomaly_tail, "select_tail", lambda *shape: small)


def check(scales: list[Tensor], size: tuple[int, int], maxima: list[float] | None) -> Tensor:
    """Run the kernel under the guards, compare with the twin in float64, return the map."""
    with guarded() as guard:
        result, score = anomaly_tail.anomaly_map(scales, size, maxima)
    guard.written_once(result)
    expected, expected_score = twin.anomaly_map([scale.double() for scale in scales], size, maxima)
    plain, _ = twin.anomaly_map(scales, size, maxima)
    assert torch.equal(result.isnan(), plain.isnan())
    finite = ~result.isnan() & ~expected.isnan()
    error, plain_error = ((x[finite].double() - expected[finite]).abs() for x in (result, plain))
    if finite.any():
        assert error.max() <= max(TOLERANCE * len(scales), 1.5 * plain_error.max().item())
    of_the_map = torch.where(result.isnan(), -torch.inf, result).amax((1, 2))
    assert torch.equal(score.nan_to_num(nan=-torch.inf), of_the_map), "a score is its map's maximum, bit by bit"
    assert torch.equal(score.isnan(), expected_score.isnan())
    return result


@pytest.mark.parametrize("maxima", [MAXIMA, None], ids=["given", "taken"])
@pytest.mark.parametrize("size", [(13, 37), (5, 7), (40, 3), (2, 2), (1, 1), (1, 9), (9, 1)])
def test_map_and_score_are_the_twins(
    size: tuple[int, int], maxima: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_strips(monkeypatch)
    scales = log_probs([(5, 7), (3, 4), (1, 2)])
    check(scales, size, maxima[:3] if maxima else None)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 11), st.integers(1, 40)),
    batch=st.integers(1, 2),
    taken=st.booleans(),
    order=st.permutations([0, 1, 2]),
    step=st.integers(1, 2),
)
def test_any_shape_and_any_strides(
    shapes: list[tuple[int, int]], size: tuple[int, int], batch: int, taken: bool, order: list[int], step: int
) -> None:
    scales = [_laid_out(scale, order, step) for scale in log_probs(shapes, batch)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_strips(monkeypatch)
        check(scales, size, None if taken else MAXIMA[: len(shapes)])


def _laid_out(x: Tensor, order: list[int], step: int) -> Tensor:
    """The same values with dimensions in memory by `order`, and gaps between the columns where step is 2."""
    wide = x.repeat_interleave(step, dim=2)
    inverse = sorted(range(3), key=order.__getitem__)
    return wide.permute(order).contiguous().permute(inverse)[:, :, ::step]


def test_eight_scales_with_the_configuration_of_a_model() -> None:
    check(log_probs([(3, 2)] * 4 + [(2, 3)] * 4, batch=1), (5, 6), MAXIMA * 2)
    assert select_tail(8, 1, 256, 256).warps == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("maxima", [MAXIMA, None], ids=["given", "taken"])
def test_value_that_is_not_finite_reaches_as_far_as_in_the_twin(
    value: float, maxima: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_strips(monkeypatch)
    scales = log_probs([(5, 7), (13, 4)])
    scales[0][1, 2, 3] = scales[1][1, 12, 0] = value
    result = check(scales, (13, 13), maxima[:2] if maxima else None)
    assert 0 < int(result[1].isnan().sum()) < 40
    assert not result[0].isnan().any()
    assert not result.isinf().any()


@pytest.mark.parametrize("maxima", [MAXIMA, None], ids=["given", "taken"])
def test_image_without_a_finite_position_has_no_score(maxima: list[float] | None) -> None:
    scales = log_probs([(2, 3), (1, 1)])
    scales[1][1] = math.nan
    result = check(scales, (3, 4), maxima[:2] if maxima else None)
    assert result[1].isnan().all()
    scales[1][:] = math.nan
    assert check(scales, (3, 4), maxima[:2] if maxima else None).isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_likelihood_above_its_maximum_is_no_anomaly() -> None:
    assert not check([torch.full((1, 3, 3), 95.0)], (4, 4), [0.0]).any()


def test_no_value_is_negative() -> None:
    """Weights of 7 to 12 columns round to sums above 1."""
    ones = [torch.zeros(1, 7, 7)] * 3
    with guarded():
        result, score = anomaly_tail.anomaly_map(ones, (12, 12), [0.0] * 3)
    assert result.min() >= 0
    assert 0 <= score.item() < 1e-6
    assert twin.anomaly_map(ones, (12, 12), [0.0] * 3)[0].min() >= 0


def test_results_are_the_same_for_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so from run to run, in whatever order programs finish."""
    scales, results = log_probs([(5, 7), (3, 4)]), []
    for changes in ({}, {"rows": 16}, {"columns": 64, "rows": 2}, {"peak_programs": 4, "block": 16}):
        small_strips(monkeypatch, **changes)
        results.append(anomaly_tail.anomaly_map(scales, (9, 33), None))
    for (one, one_score), (other, other_score) in pairwise(results):
        assert torch.equal(one, other)
        assert torch.equal(one_score, other_score)


def test_empty_batch_has_an_empty_map_and_no_launch() -> None:
    with guarded() as guard:
        result, score = anomaly_tail.anomaly_map([scale[:0] for scale in log_probs([(2, 2)])], (3, 4), None)
    assert (result.shape, score.shape, guard.launches) == ((0, 3, 4), (0,), [])


def test_inputs_are_left_as_they_are() -> None:
    scales = log_probs([(2, 3)])
    check(scales, (3, 4), None)
    assert torch.equal(scales[0], log_probs([(2, 3)])[0])


def test_one_launch_with_maxima_and_three_without() -> None:
    for maxima, launches in ((MAXIMA[:1], ["tail_kernel"]), (None, ["peaks_kernel", "tail_kernel", "finish_kernel"])):
        with guarded() as guard:
            anomaly_tail.anomaly_map(log_probs([(2, 3)]), (3, 4), maxima)
        assert [launch.name for launch in guard.launches] == launches


def test_other_precisions_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes float32, scale 1 is torch\.float64"):
        anomaly_tail.anomaly_map([torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).double()], (3, 3), None)


def test_launch_is_planned_without_data() -> None:
    """3 x 10^9 pixels: their number is beyond 32 bits, a program's number is not."""
    scales = [torch.empty(3, 8, 8, device="meta")]
    result, bits = torch.empty(3, 1 << 15, 1 << 15, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    config = select_tail(1, *result.shape)
    launch = anomaly_tail.plan_tail(scales, [0.0], None, result, bits, config)
    assert launch.grid == (3 * (1 << 15) // 128 * (1 << 15) // config.rows,)
    assert config.rows == 32


@pytest.mark.parametrize(("batch", "rows"), [(1, 4), (8, 4), (16, 8), (32, 16), (128, 32)])
def test_strips_are_as_tall_as_a_full_card_allows(batch: int, rows: int) -> None:
    assert select_tail(3, batch, 256, 256).rows == rows
