"""What tests share: the tiny model and images that it can tell apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cflow_fast.datasets import load_images
from cflow_fast.encoders import calibrate_batch_norm
from cflow_fast.model import CFlowAD
from cflow_fast.recipes import Recipe

SIZE = 64
TINY: dict[str, Any] = {
    "encoder": "resnet18",
    "layers": ("layer1", "layer2"),
    "coupling_blocks": 2,
    "condition": 8,
    "pretrained": False,
    "image_size": SIZE,
    "precision": "fp32",
}
RECIPE = Recipe(
    learning_rate=2e-3,
    epochs=1,
    passes=1,
    images=None,
    vectors=64,
    steps=4,
    drop_remainder=False,
    warmup_epochs=0.05,
    warmup_from=0.1,
    decay_to=0.01,
    decay_every_step=True,
    rotation=0.0,
    loss="likelihood",
)


def texture(random: np.random.Generator, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """A grey weave with some noise, (H, W, 3) uint8."""
    rows, columns = np.indices(size)
    weave = 128 + 40 * np.sin(rows * 0.8) * np.sin(columns * 0.8)
    return np.clip(weave[..., None] + random.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)


def save_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def read(paths: Sequence[Path]) -> Tensor:
    """All images of a list in one batch, at the tiny model's size."""
    batches = load_images(paths, (SIZE, SIZE), len(paths), on_skip=lambda path, reason: pytest.fail(reason))
    return next(iter(batches)).images


def tiny_model(**options: Any) -> CFlowAD:
    """Untrained, always with the same weights; batch norms that let something through."""
    return copy.deepcopy(_tiny_model(tuple(options.items())))


@cache
def _tiny_model(options: tuple[tuple[str, Any], ...]) -> CFlowAD:
    torch.manual_seed(0)
    model = CFlowAD(**TINY | dict(options))
    random = np.random.default_rng(9)
    images = np.stack([texture(random) for _ in range(6)]).transpose(0, 3, 1, 2)
    calibrate_batch_norm(model.encoder, [torch.from_numpy(images / 255.0)])
    return model.eval()


def calibrated_model(paths: Sequence[Path], **options: Any) -> CFlowAD:
    """Maxima from all images but the last four, thresholds from those."""
    model = tiny_model(**options)
    images = read(paths)
    model.calibrate_maxima([images[:-4]])
    model.calibrate_thresholds([prediction.score for prediction in model.predict(images[-4:])], 0.2)
    return model


def same_tensors(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two modules' state dicts are the same bit by bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


def recipe(**numbers: Any) -> Recipe:
    """A few small steps, but for the numbers given."""
    return replace(RECIPE, **numbers)
