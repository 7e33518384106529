"""Every image mode becomes the 8-bit RGB that the rules of cflow_fast.images say."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from cflow_fast.images import IMAGE_SUFFIXES, as_rgb, read_image, resize, to_tensor


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def grey(*rows: list[int]) -> list:
    return [[[value] * 3 for value in row] for row in rows]


def png_16_bit(path: Path, colour_type: int, row: list[int], colour_key: list[int] | None = None) -> Path:
    """Write one row of 16-bit samples as the PNG specification has it: Pillow cannot write 16-bit colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples_per_pixel = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    header = struct.pack(">IIBBBBB", len(row) // samples_per_pixel, 1, 16, colour_type, 0, 0, 0)
    key = chunk(b"tRNS", struct.pack(f">{len(colour_key)}H", *colour_key)) if colour_key else b""
    data = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(row)}H", *row)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + data + chunk(b"IEND", b""))
    return path


def test_rgb_is_kept_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[1, 2, 3], [250, 251, 252]]], np.uint8)).save(tmp_path / "a.png")
    assert pixels(read_image(tmp_path / "a.png")) == [[[1, 2, 3], [250, 251, 252]]]


def test_greyscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7], [128, 255]], np.uint8)).save(tmp_path / "a.png")
    assert pixels(read_image(tmp_path / "a.png")) == grey([0, 7], [128, 255])


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).convert("1").save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "1"
    assert pixels(read_image(tmp_path / "a.png")) == grey([255, 0])


def test_palette_becomes_its_colours(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert pixels(read_image(tmp_path / "a.png")) == [[[10, 20, 30], [40, 50, 60]]]


def test_transparent_palette_entry_becomes_black(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "a.png", transparency=1)
    assert pixels(read_image(tmp_path / "a.png")) == [[[10, 20, 30], [0, 0, 0]]]


def test_palette_with_alpha_per_entry_is_composited_on_black(tmp_path: Path) -> None:
    palette_image().save(tmp_path / "a.png", transparency=bytes([255, 128]))
    assert pixels(read_image(tmp_path / "a.png")) == [[[10, 20, 30], [20, 25, 30]]]


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    return image


def test_rgba_is_composited_on_black(tmp_path: Path) -> None:
    """A transparent pixel is black, not the colour hidden under it."""
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 128], [200, 100, 50, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert pixels(read_image(tmp_path / "a.png")) == [[[200, 100, 50], [100, 50, 25], [0, 0, 0]]]


def test_grey_with_alpha_is_composited_on_black(tmp_path: Path) -> None:
    image = Image.merge("LA", [Image.fromarray(np.array([[200] * 3], np.uint8)), alpha_ramp()])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "LA"
    assert pixels(read_image(tmp_path / "a.png")) == grey([200, 100, 0])


def alpha_ramp() -> Image.Image:
    return Image.fromarray(np.array([[255, 128, 0]], np.uint8))


def test_colour_key_of_grey_and_rgb_becomes_black(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "grey.png", transparency=7)
    assert pixels(read_image(tmp_path / "grey.png")) == grey([0, 9])
    colours = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(read_image(tmp_path / "rgb.png")) == [[[0, 0, 0], [4, 5, 6]]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    """No ink is white, full cyan leaves green and blue, full black leaves nothing."""
    cmyk = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 55, 0, 0]]], np.uint8)
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "CMYK"
    expected = [[[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 200, 255]]]
    assert pixels(read_image(tmp_path / "a.tif")) == expected


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "RGBX", "PA", "RGBa"])
def test_every_other_mode_becomes_the_colours_that_it_stands_for(mode: str) -> None:
    """What Pillow says they are; with an alpha, on black as PNG's are."""
    colours = np.array([[[255, 255, 255], [200, 40, 90], [0, 0, 0]]], np.uint8)
    if mode == "LAB":  # which Pillow only converts from, by littlecms
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(Image.fromarray(colours), to_lab)
    elif mode == "PA":
        image = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
    elif mode == "RGBa":
        image = Image.fromarray(colours).convert("RGBA").convert("RGBa")
    else:
        image = Image.fromarray(colours).convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(np.array(as_rgb(image)).astype(int), colours, atol=4)


SIXTEEN_BIT = [0, 255, 256, 32767, 32768, 65280, 65535]
EIGHT_BIT = [0, 0, 1, 127, 128, 255, 255]


def test_16_bit_grey_is_scaled_by_its_range(tmp_path: Path) -> None:
    """Pillow's own conversion would saturate: everything from 255 on would be white."""
    path = png_16_bit(tmp_path / "a.png", 0, SIXTEEN_BIT)
    assert Image.open(path).mode.startswith("I")
    assert pixels(read_image(path)) == grey(EIGHT_BIT)


def test_16_bit_rgb_is_scaled_as_16_bit_grey_is(tmp_path: Path) -> None:
    path = png_16_bit(tmp_path / "a.png", 2, [value for value in SIXTEEN_BIT for _ in range(3)])
    assert pixels(read_image(path)) == grey(EIGHT_BIT)


def test_16_bit_rgba_is_scaled_and_composited_on_black(tmp_path: Path) -> None:
    path = png_16_bit(tmp_path / "a.png", 6, [51200, 25600, 12800, 65535, 51200, 25600, 12800, 0])
    assert pixels(read_image(path)) == [[[200, 100, 50], [0, 0, 0]]]


def test_16_bit_grey_with_alpha_is_scaled_and_composited_on_black(tmp_path: Path) -> None:
    path = png_16_bit(tmp_path / "a.png", 4, [51200, 65535, 51200, 0])
    assert pixels(read_image(path)) == grey([200, 0])


