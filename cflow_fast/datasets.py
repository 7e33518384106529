"""Folders of images, MVTec AD's category layout, and images loaded in batches that survive unreadable files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cflow_fast.errors import DataError
from cflow_fast.images import IMAGE_SUFFIXES, as_rgb, open_image, read_image, resize, to_tensor

GOOD = "good"
LAYOUT = "train/good/*, test/<defect>/* and ground_truth/<defect>/*_mask.png"


@dataclass(frozen=True)
class Sample:
    """A test image, its defect's name ("good" for none) and, where it is defective, the file of its mask."""

    path: Path
    defect: str
    mask_path: Path | None

    @property
    def is_defective(self) -> bool:
        return self.defect != GOOD


class MVTecCategory:
    """A category in MVTec AD's layout: train/good/*, test/<defect>/* and ground_truth/<defect>/<stem>_mask.png.

    The folders are read when `train` or `test` is first asked for, so that either may be missing until it is needed.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    @staticmethod
    def is_category(path: str | os.PathLike[str]) -> bool:
        """Whether a folder is laid out as a category (has a folder train or test), not as a plain folder of images."""
        return any((Path(path) / part).is_dir() for part in ("train", "test"))

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @cached_property
    def train(self) -> list[Path]:
        """The good images to train on, sorted. Raises DataError when there are none."""
        self._require(self.root / "train" / GOOD)
        return find_images(self.root / "train" / GOOD)

    @cached_property
    def test(self) -> list[Sample]:
        """The test images, sorted by defect and name.

        Raises DataError when there are none, or when a defective image has no mask.
        """
        folder = self.root / "test"
        self._require(folder)
        defects = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not defects:
            raise DataError(f"{folder} holds no folder of images; a category is laid out as {LAYOUT}")
        return [self._sample(path) for defect in defects for path in find_images(defect)]

    def check(self) -> None:
        """Raise the DataError that `train` or `test` would."""
        _ = self.train, self.test

    def _require(self, folder: Path) -> None:
        if not self.root.is_dir():
            what = "a file, not a folder" if self.root.exists() else "missing"
            raise DataError(f"{self.root} is {what}; name a category, laid out as {LAYOUT}")
        if not folder.is_dir():
            raise DataError(
                f"{self.root} has no folder {folder.relative_to(self.root)}; a category is laid out as {LAYOUT}"
            )

    def _sample(self, path: Path) -> Sample:
        defect = path.parent.name
        if defect == GOOD:
            return Sample(path, defect, None)
        mask_path = self.root / "ground_truth" / defect / f"{path.stem}_mask.png"
        if not mask_path.is_file():
            raise DataError(f"{path} has no mask: there is no file {mask_path}; add it or remove the image")
        return Sample(path, defect, mask_path)


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """List a folder's image files, sorted by name; subfolders are not searched and hidden files are ignored.

    Raises DataError when the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is {'a file, not a folder' if folder.exists() else 'missing'}; name a folder of images"
        )
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder} holds no image; files that end in {suffixes} are read, subfolders are not searched")
    return paths


def read_mask(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """Read a sample's ground truth as bool (H, W), true on the defect; all false for a good sample.

    `size` is the image's own (height, width). In the file any value or colour but zero or black is defect, be it 1
    or 255. Raises DataError, naming both files, when the mask has another size than its image.
    """
    if not sample.is_defective:
        return np.zeros(size, dtype=bool)
    if sample.mask_path is None:
        raise DataError(f"{sample.path} has a defect, {sample.defect}, but no mask; give it one")
    mask = open_image(sample.mask_path)
    height, width = size
    if mask.size != (width, height):
        raise DataError(
            f"mask {sample.mask_path} is {mask.width} x {mask.height} (width x height), but its image {sample.path} "
            f"is {width} x {height}; make them the same size"
        )
    if mask.mode == "F" or mask.mode.startswith("I"):  # as 8-bit RGB, a 16-bit 1 would be 0
        return np.array(mask) > 0
    colours: np.ndarray = np.asarray(as_rgb(mask, name=str(sample.mask_path)))
    return colours.max(axis=2) > 0


class LoadedImage(NamedTuple):
    """An image of a list: its position there, the tensor (3, H, W) at the wanted size, and its file's (height, width).

    For an unreadable file the tensor is None, the size (0, 0), and `error` the line that says why.
    """

    position: int
    tensor: torch.Tensor | None
    original_size: tuple[int, int]
    error: str | None


class ImageDataset(Dataset[LoadedImage]):
    """Image files as tensors in [0, 1] resized to `size` = (height, width).

    An unreadable file is an item with an error, never an exception.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths = list(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> LoadedImage:
        try:
            image = read_image(self.paths[position])
        except DataError as error:
            return LoadedImage(position, None, (0, 0), str(error))
        tensor = resize(to_tensor(image)[None], self.size)[0]
        return LoadedImage(position, tensor, (image.height, image.width), None)


class ImageBatch(NamedTuple):
    """Images that could be read: their indices in the list of paths, (B, 3, H, W), and their files' sizes."""

    indices: list[int]
    images: torch.Tensor
    original_sizes: list[tuple[int, int]]


def load_images(
    paths: Sequence[Path],
    size: tuple[int, int],
    batch_size: int = 32,
    workers: int = 0,
    *,
    on_skip: Callable[[Path, str], None],
) -> Iterator[ImageBatch]:
    """Load image files in order, resized to `size` = (height, width), in batches of at most `batch_size`.

    An unreadable file is left out of its batch and reported by on_skip(path, error) before the batch is yielded; a
    batch that loses all its files is not yielded. `workers` processes read ahead (0: reading is done by the caller).
    """
    loader = DataLoader(
        ImageDataset(paths, size),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # reading files leaves the global random state alone
    )
    for batch, errors in loader:
        for position, error in errors:
            on_skip(paths[position], error)
        if batch is not None:
            yield batch


def _collate(items: list[LoadedImage]) -> tuple[ImageBatch | None, list[tuple[int, str]]]:
    errors = [(item.position, item.error) for item in items if item.error is not None]
    loaded = [(item, item.tensor) for item in items if item.tensor is not None]
    if not loaded:
        return None, errors
    batch = ImageBatch(
        indices=[item.position for item, _ in loaded],
        images=torch.stack([tensor for _, tensor in loaded]),
        original_sizes=[item.original_size for item, _ in loaded],
    )
    return batch, errors
