"""The anomaly map against a literal re-implementation, and what it promises about batches and bad values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cflow_fast.anomaly import anomaly_map

SHAPES = [(5, 7), (3, 4), (1, 2)]
SIZE = (13, 10)
MAXIMA = [-1.1, -0.9, -1.4]


def log_probs(batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Log-likelihoods per dimension: about -1.4, some above the maxima and one defect far below."""
    generator = torch.Generator().manual_seed(seed)
    scales = [-1.4 + 0.3 * torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in SHAPES]
    scales[0][0, 2, 3] = -9.0
    return scales


def upsample(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with aligned corners: the first and last samples of both grids coincide."""
    (rows, columns), (height, width) = image.shape, size
    result = np.empty(size)
    for i in range(height):
        for j in range(width):
            y = i * (rows - 1) / (height - 1)
            x = j * (columns - 1) / (width - 1)
            top, left = min(int(y), max(rows - 2, 0)), min(int(x), max(columns - 2, 0))
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            down, along = y - top, x - left
            result[i, j] = (1 - down) * ((1 - along) * image[top, left] + along * image[top, right]) + down * (
                (1 - along) * image[bottom, left] + along * image[bottom, right]
            )
    return result


def literal_map(scales: list[Tensor], size: tuple[int, int], maxima: list[float] | None) -> np.ndarray:
    batch = len(scales[0])
    total = np.zeros((batch, *size))
    for scale, tensor in enumerate(scales):
        values = tensor.double().numpy()
        peak = values.max() if maxima is None else maxima[scale]
        probability = np.exp(values - peak)
        if maxima is not None:
            probability = np.minimum(probability, 1.0)
        for image in range(batch):
            total[image] += upsample(probability[image], size)
    return (total.max() if maxima is None else len(scales)) - total


@pytest.mark.parametrize("maxima", [None, MAXIMA])
@pytest.mark.parametrize("size", [SIZE, (5, 7), (2, 2), (40, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_map_is_the_formulas(
    maxima: list[float] | None, size: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    scales = log_probs(dtype=dtype)
    result = anomaly_map(scales, size, maxima)
    assert (result.shape, result.dtype) == ((3, *size), dtype)
    np.testing.assert_allclose(result, literal_map(scales, size, maxima), rtol=0, atol=tolerance)


def test_corners_of_the_map_are_corners_of_the_scales() -> None:
    scales = log_probs()
    probability = [torch.exp(scale - peak).clamp(max=1) for scale, peak in zip(scales, MAXIMA, strict=True)]
    expected = 3 - sum(p[:, [0, 0, -1, -1], [0, -1, 0, -1]] for p in probability)
    corners = anomaly_map(scales, SIZE, MAXIMA)[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, expected, rtol=0, atol=1e-12)


def test_one_number_is_a_square() -> None:
    assert torch.equal(anomaly_map(log_probs(), 9, MAXIMA), anomaly_map(log_probs(), (9, 9), MAXIMA))


def test_map_lies_between_zero_and_the_number_of_scales_and_rises_where_likelihood_falls() -> None:
    scales = log_probs()
    before = anomaly_map(scales, SIZE, MAXIMA)
    scales[0][1, 2, 3] = -50.0  # the centre of its scale
    after = anomaly_map(scales, SIZE, MAXIMA)
    assert before.min() >= 0
    assert after.max() <= 3
    rise = (after - before)[1]
    assert rise.min() >= 0
    assert rise.argmax() in (6 * 10 + 4, 6 * 10 + 5), "the middle of 13 rows and 10 columns"
    assert not (after - before)[[0, 2]].any()


def test_image_scores_the_same_alone_and_in_any_batch_once_calibrated() -> None:
    scales = log_probs(batch=4)
    together = anomaly_map(scales, SIZE, MAXIMA)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(anomaly_map([scale[order] for scale in scales], SIZE, MAXIMA), together[order])
    for image in range(4):
        alone = anomaly_map([scale[image : image + 1] for scale in scales], SIZE, MAXIMA)
        torch.testing.assert_close(alone[0], together[image], rtol=0, atol=1e-12)


def test_published_normalisation_scores_an_image_by_its_batch() -> None:
    scales = log_probs(batch=2)
    scales[0][1] += 1.0
    alone = anomaly_map([scale[:1] for scale in scales], SIZE)
    assert (anomaly_map(scales, SIZE)[:1] - alone).abs().max() > 0.1
    assert anomaly_map(scales, SIZE).min() == 0


def test_likelihood_above_the_maximum_is_normal_and_not_more() -> None:
    assert not anomaly_map([torch.full((1, 3, 3), 5.0)], 4, [0.0]).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("maxima", [None, MAXIMA])
def test_value_that_is_not_finite_reaches_its_neighbours_alone_and_is_never_a_score(
    value: float, maxima: list[float] | None
) -> None:
    """Image 1, scale 0, row 4 of 5, column 0 of 7: rows 9.. of 13 and columns ..1 of 10 interpolate with it."""
    clean, spoilt = log_probs(), log_probs()
    peak = clean[0].max()
    clean[0][1, 4, 0] = spoilt[0][1, 4, 0] = peak - 1  # the maximum lies elsewhere
    spoilt[0][1, 4, 0] = value
    result, expected = anomaly_map(spoilt, SIZE, maxima), anomaly_map(clean, SIZE, maxima)
    affected = torch.zeros(3, *SIZE, dtype=torch.bool)
    affected[1, 9:, :2] = True
    assert result[1, 12, 0].isnan()
    assert result[1, 10:, :2].isnan().all()
    torch.testing.assert_close(result[~affected], expected[~affected], rtol=0, atol=1e-12)
    assert not result.isinf().any()


def test_scale_without_a_finite_value_is_nan_throughout() -> None:
    scales = log_probs()
    scales[1][:] = math.nan
    for maxima in (None, MAXIMA):
        assert anomaly_map(scales, SIZE, maxima).isnan().all()


def test_inputs_are_left_as_they_are() -> None:
    scales = log_probs()
    for maxima in (None, MAXIMA):
        anomaly_map(scales, SIZE, maxima)
    for scale, before in zip(scales, log_probs(), strict=True):
        assert torch.equal(scale, before)


def test_layout_in_memory_does_not_matter() -> None:
    scales = log_probs()
    strided = [scale.permute(2, 0, 1).contiguous().permute(1, 2, 0) for scale in scales]
    assert torch.equal(anomaly_map(strided, SIZE, MAXIMA), anomaly_map(scales, SIZE, MAXIMA))


def test_empty_batch_has_an_empty_map() -> None:
    for maxima in (None, MAXIMA):
        assert anomaly_map(log_probs(batch=3), SIZE, maxima)[:0].shape == (0, *SIZE)
        assert anomaly_map([scale[:0] for scale in log_probs()], SIZE, maxima).shape == (0, *SIZE)


@pytest.mark.parametrize(
    ("scales", "size", "maxima", "error", "message"),
    [
        ([], 8, None, ValueError, "at least one scale of log-likelihoods, got none"),
        ([torch.zeros(2, 3)], 8, None, ValueError, r"shape \(B, H, W\) with one B, scale 0 has \(2, 3\)"),
        ([torch.zeros(2, 3, 3), torch.zeros(1, 3, 3)], 8, None, ValueError, r"with one B, scale 1 has \(1, 3, 3\)"),
        ([torch.zeros(2, 0, 3)], 8, None, ValueError, r"scale 0 has no positions: \(2, 0, 3\)"),
        ([torch.zeros(2, 3, 3).long()], 8, None, TypeError, "floating point, scale 0 is torch.int64"),
        ([torch.zeros(2, 3, 3) + 0j], 8, None, TypeError, "floating point, scale 0 is torch.complex64"),
        ([torch.zeros(2, 3, 3)], 8, [0.0, 0.0], ValueError, "expected 1 maxima, one per scale, got 2"),
        ([torch.zeros(2, 3, 3)], 8, [math.nan], ValueError, r"log_prob_max holds finite numbers, got \[nan\]"),
        ([torch.zeros(2, 3, 3)], (8, 0), None, ValueError, r"size is positive, got \(8, 0\)"),
        ([torch.zeros(2, 3, 3)], -1, None, ValueError, r"size is positive, got \(-1, -1\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    scales: list[Tensor], size: Any, maxima: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        anomaly_map(scales, size, maxima)


@pytest.mark.parametrize("maxima", [None, [0.5, 0.25]])
def test_gradients_are_those_of_the_formula(maxima: list[float] | None) -> None:
    scales = [torch.randn(2, n, n, dtype=torch.float64).requires_grad_() for n in (3, 2)]
    assert torch.autograd.gradcheck(lambda *given: anomaly_map(given, (5, 4), maxima), scales)
