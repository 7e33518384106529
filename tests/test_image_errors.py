"""What cannot be an image, as a file or in memory, ends in one line that names it and says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cflow_fast.errors import DataError
from cflow_fast.images import as_rgb, read_image, to_tensor


def error_line(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in error_line(tmp_path / "a.png")


def test_folder_is_refused(tmp_path: Path) -> None:
    assert "it is a folder" in error_line(tmp_path)


def test_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert "is empty" in error_line(tmp_path / "a.png")


def test_text_named_as_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not an image\n" * 20)
    assert "is no image in a format that can be read" in error_line(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp", ".ppm"])
def test_file_cut_short_at_any_place_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole{suffix}")
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    for tenths in range(1, 10):
        (tmp_path / f"cut{suffix}").write_bytes(whole[: len(whole) * tenths // 10])
        message = error_line(tmp_path / f"cut{suffix}")
        assert "is cut short or damaged" in message or "is no image" in message


def test_image_too_large_to_be_meant_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "make it smaller" in error_line(tmp_path / "a.png")


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_integers_beyond_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.array([[0, value]], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif has pixels from .*{value}.*; scale them to 0\.\.65535"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_float_tiff_out_of_range_is_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has floating-point pixels from .*; scale them to \[0, 1\]"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 2), (8,), (1, 8, 8, 3)])
def test_arrays_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"frame 4 has shape .*; expected \(H, W\)"):
        as_rgb(np.zeros(shape, np.uint8), name="frame 4")


@pytest.mark.parametrize("empty", [np.zeros((0, 8), np.uint8), np.zeros((8, 0, 3), np.uint8), Image.new("L", (0, 3))])
def test_images_without_pixels_are_refused(empty: np.ndarray | Image.Image) -> None:
    with pytest.raises(DataError, match="frame 4 has no pixels"):
        as_rgb(empty, name="frame 4")


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint32, np.complex64])
def test_arrays_of_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(TypeError, match=r"image has dtype .*; expected bool, uint8, uint16, or floats in \[0, 1\]"):
        as_rgb(np.zeros((2, 2), dtype))


@pytest.mark.parametrize("value", [-0.1, 1.01, 255.0, float("nan")])
def test_float_arrays_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"scale them to \[0, 1\]"):
        as_rgb(np.array([[0.5, value]]))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(TypeError, match="image is a Tensor; expected a PIL image or a numpy array"):
        as_rgb(torch.zeros(3, 2, 2))  # type: ignore[arg-type]


def test_a_mode_that_pillow_cannot_convert_is_refused() -> None:
    with pytest.raises(DataError, match="frame 4 has mode La"):
        as_rgb(Image.new("La", (1, 1)), name="frame 4")


def test_tensor_is_made_of_rgb_only() -> None:
    with pytest.raises(ValueError, match="expected an RGB image, got mode L"):
        to_tensor(Image.new("L", (1, 1)))
