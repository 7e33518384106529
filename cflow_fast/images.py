"""From image files, PIL images and arrays to the tensors that an encoder takes.

Every image becomes 8-bit RGB by these rules:

- EXIF orientation is applied and ICC profiles are ignored.
- Greyscale, palette, 1-bit and CMYK pixels become the colours that they stand for.
- Transparency is composited on black, so a transparent pixel is black whatever colour is hidden under it.
- 16-bit pixels are scaled by the 16-bit range, whatever part of it is used: the high byte, as Pillow itself reads
  16-bit RGB. 32-bit integers are taken as 16-bit ones.
- Floating-point pixels are in [0, 1].
- Of a file that holds several pictures, the first is read.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

from cflow_fast.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as 8-bit RGB, upright; the module's docstring has the rules.

    Raises DataError, naming the file, when it is missing, no image, cut short, or of pixels that the rules refuse.
    """
    return as_rgb(open_image(path), name=str(path))


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file in the mode and orientation that it is stored in. Raises DataError as `read_image` does."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise DataError(f"cannot read image {path}: there is no such file; check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"cannot read image {path}: it is a folder; name a file in it") from error
    except PermissionError as error:
        raise DataError(f"cannot read image {path}: permission denied; allow this user to read it") from error
    except UnidentifiedImageError as error:
        reason = "is empty" if Path(path).stat().st_size == 0 else "is no image in a format that can be read"
        raise DataError(f"cannot read image {path}: the file {reason}; replace it or remove it") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"cannot read image {path}: {_one_line(error)}; make it smaller") from error
    except Exception as error:  # Pillow's decoders raise nearly every type on a damaged file
        raise DataError(
            f"cannot read image {path}: it is cut short or damaged ({_one_line(error)}); replace it or remove it"
        ) from error


def as_rgb(image: Image.Image | np.ndarray, name: str = "image") -> Image.Image:
    """Convert an image in memory to 8-bit RGB, upright; the module's docstring has the rules.

    An array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4 with alpha), of bool, uint8, uint16, or floats in [0, 1].
    The result shares no memory with `image`. `name` is what errors call it.

    Raises TypeError for what is neither a PIL image nor an array, and for arrays of other types;
    DataError for other shapes, no pixels at all, and values out of range.
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    elif not isinstance(image, Image.Image):
        raise TypeError(f"{name} is a {type(image).__name__}; expected a PIL image or a numpy array")
    if 0 in image.size:
        raise DataError(f"{name} has no pixels: it is {image.width} x {image.height}")
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # as in open_image: damaged EXIF data ends in nearly any type
        raise DataError(f"{name} has damaged EXIF data ({_one_line(error)}); save it again without") from error
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_uint8(_deep_grey(image, name), name))
    try:
        return _on_black(image.convert("RGBA")) if image.has_transparency_data else image.convert("RGB")
    except ValueError as error:
        raise DataError(f"{name} has mode {image.mode}, which cannot be converted; save it as RGB") from error


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to a float32 tensor (3, H, W) in [0, 1]. Raises ValueError for any other mode."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}; convert it with as_rgb")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (B, 3, H, W) images in [0, 1] to `size` = (height, width): bilinear, antialiased.

    The one resize rule of the package. Images that have the size already are returned as they are.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True).clamp_(0, 1)


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] in (3, 4)):
        raise DataError(f"{name} has shape {pixels.shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if 0 in pixels.shape:
        raise DataError(f"{name} has no pixels: its shape is {pixels.shape}")
    return Image.fromarray(_to_uint8(pixels, name))


def _to_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
    kind, item_size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if kind == "u" and item_size == 1:
        return pixels
    if kind == "u" and item_size == 2:
        return (pixels >> 8).astype(np.uint8)
    if kind == "f":
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # NaN is refused too
            raise DataError(f"{name} has floating-point pixels from {low:g} to {high:g}; scale them to [0, 1]")
        return np.rint(pixels * 255.0).astype(np.uint8)
    raise TypeError(f"{name} has dtype {pixels.dtype}; expected bool, uint8, uint16, or floats in [0, 1]")


def _deep_grey(image: Image.Image, name: str) -> np.ndarray:
    """The pixels (H, W) of an image of mode F (as they are), I;16 in any byte order, or I (both as uint16)."""
    pixels = np.array(image)
    if image.mode == "F":
        return pixels
    if image.mode == "I" and not (pixels.min() >= 0 and pixels.max() <= 0xFFFF):
        raise DataError(f"{name} has pixels from {pixels.min()} to {pixels.max()}; scale them to 0..65535")
    if "transparency" in image.info:  # a PNG's colour key
        pixels[pixels == image.info["transparency"]] = 0
    return pixels.astype(np.uint16)


def _on_black(image: Image.Image) -> Image.Image:
    black = Image.new("RGB", image.size)
    black.paste(image, mask=image)
    return black


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
