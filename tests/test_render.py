"""Pictures of results: one colour for one score, exact masks, outlines beside what they mark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cflow_fast.errors import CFlowFastError
from cflow_fast.render import (
    GROUND_TRUTH_COLOUR,
    HEAT_COLOURS,
    UNKNOWN_COLOUR,
    Panel,
    figure,
    mask_image,
    outline,
    overlay,
)

GREY = Image.new("RGB", (6, 4), (128, 128, 128))  # width 6, height 4


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.array(picture)


def _ramp(top: float) -> np.ndarray:
    return np.linspace(0.0, top, 24).reshape(4, 6)


def test_one_score_has_one_colour_in_every_picture_of_a_model() -> None:
    calm, alarming = np.full((4, 6), 0.4), _ramp(2.0)
    alarming[1, 2] = 0.4
    first, second = (_pixels(overlay(GREY, scores, upper=2.0)) for scores in (calm, alarming))
    assert np.array_equal(first[1, 2], second[1, 2])
    assert not np.array_equal(second[0, 0], second[3, 5])


def test_heat_gets_brighter_with_the_score_and_keeps_to_the_scale_beyond_its_ends() -> None:
    pixels = _pixels(overlay(GREY, _ramp(3.0), upper=3.0)).reshape(-1, 3).astype(float)
    black = _pixels(overlay(Image.new("RGB", (6, 4)), _ramp(3.0), upper=3.0)).reshape(-1, 3).astype(float)
    assert (np.diff(black @ [0.2126, 0.7152, 0.0722]) > 0).all()
    beyond = _pixels(overlay(GREY, np.array([[-5.0, 0.0, 3.0, 99.0, np.inf, -np.inf]] * 4), upper=3.0))[0]
    assert np.array_equal(beyond, pixels[[0, 0, -1, -1, -1, 0]])


def test_lower_end_of_the_scale_can_be_moved() -> None:
    moved = overlay(GREY, _ramp(1.0) + 1.5, upper=2.5, lower=1.5)
    assert np.array_equal(_pixels(moved), _pixels(overlay(GREY, _ramp(1.0), upper=1.0)))


def test_a_score_that_is_not_a_number_is_shown_as_unknown_and_as_nothing_else() -> None:
    scores = _ramp(1.0)
    expected = _pixels(overlay(GREY, scores, upper=1.0))
    scores[2, 3] = np.nan
    expected[2, 3] = UNKNOWN_COLOUR
    assert np.array_equal(_pixels(overlay(GREY, scores, upper=1.0)), expected)
    assert np.abs(HEAT_COLOURS.astype(int) - UNKNOWN_COLOUR).sum(axis=1).min() > 100


def test_the_image_stays_recognisable_under_the_heat() -> None:
    checks = np.kron(np.indices((4, 4)).sum(axis=0) % 2, np.ones((8, 8))).astype(np.uint8) * 160 + 40
    for score in (0.0, 0.5, 1.0):
        drawn = _pixels(overlay(Image.fromarray(checks), np.full((32, 32), score), upper=1.0)).mean(axis=2)
        assert drawn[checks == 200].min() - drawn[checks == 40].max() > 30


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_any_image_mode_gives_rgb(mode: str) -> None:
    image = GREY.convert(mode)
    assert overlay(image, _ramp(1.0), upper=1.0).mode == "RGB"
    assert outline(image, np.zeros((4, 6), dtype=bool)).mode == "RGB"


def test_a_mask_is_written_as_0_and_255() -> None:
    mask = np.random.default_rng(0).random((5, 7)) < 0.4
    picture = mask_image(mask)
    assert (picture.mode, picture.size) == ("L", (7, 5))
    assert np.array_equal(_pixels(picture), mask * np.uint8(255))


def test_an_outline_goes_around_the_mask_and_touches_nothing_in_it() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 200, (40, 50, 3), dtype=np.uint8))
    mask = np.zeros((40, 50), dtype=bool)
    mask[10:20, 15:30] = True
    drawn, before = _pixels(outline(image, mask)), _pixels(image)
    line = (drawn == GROUND_TRUTH_COLOUR).all(axis=2)
    assert np.array_equal(drawn[~line], before[~line])
    assert not line[mask].any()
    assert not line[9, 15:30].any()
    assert line[8, 15:30].all()
    assert line[10:20, 31].all()
    assert line[:7].sum() == line[:, :12].sum() == 0
    assert np.array_equal(_pixels(outline(image, np.zeros_like(mask))), before)


@pytest.mark.parametrize("shape", [(6, 4), (4, 5), (4, 6, 1)])
def test_a_map_of_another_size_than_its_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"anomaly map is \(.*\), the image \(height, width\) = \(4, 6\)"):
        overlay(GREY, np.zeros(shape), upper=1.0)
    with pytest.raises(ValueError, match="the mask is"):
        outline(GREY, np.zeros(shape, dtype=bool))


@pytest.mark.parametrize("upper", [0.0, -1.0, float("nan")])
def test_an_empty_heat_scale_is_refused(upper: float) -> None:
    with pytest.raises(ValueError, match="lower < upper"):
        overlay(GREY, _ramp(1.0), upper=upper)


def _panel(caption: str, size: tuple[int, int], ground_truth: np.ndarray | None) -> Panel:
    scores = np.zeros(size[::-1])
    scores[4:10, 5:12] = 1.0
    return Panel(caption, Image.new("L", size, 90), ground_truth, scores, scores > 0.5, upper=1.0)


def test_a_figure_holds_every_panel_of_every_row(tmp_path: Path) -> None:
    rows = [_panel("first", (64, 64), None), _panel("second", (128, 64), np.zeros((64, 128), dtype=bool))]
    figure(rows, tmp_path / "new" / "figure.png", height=64)
    with Image.open(tmp_path / "new" / "figure.png") as sheet:
        assert sheet.format == "PNG"
        pixels = _pixels(sheet.convert("RGB")).astype(int)
    assert sheet.width > 4 * 128
    assert sheet.height > 2 * 64
    plain = (pixels == 90).all(axis=2).sum()
    assert plain >= 2 * 64 * 64 + 2 * 128 * 64  # image and ground truth of both rows
    hottest = _pixels(overlay(Image.new("L", (1, 1), 90), np.ones((1, 1)), upper=1.0))[0, 0]
    assert (np.abs(pixels - hottest).sum(axis=2) < 12).sum() >= 2 * 4 * 5  # the defect of both heatmaps


def test_a_figure_without_a_row_or_a_place_to_go_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        figure([], tmp_path / "figure.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(CFlowFastError, match="cannot write"):
        figure([_panel("one", (64, 64), None)], tmp_path / "file" / "figure.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
