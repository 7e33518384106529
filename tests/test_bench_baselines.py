"""PaDiM and SPADE against brute force in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from tiny import read, tiny_model
from torch import Tensor

from cflow_fast.bench.baselines import SPADE, PaDiM, maps, padim, spade
from cflow_fast.datasets import MVTecCategory, read_mask
from cflow_fast.encoders import Encoder
from cflow_fast.errors import DataError


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """ResNet-18's layer1 and layer2, random weights: 64 and 128 channels."""
    return tiny_model().encoder


@pytest.fixture(scope="module")
def good(good_paths: list[Path]) -> Tensor:
    return read(good_paths)


def embeddings(encoder: Encoder, images: Tensor) -> np.ndarray:
    """(B, h, w, 192): layer2's vector repeated for the four positions of layer1 that it covers, in float64."""
    first, second = (maps.permute(0, 2, 3, 1).double().numpy() for maps in encoder(images))
    return np.concatenate([first, second.repeat(2, axis=1).repeat(2, axis=2)], axis=3)


def test_padim_is_the_mahalanobis_distance_in_float64(encoder: Encoder, good: Tensor) -> None:
    fitted = PaDiM(encoder, channels=30, seed=3).fit(good[:10].split(4))
    distances = fitted.distances(good[10:]).numpy()
    selected = fitted.selected.numpy()
    train, test = (embeddings(encoder, images)[..., selected] for images in (good[:10], good[10:]))
    for row, column in [(0, 0), (3, 12), (15, 15)]:
        x = train[:, row, column]
        inverse = np.linalg.inv(np.cov(x.T) + 0.01 * np.eye(30))
        deviation = test[:, row, column] - x.mean(0)
        expected = np.sqrt(np.einsum("bi,ij,bj->b", deviation, inverse, deviation))
        np.testing.assert_allclose(distances[:, row, column], expected, rtol=1e-5)


def test_spade_is_the_nearest_position_of_the_nearest_images(encoder: Encoder, good: Tensor) -> None:
    fitted = SPADE(encoder, neighbours=3).fit(good[:10].split(4))
    last = [encoder(images)[-1].double().mean((2, 3)).numpy() for images in (good[:10], good[10:])]
    train, test = (embeddings(encoder, images) for images in (good[:10], good[10:]))
    _, scores = fitted.predict(good[10:])
    distances = [fitted._distances(*pair) for pair in _queries(fitted, good[10:])]
    for index in range(2):
        to_images = np.linalg.norm(last[0] - last[1][index], axis=1)
        nearest = np.argsort(to_images)[:3]
        np.testing.assert_allclose(scores[index], np.square(to_images[nearest]).mean(), rtol=1e-4)
        gallery = train[nearest].reshape(-1, 192)
        queries = test[index].reshape(-1, 192)
        expected = np.array([np.linalg.norm(gallery - query, axis=1).min() for query in queries])
        np.testing.assert_allclose(distances[index].numpy().ravel(), expected, rtol=1e-3, atol=1e-3)


def _queries(fitted: SPADE, images: Tensor) -> list[tuple[Tensor, list[int]]]:
    features = maps.encode(fitted.encoder, images)
    _, nearest = fitted._neighbours(features[-1].mean((2, 3)))
    return list(zip(maps.pyramid(features).permute(0, 2, 3, 1), nearest.tolist(), strict=True))


@pytest.mark.parametrize("method", ["padim", "spade"])
def test_an_images_map_does_not_depend_on_its_batch(encoder: Encoder, good: Tensor, method: str) -> None:
    fitted = (PaDiM(encoder, 20) if method == "padim" else SPADE(encoder, 2)).fit([good[:8]])
    together = fitted.anomaly_map(good[8:])
    alone = torch.cat([fitted.anomaly_map(image.unsqueeze(0)) for image in good[8:]])
    backwards = fitted.anomaly_map(good[8:].flip(0)).flip(0)
    assert together.shape == (4, 64, 64)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together, backwards, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["padim", "spade"])
def test_a_planted_defect_is_found_where_it_is(encoder: Encoder, good: Tensor, category: Path, method: str) -> None:
    fitted = (PaDiM(encoder) if method == "padim" else SPADE(encoder)).fit(good.split(5))
    samples = [sample for sample in MVTecCategory(category).test if "001" not in sample.path.name]  # 64 x 64 px ones
    found = fitted.anomaly_map(read([sample.path for sample in samples]))
    highest = dict(zip([s.path for s in samples], found.amax((1, 2)).tolist(), strict=True))
    defective = [sample for sample in samples if sample.is_defective]
    assert min(highest[s.path] for s in defective) > max(highest[s.path] for s in samples if not s.is_defective)
    for sample, one in zip(samples, found.numpy(), strict=True):
        if sample.is_defective:
            mask = read_mask(sample, (64, 64))
            assert mask[np.unravel_index(one.argmax(), one.shape)]


def test_the_smoothing_is_a_gaussian_filter_that_mirrors_the_edges() -> None:
    noise = torch.rand(2, 1, 40, 51, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.stack([gaussian_filter(one[0].numpy(), 4.0, mode="mirror", truncate=4.0) for one in noise])
    np.testing.assert_allclose(maps.smooth(noise)[:, 0], expected, atol=1e-12)
    with pytest.raises(ValueError, match="larger than 16 px"):
        maps.smooth(noise[..., :16])


def test_the_draw_of_channels_is_the_seeds(encoder: Encoder) -> None:
    first, same, other = (PaDiM(encoder, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(first.selected, same.selected)
    assert not torch.equal(first.selected, other.selected)
    assert padim.default_channels("resnet18", 448) == 100
    assert padim.default_channels("wide_resnet50_2.tv_in1k", 1792) == 550
    assert padim.default_channels("mobilenetv3_large_100", 312) == 96


def test_what_is_kept_weighs_what_is_counted(encoder: Encoder, good: Tensor) -> None:
    gaussians = PaDiM(encoder, 20).fit([good])
    gallery = SPADE(encoder).fit([good])
    assert gaussians.memory_bytes == padim.counted_bytes(20, 16 * 16) + 8 * 20
    assert gallery.memory_bytes == spade.counted_bytes([64, 128], [16 * 16, 8 * 8], len(good)) + 4 * 128 * len(good)
    assert gaussians.model_bytes - gaussians.memory_bytes == maps.encoder_bytes(encoder) > 0


def test_what_cannot_be_done_is_said(encoder: Encoder, good: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="from 1 to 192"):
        PaDiM(encoder, 193)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SPADE(encoder, 0)
    with pytest.raises(DataError, match="at least 2 images, got 1"):
        PaDiM(encoder, 8).fit([good[:1]])
    with pytest.raises(DataError, match="fit it first"):
        SPADE(encoder).anomaly_map(good)
    for fitted in (PaDiM(encoder, 8).fit([good]), SPADE(encoder).fit([good])):
        with pytest.raises(ValueError, match="was fitted at"):
            fitted.anomaly_map(torch.zeros(1, 3, 96, 96))
    monkeypatch.setattr(maps, "free_bytes", lambda device: 1000)
    with pytest.raises(maps.NotEnoughMemoryError, match=r"PaDiM needs .* GB"):
        PaDiM(encoder, 8).fit([good])
    with pytest.raises(maps.NotEnoughMemoryError, match="SPADE's gallery needs"):
        SPADE(encoder).fit([good])