def test_16_bit_colour_key_becomes_black(tmp_path: Path) -> None:
    path = png_16_bit(tmp_path / "a.png", 0, [51200, 25600], colour_key=[51200])
    assert pixels(read_image(path)) == grey([0, 100])


def test_big_endian_16_bit_tiff_is_scaled_by_its_range(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (7, 1), struct.pack(">7H", *SIXTEEN_BIT)).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "I;16B"
    assert pixels(read_image(tmp_path / "a.tif")) == grey(EIGHT_BIT)


def test_32_bit_integers_are_taken_as_16_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([SIXTEEN_BIT], np.int32)).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "I"
    assert pixels(read_image(tmp_path / "a.tif")) == grey(EIGHT_BIT)


def test_16_bit_pgm_is_scaled_by_its_range(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 32768, 65535))
    assert pixels(read_image(tmp_path / "a.pgm")) == grey([128, 255])


def test_float_tiff_in_0_1_is_scaled_by_255(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32)).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "F"
    assert pixels(read_image(tmp_path / "a.tif")) == grey([0, 64, 128, 255])


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, [[10, 20, 30], [40, 50, 60]]),
        (2, [[30, 20, 10], [60, 50, 40]]),
        (3, [[60, 50, 40], [30, 20, 10]]),
        (4, [[40, 50, 60], [10, 20, 30]]),
        (5, [[10, 40], [20, 50], [30, 60]]),
        (6, [[40, 10], [50, 20], [60, 30]]),
        (7, [[60, 30], [50, 20], [40, 10]]),
        (8, [[30, 60], [20, 50], [10, 40]]),
    ],
)
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int, upright: list[list[int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], np.uint8))
    stored.save(tmp_path / "a.png", exif=exif)
    assert pixels(read_image(tmp_path / "a.png")) == grey(*upright)
    with Image.open(tmp_path / "a.png") as opened:
        assert pixels(as_rgb(opened)) == grey(*upright), "an opened image is the same picture as its file"


def test_orientation_is_applied_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    once = read_image(tmp_path / "a.jpg")
    assert once.size == (2, 4)
    assert as_rgb(once).size == (2, 4)


def test_every_suffix_that_is_listed_can_be_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (255, 255, 255))
    for suffix in IMAGE_SUFFIXES:
        source = image.convert("L") if suffix == ".pgm" else image
        source.save(tmp_path / f"a{suffix}")
        assert pixels(read_image(tmp_path / f"a{suffix}")) == grey([255] * 3, [255] * 3)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 128, 255]], np.uint8), grey([0, 128, 255])),
        (np.array([[[0], [128]]], np.uint8), grey([0, 128])),
        (np.array([[[1, 2, 3]]], np.uint8), [[[1, 2, 3]]]),
        (np.array([[[200, 100, 50, 128]]], np.uint8), [[[100, 50, 25]]]),
        (np.array([SIXTEEN_BIT], np.uint16), grey(EIGHT_BIT)),
        (np.array([SIXTEEN_BIT], ">u2"), grey(EIGHT_BIT)),
        (np.array([[[256, 512, 65535]]], np.uint16), [[[1, 2, 255]]]),
        (np.array([[True, False]]), grey([255, 0])),
        (np.array([[0, 0.25, 1]], np.float16), grey([0, 64, 255])),
        (np.array([[0, 0.25, 1]], np.float32), grey([0, 64, 255])),
        (np.array([[[0, 0.25, 1]]], np.float64), [[[0, 64, 255]]]),
        (np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)[:, ::-1], [[[4, 5, 6], [1, 2, 3]]]),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_arrays_become_rgb(array: np.ndarray, expected: list) -> None:
    assert pixels(as_rgb(array)) == expected


def test_result_shares_no_memory_with_an_array() -> None:
    array = np.zeros((2, 2, 3), np.uint8)
    image = as_rgb(array)
    array[:] = 255
    assert pixels(image) == grey([0, 0], [0, 0])


def test_image_under_another_formats_suffix_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (255, 255, 255)).save(tmp_path / "a.png", format="JPEG")
    assert pixels(read_image(tmp_path / "a.png")) == grey([255])


def test_tensor_is_channels_first_in_0_1() -> None:
    tensor = to_tensor(as_rgb(np.array([[[0, 51, 255], [102, 153, 204]]], np.uint8)))
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor, torch.tensor([[[0.0, 0.4]], [[0.2, 0.6]], [[1.0, 0.8]]]))


def test_resize_averages_when_it_halves() -> None:
    """The antialiased triangle of a halved row [a b c d] is (3a + 3b + c) / 7 and (b + 3c + 3d) / 7."""
    row = torch.tensor([0.7, 0.0, 0.7, 0.0]).expand(1, 3, 4, 4)
    expected = torch.tensor([0.4, 0.3]).expand(1, 3, 2, 2)
    torch.testing.assert_close(resize(row, (2, 2)), expected)


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert resize(images, (5, 7)) is images


@pytest.mark.parametrize("size", [(3, 4), (17, 9), (40, 41)])
def test_resized_images_have_the_size_and_stay_in_0_1(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).round()
    resized = resize(images, size)
    assert resized.shape == (2, 3, *size)
    assert resized.min() >= 0
    assert resized.max() <= 1


def test_an_image_is_resized_the_same_alone_and_in_a_batch() -> None:
    images = torch.rand(4, 3, 37, 53, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([resize(image[None], (24, 24)) for image in images])
    torch.testing.assert_close(resize(images, (24, 24)), alone, rtol=0, atol=1e-7)
