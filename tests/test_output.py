"""Results as files: what the pictures and tables of a prediction say, and that none is lost or half-written."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import save_image, texture

from cflow_fast.errors import CFlowFastError
from cflow_fast.images import read_image
from cflow_fast.model import CFlowAD
from cflow_fast.output import ResultWriter, heat_range
from cflow_fast.prediction import Prediction, make_prediction


def write(folder: Path, model: CFlowAD, results: list[tuple[Path, Prediction]]) -> tuple[list[dict[str, str]], Any]:
    """The CSV's rows and the JSON."""
    writer = ResultWriter(folder, model)
    for path, prediction in results:
        writer.add(path, Image.new("RGB", prediction.anomaly_map.shape[::-1]), prediction)
    writer.finish([Path("lost.png")])
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((folder / "scores.json").read_text(), parse_constant=pytest.fail)


def spot(size: tuple[int, int] = (20, 30)) -> Prediction:
    anomaly_map = np.full(size, 0.25, np.float32)
    anomaly_map[4:8, 10:13] = 1.5
    anomaly_map[15, 1] = 1.25
    return make_prediction(anomaly_map, 1.0, 1.0)


def test_tables_say_what_the_predictions_say(model: CFlowAD, tmp_path: Path) -> None:
    model.set_thresholds(1.0, 0.5)
    good = make_prediction(np.full((20, 30), 0.25, np.float32), 1.0, 1.0)
    rows, facts = write(tmp_path, model, [(Path("in/a.png"), spot()), (Path("in/b.png"), good)])
    assert rows == [
        {
            "image": "in/a.png",
            "score": "1.5",
            "is_defective": "True",
            "defects": "2",
            "defect_pixels": "13",
            "non_finite_pixels": "0",
            "heatmap": "a_heatmap.png",
            "mask": "a_mask.png",
        },
        {
            "image": "in/b.png",
            "score": "0.25",
            "is_defective": "False",
            "defects": "0",
            "defect_pixels": "0",
            "non_finite_pixels": "0",
            "heatmap": "b_heatmap.png",
            "mask": "b_mask.png",
        },
    ]
    assert (facts["image_threshold"], facts["pixel_threshold"], facts["skipped"]) == (1.0, 0.5, ["lost.png"])
    assert facts["images"][0]["defects"] == [
        {"top": 4, "left": 10, "bottom": 8, "right": 13, "area": 12, "score": 1.5},
        {"top": 15, "left": 1, "bottom": 16, "right": 2, "area": 1, "score": 1.25},
    ]
    assert [image["is_defective"] for image in facts["images"]] == [True, False]


def test_pictures_have_the_images_size_and_the_mask_is_the_predictions(model: CFlowAD, tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png", texture(np.random.default_rng(0), (50, 70)))
    model.set_thresholds(0.2, 0.2)
    prediction = model.predict(path)[0]
    assert prediction.mask is not None
    writer = ResultWriter(tmp_path / "out", model)
    writer.add(path, read_image(path), prediction)
    with Image.open(tmp_path / "out" / "a_heatmap.png") as heatmap, Image.open(tmp_path / "out" / "a_mask.png") as mask:
        assert (heatmap.size, heatmap.mode) == ((70, 50), "RGB")
        np.testing.assert_array_equal(np.asarray(mask), np.where(prediction.mask, 255, 0))


def test_images_of_one_name_get_different_files(model: CFlowAD, tmp_path: Path) -> None:
    paths = [Path("x/a.png"), Path("y/a.png"), Path("x/a.jpg"), Path("a_2.png")]
    rows, _ = write(tmp_path, model, [(path, spot()) for path in paths])
    names = [row["heatmap"] for row in rows] + [row["mask"] for row in rows]
    assert len(set(names)) == 8
    assert {path.name for path in tmp_path.iterdir()} == {*names, "scores.csv", "scores.json"}


def test_model_without_thresholds_writes_no_verdict_and_no_mask(model: CFlowAD, tmp_path: Path) -> None:
    model.thresholds.fill_(math.nan)
    rows, facts = write(tmp_path, model, [(Path("a.png"), make_prediction(spot().anomaly_map, None, None))])
    assert (rows[0]["is_defective"], rows[0]["mask"], rows[0]["score"]) == ("", "", "1.5")
    assert (facts["image_threshold"], facts["images"][0]["mask"]) == (None, None)
    assert not (tmp_path / "a_mask.png").exists()


def test_scores_that_are_not_finite_are_said_to_be_missing(model: CFlowAD, tmp_path: Path) -> None:
    anomaly_map = np.full((20, 30), np.nan, np.float32)
    rows, facts = write(tmp_path, model, [(Path("a.png"), make_prediction(anomaly_map, 1.0, 1.0))])
    assert (rows[0]["score"], rows[0]["is_defective"], rows[0]["non_finite_pixels"]) == ("", "True", "600")
    (image,) = facts["images"]
    assert (image["score"], image["defects"][0]["score"], image["non_finite_pixels"]) == (None, None, 600)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(math.nan, (0.0, 2.0)), (0.5, (0.0, 2.0)), (1.5, (1.0, 2.0)), (1.99, (1.9, 2.0)), (5.0, (1.9, 2.0))],
)
def test_heat_scale_has_the_threshold_in_its_middle_where_there_is_room(
    model: CFlowAD, threshold: float, expected: tuple[float, float]
) -> None:
    model.set_thresholds(threshold, threshold)
    assert heat_range(model) == pytest.approx(expected)


def test_folder_that_cannot_be_written_is_named(model: CFlowAD, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(CFlowFastError, match=f"cannot write {folder}"):
            write(folder, model, [(Path("a.png"), spot())])
    assert (tmp_path / "file").read_text() == "mine"


def test_interrupted_picture_is_not_left_half_written(
    model: CFlowAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(image: Image.Image, path: Path, format: str) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(CFlowFastError, match=r"cannot write .*a_heatmap\.png: No space left"):
        write(tmp_path, model, [(Path("a.png"), spot())])
    assert list(tmp_path.iterdir()) == []
