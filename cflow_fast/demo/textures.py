"""Small inspection data sets from photographs of real materials, in MVTec AD's layout and without a download.

scikit-image's wheel carries photographs of a brick wall, gravel and grass (CC0, grey, 512 x 512). An image is a crop of
one of them, from another place, at another angle and in another light each time. Test images come from the left part of
the photograph and training images from the rest: they share no pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from skimage.transform import AffineTransform, warp

from cflow_fast.demo.defects import KINDS, add_defect
from cflow_fast.errors import DataError
from cflow_fast.files import atomic_path

TEXTURES: dict[str, Callable[[], np.ndarray]] = {"brick": data.brick, "gravel": data.gravel, "grass": data.grass}
IMAGE_SIZE = 256  # pixels, square
SPLIT = 200  # the photograph's columns before this one are for the test images
CROP = 128.0  # the side of a crop in the photograph's pixels, before it is scaled to IMAGE_SIZE
LIGHT = np.array([-0.6, -0.8])  # towards the light in the photographs, (x, y)
SENSOR_NOISE = 0.008  # standard deviation, of a range of 1


@dataclass(frozen=True)
class Crop:
    """One image (H, W) uint8, the same without its defect (`clean`, uint8), and where they differ (`mask`, bool)."""

    image: np.ndarray
    clean: np.ndarray
    mask: np.ndarray


def make_textures(
    out: str | Path, seed: int = 0, train: int = 60, validation: int = 40, good: int = 30, defects: int = 8
) -> list[Path]:
    """Write the categories brick, gravel and grass under `out` and return their folders.

    Each holds `train` good images, `good` good test images, `defects` test images of every kind in KINDS, and
    `validation` more good images from the test side: thresholds set on the training side need not hold on another part
    of the material. All are 8-bit grey PNG of IMAGE_SIZE pixels, masks are 0 and 255. The same seed gives the same
    pixels, and image i of a folder does not depend on how many there are. Raises DataError when a category's folder
    already holds other images.
    """
    folders = [Path(out) / texture for texture in TEXTURES]
    members = list(_members(train, validation, good, defects))
    for folder in folders:
        _refuse_other_images(folder, members)
    for folder in folders:
        for part, kind, index in members:
            crop = make_crop(folder.name, part, kind, index, seed)
            _write(crop.image, _image_path(folder, part, kind, index))
            if kind != "good":
                _write(crop.mask.astype(np.uint8) * 255, _mask_path(folder, kind, index))
    return folders


def make_crop(texture: str, part: str, kind: str, index: int, seed: int = 0) -> Crop:
    """Image `index` of the folder part/kind ("train/good", "test/hole", ...) that make_textures writes of a texture."""
    streams = ["train/good", "test/good", *(f"test/{defect}" for defect in KINDS), "validation/good"]
    rng = np.random.default_rng([seed, list(TEXTURES).index(texture), streams.index(f"{part}/{kind}"), index])
    photograph = TEXTURES[texture]() / 255.0
    surface, light = _view(photograph[:, SPLIT:] if part == "train" else photograph[:, :SPLIT], rng)
    take = _camera(rng)
    clean = take(surface)
    if kind == "good":
        return Crop(clean, clean, np.zeros(clean.shape, dtype=bool))
    defective, mask = add_defect(surface, kind, rng, light)
    image = np.where(mask, take(defective), clean)
    # Where rounding hid the change, one grey level keeps the mask exact.
    image = np.where(mask & (image == clean), np.where(clean < 128, clean + 1, clean - 1), image)
    return Crop(image.astype(np.uint8), clean, mask)


def _view(side: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A crop inside one side of a photograph and the direction of the light in it: a little turned, maybe mirrored."""
    scale = CROP * rng.uniform(0.96, 1.04) / IMAGE_SIZE
    angle, mirror = np.deg2rad(rng.uniform(-6.0, 6.0)), rng.choice([-1.0, 1.0])
    turn = np.array([[mirror * np.cos(angle), -np.sin(angle)], [mirror * np.sin(angle), np.cos(angle)]])
    reach = 0.5 * scale * IMAGE_SIZE * (np.cos(angle) + np.abs(np.sin(angle)))
    centre = rng.uniform(reach, np.array(side.shape[::-1]) - 1.0 - reach)
    to_photograph = np.eye(3)
    to_photograph[:2, :2] = scale * turn
    to_photograph[:2, 2] = centre - scale * turn.sum(axis=1) * 0.5 * (IMAGE_SIZE - 1)
    surface = warp(side, AffineTransform(matrix=to_photograph), order=3, output_shape=(IMAGE_SIZE, IMAGE_SIZE))
    return surface, turn.T @ LIGHT


def _camera(rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """One exposure: light that falls off across the image, brightness, gamma and sensor noise, to 8 bits."""
    gain, gamma = rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1)
    fall_off, angle = rng.uniform(0.0, 0.2), rng.uniform(0.0, 2.0 * np.pi)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] / IMAGE_SIZE - 0.5
    illumination = gain * (1.0 + fall_off * (x * np.cos(angle) + y * np.sin(angle)))
    noise = SENSOR_NOISE * rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE))

    def take(surface: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(255.0 * (illumination * surface**gamma + noise)), 0, 255).astype(np.uint8)

    return take


def _members(train: int, validation: int, good: int, defects: int) -> Iterator[tuple[str, str, int]]:
    """(part, kind, index) of every image of a category."""
    counts = {("train", "good"): train, ("validation", "good"): validation, ("test", "good"): good}
    counts.update({("test", kind): defects for kind in KINDS})
    for (part, kind), count in counts.items():
        for index in range(count):
            yield part, kind, index


def _image_path(folder: Path, part: str, kind: str, index: int) -> Path:
    return folder / part / kind / f"{index:03d}.png"


def _mask_path(folder: Path, kind: str, index: int) -> Path:
    return folder / "ground_truth" / kind / f"{index:03d}_mask.png"


def _refuse_other_images(folder: Path, members: list[tuple[str, str, int]]) -> None:
    """An image left from a larger set, or somebody's own, would silently become part of this one."""
    ours = {_image_path(folder, *member) for member in members}
    ours |= {_mask_path(folder, kind, index) for _, kind, index in members if kind != "good"}
    for path in sorted(folder.rglob("*.png")):
        if path not in ours:
            raise DataError(f"{path} is not an image of this data set; choose another folder, or remove {folder} first")


def _write(pixels: np.ndarray, path: Path) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
