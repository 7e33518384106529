"""Predictions do not depend on how an image is handed over or on its company, and never hide what is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, read, save_image, texture
from torch import Tensor

from cflow_fast.errors import DataError
from cflow_fast.images import read_image
from cflow_fast.model import CFlowAD
from cflow_fast.prediction import Prediction

SIZES = [(64, 64), (48, 80), (130, 70), (64, 96), (32, 32)]


@pytest.fixture
def mixed_paths(tmp_path: Path) -> list[Path]:
    """Images of several sizes (H, W)."""
    random = np.random.default_rng(3)
    return [save_image(tmp_path / f"{number}.png", texture(random, size)) for number, size in enumerate(SIZES)]


def assert_same(first: list[Prediction], second: list[Prediction]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a.anomaly_map, b.anomaly_map, atol=1e-6, rtol=0)
        assert a.score == pytest.approx(b.score, abs=1e-6)


def test_scores_are_the_same_alone_in_a_batch_and_in_another_order(model: CFlowAD, mixed_paths: list[Path]) -> None:
    together = model.predict(mixed_paths)
    assert_same(together, [model.predict(path)[0] for path in mixed_paths])
    assert_same(together, model.predict(mixed_paths, batch_size=2))
    assert_same(together, model.predict(mixed_paths[::-1])[::-1])
    assert len({round(prediction.score, 5) for prediction in together}) == len(SIZES), "they differ from each other"


def test_maps_and_masks_have_the_original_size(model: CFlowAD, mixed_paths: list[Path]) -> None:
    predictions = model.predict(mixed_paths)
    assert [prediction.anomaly_map.shape for prediction in predictions] == SIZES
    masks = [prediction.mask for prediction in predictions]
    assert [mask.shape for mask in masks if mask is not None] == SIZES
    assert {prediction.anomaly_map.dtype for prediction in predictions} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "give",
    [
        lambda paths: paths,
        lambda paths: [str(path) for path in paths],
        lambda paths: (path for path in paths),
        lambda paths: [read_image(path) for path in paths],
        lambda paths: [np.array(read_image(path)) for path in paths],
        lambda paths: [paths[0], str(paths[1]), read_image(paths[2]), np.array(read_image(paths[3])), paths[4]],
    ],
    ids=["paths", "strings", "generator", "pil", "arrays", "mixture"],
)
def test_images_may_come_in_any_form(
    model: CFlowAD, mixed_paths: list[Path], give: Callable[[list[Path]], list[object]]
) -> None:
    assert_same(model.predict(give(mixed_paths)), model.predict(mixed_paths))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "give",
    [lambda path: path, str, read_image, lambda path: np.array(read_image(path)), lambda path: read([path])],
    ids=["path", "string", "pil", "array", "tensor"],
)
def test_a_single_image_needs_no_list(model: CFlowAD, good_paths: list[Path], give: Callable[[Path], object]) -> None:
    assert_same(model.predict(give(good_paths[0])), model.predict(good_paths[:1]))  # type: ignore[arg-type]


def test_tensors_are_predicted_as_their_files_are(model: CFlowAD, good_paths: list[Path]) -> None:
    assert_same(model.predict(read(good_paths)), model.predict(good_paths))
    assert_same(model.predict(read(good_paths).double(), batch_size=5), model.predict(good_paths))


def test_tensors_of_another_size_give_maps_of_that_size(model: CFlowAD) -> None:
    images = torch.rand(3, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    predictions = model.predict(images, batch_size=2)
    assert [prediction.anomaly_map.shape for prediction in predictions] == [(50, 70)] * 3
    np.testing.assert_allclose(np.stack([p.anomaly_map for p in predictions]), model(images).numpy(), atol=1e-6)


def test_grey_and_16_bit_files_are_predicted_as_what_they_show(model: CFlowAD, tmp_path: Path) -> None:
    grey = texture(np.random.default_rng(0))[:, :, 0]
    for name, pixels in {"l": grey, "rgb": np.dstack([grey] * 3), "deep": grey.astype(np.uint16) * 257}.items():
        save_image(tmp_path / f"{name}.png", pixels)
    rgb, *others = model.predict([tmp_path / f"{name}.png" for name in ("rgb", "l", "deep")])
    assert_same(others, [rgb, rgb])


@pytest.mark.parametrize("images", [[], torch.empty(0, 3, SIZE, SIZE)], ids=["list", "tensor"])
def test_no_image_gives_no_prediction(model: CFlowAD, images: list[str] | Tensor) -> None:
    assert model.predict(images) == []


def test_batches_of_nothing_are_refused(model: CFlowAD, good_paths: list[Path]) -> None:
    with pytest.raises(ValueError, match="batch_size is at least 1, got 0"):
        model.predict(good_paths, batch_size=0)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(3, SIZE, SIZE), ValueError, r"\(B, 3, H, W\), got \(3, 64, 64\)"),
        (torch.zeros(1, 1, SIZE, SIZE), ValueError, r"got \(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), TypeError, r"floating point .* got torch.uint8"),
        (torch.full((1, 3, SIZE, SIZE), 255.0), DataError, r"in \[0, 1\]: scale them"),
        (torch.full((1, 3, SIZE, SIZE), math.nan), DataError, "look for NaN"),
        (np.zeros((2, SIZE, SIZE, 3), np.uint8), DataError, r"image 0 has shape \(2, 64, 64, 3\)"),
        ([Image.new("RGB", (8, 8)), 5], TypeError, "image 1 is a int"),
    ],
)
def test_what_is_no_image_is_refused(model: CFlowAD, images: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        model.predict(images)  # type: ignore[arg-type]


def test_unreadable_file_is_named(model: CFlowAD, good_paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(good_paths[0].read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut\.png"):
        model.predict([good_paths[0], tmp_path / "cut.png"])


def test_verdict_and_mask_follow_the_thresholds(model: CFlowAD, good_paths: list[Path]) -> None:
    path = good_paths[0]
    score = model.predict(path)[0].score
    model.set_thresholds(score, score / 2)
    at_threshold = model.predict(path)[0]
    assert at_threshold.is_defective is False, "an alarm is strictly above"
    assert at_threshold.mask is not None
    np.testing.assert_array_equal(at_threshold.mask, at_threshold.anomaly_map > np.float32(score / 2))
    assert at_threshold.defects
    model.set_thresholds(np.nextafter(np.float32(score), np.float32(0)).item(), score)
    above = model.predict(path)[0]
    assert above.is_defective is True
    assert above.defects == ()


def test_model_without_thresholds_gives_scores_alone(model: CFlowAD, good_paths: list[Path]) -> None:
    scored = model.predict(good_paths[0])[0].score
    model.thresholds.fill_(math.nan)
    prediction = model.predict(good_paths[0])[0]
    assert (prediction.score, prediction.is_defective, prediction.mask) == (scored, None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [0, 1])
def test_features_that_are_not_finite_spoil_their_own_pixels_alone(
    model: CFlowAD, good_paths: list[Path], monkeypatch: pytest.MonkeyPatch, value: float, scale: int
) -> None:
    clean = model.predict(good_paths[:3])
    encode = model.features

    def damaged(images: Tensor) -> list[Tensor]:
        features = [feature.clone() for feature in encode(images)]
        features[scale][1, 5, 0, 0] = value
        return features

    monkeypatch.setattr(model, "features", damaged)
    with pytest.warns(UserWarning, match="1 of 3 images have features that are not finite"):
        first, middle, last = model.predict(good_paths[:3])
    assert_same([first, last], [clean[0], clean[2]])
    unknown = np.isnan(middle.anomaly_map)
    cell = SIZE // model.log_probs(read(good_paths[:3]))[scale].shape[1]  # image pixels of a feature vector
    assert 0 < middle.non_finite == unknown.sum() <= (2 * cell) ** 2
    assert unknown[:cell, :cell].all()
    np.testing.assert_allclose(middle.anomaly_map[~unknown], clean[1].anomaly_map[~unknown], atol=1e-6)
    assert middle.is_defective is True
    assert middle.mask is not None
    assert middle.mask[unknown].all()
    assert middle.defects[0].top == middle.defects[0].left == 0
    assert middle.score > 0


def test_image_with_no_finite_feature_has_no_score_and_is_defective(
    model: CFlowAD, good_paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model, "features", lambda images: [torch.full((1, 64, 16, 16), math.nan), torch.rand(1, 128, 8, 8)]
    )
    with pytest.warns(UserWarning, match="1 of 1 images"):
        prediction = model.predict(good_paths[0])[0]
    assert math.isnan(prediction.score)
    assert prediction.is_defective is True
    assert prediction.non_finite == SIZE * SIZE
    assert [(defect.area, math.isnan(defect.score)) for defect in prediction.defects] == [(SIZE * SIZE, True)]


def test_predictions_need_no_gradients_wherever_they_are_made(model: CFlowAD, good_paths: list[Path]) -> None:
    with torch.inference_mode():
        inside = model.predict(good_paths[:2])
    assert_same(model.predict(good_paths[:2]), inside)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(model.predict(read(good_paths[:2]).requires_grad_()), inside)
