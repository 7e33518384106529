"""A small model and a category of images for it; threads; memory that shows what nobody has written."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated; before anything imports triton

import numpy as np
import pytest
import torch
from compiled_code import With, stale_empty
from tiny import calibrated_model, save_image, texture

from cflow_fast.kernels import cpu_flow, cpu_library, cpu_map, tuning
from cflow_fast.model import CFlowAD

GOOD_IMAGES = 12


@pytest.fixture(scope="session")
def category(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category in MVTec AD's layout, of images of two sizes: 12 to train on, 3 good ones and 3 scratched to test on.

    Shared by all tests: copy it before changing it.
    """
    root = tmp_path_factory.mktemp("data") / "cloth"
    random = np.random.default_rng(0)
    for number in range(GOOD_IMAGES):
        save_image(root / f"train/good/{number:03}.png", texture(random))
    for number, size in enumerate([(64, 64), (48, 80), (64, 64)]):
        save_image(root / f"test/good/{number:03}.png", texture(random, size))
        pixels, mask = texture(random, size), np.zeros(size, np.uint8)
        mask[20:30, 12:40] = 255
        pixels[mask > 0] = (250, 20, 20)
        save_image(root / f"test/scratch/{number:03}.png", pixels)
        save_image(root / f"ground_truth/scratch/{number:03}_mask.png", mask)
    return root


@pytest.fixture(scope="session")
def good_paths(category: Path) -> list[Path]:
    return sorted((category / "train/good").iterdir())


@pytest.fixture(scope="session")
def _calibrated(good_paths: list[Path]) -> CFlowAD:
    return calibrated_model(good_paths)


@pytest.fixture
def model(_calibrated: CFlowAD) -> CFlowAD:
    """A tiny model with maxima and thresholds from good images; the test may change it."""
    return copy.deepcopy(_calibrated)


@pytest.fixture
def stale_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiled code is given to write to is NaN."""
    for module in (cpu_library, cpu_flow, cpu_map):
        monkeypatch.setattr(module, "torch", With(torch, empty=stale_empty))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def tuning_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A card's own table goes nowhere else, and none is there."""
    monkeypatch.setenv("CFLOW_FAST_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tuning.cache_path("Some Card")
    tuning.forget()
