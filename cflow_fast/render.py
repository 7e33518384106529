"""Pictures of results: anomaly maps as heatmaps over their images, masks, outlines, and a figure of several results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from skimage.morphology import dilation, disk

from cflow_fast.files import atomic_path

HEAT_COLOURS = (255 * colormaps["inferno"](np.linspace(0.0, 1.0, 256))[:, :3]).round().astype(np.uint8)  # (256, 3)
UNKNOWN_COLOUR = (0, 200, 200)  # a score that is not a number; no colour of the heat scale comes near it
GROUND_TRUTH_COLOUR = (64, 224, 120)
INK, FAINT_INK = (31, 35, 40), (89, 99, 110)


@dataclass(frozen=True)
class Panel:
    """One row of a figure: an image with its results, all of the image's size.

    `upper` and `lower` are the scores at the two ends of the heat scale, as in `overlay`; `ground_truth` is None where
    nobody has marked the defect.
    """

    caption: str
    image: Image.Image
    ground_truth: np.ndarray | None
    anomaly_map: np.ndarray
    mask: np.ndarray
    upper: float
    lower: float = 0.0


def overlay(image: Image.Image, anomaly_map: np.ndarray, upper: float, lower: float = 0.0) -> Image.Image:
    """The anomaly map (H, W) as a heatmap over its image: RGB, of the image's size.

    Scores from `lower` to `upper` run through a perceptually uniform scale from dark to bright; what lies beyond takes
    the colour of the end. Both come from the model and not from the picture, so that a colour means the same score in
    every picture. Where a score is NaN the picture shows UNKNOWN_COLOUR alone. Raises ValueError when the sizes differ
    or when `lower` is not below `upper`.
    """
    if not lower < upper:
        raise ValueError(f"the heat scale needs lower < upper, got lower={lower} and upper={upper}")
    _check_size("anomaly map", anomaly_map, image)
    unknown = np.isnan(anomaly_map)
    level = np.clip((np.where(unknown, lower, anomaly_map) - lower) / (upper - lower), 0.0, 1.0)
    heat = HEAT_COLOURS[np.rint(255 * level).astype(np.intp)].astype(np.float64)
    grey = np.asarray(image.convert("L"), dtype=np.float64)[
        ..., None
    ]  # the image's own colours would mix with the heat
    opacity = (0.35 + 0.4 * level)[..., None]
    blended = np.rint((1.0 - opacity) * grey + opacity * heat).astype(np.uint8)
    blended[unknown] = UNKNOWN_COLOUR
    return Image.fromarray(blended)


def mask_image(mask: np.ndarray) -> Image.Image:
    """A mask (H, W) bool as a grey image: 255 where it is set, 0 elsewhere."""
    return Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))


def outline(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int] = GROUND_TRUTH_COLOUR) -> Image.Image:
    """The image with a line around the mask (H, W), just outside it, so that what is marked stays visible: RGB."""
    _check_size("mask", mask, image)
    marked = np.asarray(mask, dtype=bool)
    width = max(1, round(min(image.size) / 160))
    gap = dilation(marked, disk(1))
    drawn = np.array(image.convert("RGB"))
    drawn[dilation(gap, disk(width)) & ~gap] = colour
    return Image.fromarray(drawn)


def figure(rows: Sequence[Panel], path: str | os.PathLike[str], height: int = 256) -> None:
    """Write one PNG with a row of `height` pixels for each panel: image, ground truth, anomaly map and mask.

    The columns' names stand above, each row's caption over it, the heat scale below. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError("a figure needs at least one row, got none")
    tiles = [[_fitted(tile, height) for tile in _tiles(row)] for row in rows]
    widths = [max(tile.width for tile in column) for column in zip(*tiles, strict=True)]
    gap, line, margin = height // 32, height // 7, height // 16
    lefts = [margin + sum(widths[:column]) + column * gap for column in range(len(widths))]
    size = (lefts[-1] + widths[-1] + margin, margin + 2 * line + len(rows) * (line + height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(height / 11.5), ImageFont.load_default(height / 13.5)
    for left, width, name in zip(lefts, widths, ("image", "ground truth", "anomaly map", "mask"), strict=True):
        draw.text((left + width / 2, margin + line / 2), name, fill=INK, font=font, anchor="mm")
    top = margin + line
    for row, row_tiles in zip(rows, tiles, strict=True):
        draw.text((lefts[0], top + line / 2), row.caption, fill=FAINT_INK, font=small, anchor="lm")
        for left, tile in zip(lefts, row_tiles, strict=True):
            sheet.paste(tile, (left, top + line))
        top += line + height + gap
    _draw_scale(draw, sheet, (lefts[2], top, lefts[2] + widths[2], top + line), small)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _tiles(row: Panel) -> list[Image.Image]:
    truth = row.image.convert("RGB") if row.ground_truth is None else outline(row.image, row.ground_truth)
    heat = overlay(row.image, row.anomaly_map, row.upper, row.lower)
    _check_size("mask", row.mask, row.image)
    return [row.image.convert("RGB"), truth, heat, mask_image(row.mask).convert("RGB")]


def _fitted(tile: Image.Image, height: int) -> Image.Image:
    return tile.resize((max(1, round(tile.width * height / tile.height)), height), Image.Resampling.LANCZOS)


def _draw_scale(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    box: tuple[int, int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """The heat scale inside a box (left, top, right, bottom): low, the colours, high."""
    left, top, right, bottom = box
    middle, thickness, room = (top + bottom) / 2, (bottom - top) // 3, (right - left) // 5
    draw.text((left, middle), "low", fill=FAINT_INK, font=font, anchor="lm")
    draw.text((right, middle), "high", fill=FAINT_INK, font=font, anchor="rm")
    colours = Image.fromarray(HEAT_COLOURS[None]).resize((right - left - 2 * room, thickness))
    sheet.paste(colours, (left + room, round(middle - thickness / 2)))


def _check_size(name: str, array: np.ndarray, image: Image.Image) -> None:
    if array.shape != (image.height, image.width):
        raise ValueError(f"the {name} is {array.shape}, the image (height, width) = ({image.height}, {image.width})")
