"""The demo's data sets: layout, exact masks, no leak between training and test, and too hard for raw pixels."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.measure import label
from sklearn.metrics import roc_auc_score

from cflow_fast.demo import textures
from cflow_fast.demo.defects import AREA_LIMITS, KINDS
from cflow_fast.demo.textures import IMAGE_SIZE, SENSOR_NOISE, SPLIT, TEXTURES, make_crop, make_textures
from cflow_fast.errors import CFlowFastError, DataError

TRAIN, VALIDATION, GOOD, DEFECTS = 60, 40, 30, 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_textures(tmp_path_factory.mktemp("textures"))


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_photographs_are_inside_the_installed_scikit_image() -> None:
    shipped = {str(path) for path in files("scikit-image") or []}
    assert {f"skimage/data/{texture}.png" for texture in TEXTURES} <= shipped
    assert all(photograph().shape == (512, 512) for photograph in TEXTURES.values())


def test_categories_have_mvtec_layout(folders: list[Path]) -> None:
    assert [folder.name for folder in folders] == ["brick", "gravel", "grass"]
    for folder in folders:
        counts = {
            str(part.relative_to(folder)): len(list(part.glob("*.png"))) for part in folder.glob("*/*") if part.is_dir()
        }
        expected = {"train/good": TRAIN, "validation/good": VALIDATION, "test/good": GOOD}
        expected |= {f"{part}/{kind}": DEFECTS for part in ("test", "ground_truth") for kind in KINDS}
        assert counts == expected
        for path in folder.rglob("*.png"):
            assert (Image.open(path).mode, Image.open(path).size) == ("L", (IMAGE_SIZE, IMAGE_SIZE))
        for path in folder.glob("ground_truth/*/*.png"):
            assert np.unique(_pixels(path)).tolist() == [0, 255]
            assert (folder / "test" / path.parent.name / path.name.replace("_mask", "")).is_file()


def test_masks_are_exactly_what_differs_from_the_good_crop_and_it_stands_out_of_the_noise(folders: list[Path]) -> None:
    for folder in folders:
        for kind in KINDS:
            for index in (0, DEFECTS - 1):
                clean = make_crop(folder.name, "test", kind, index).clean
                image = _pixels(folder / "test" / kind / f"{index:03d}.png")
                mask = _pixels(folder / "ground_truth" / kind / f"{index:03d}_mask.png") > 0
                assert np.array_equal(image != clean, mask)
                assert np.abs(image.astype(float) - clean)[mask].mean() > 3 * 255 * SENSOR_NOISE


def test_a_defect_is_one_region_of_a_size_to_be_seen(folders: list[Path]) -> None:
    for folder in folders:
        for path in folder.glob("ground_truth/*/*.png"):
            mask = _pixels(path) > 0
            assert AREA_LIMITS[0] <= mask.mean() <= AREA_LIMITS[1]
            assert label(mask, connectivity=2).max() == 1


def test_raw_pixels_do_not_find_the_defects(folders: list[Path]) -> None:
    """Largest z-score of a pixel against the training images' mean and deviation there: image AUROC under 0.75."""
    for folder in folders:
        training = np.stack([_pixels(path) for path in sorted(folder.glob("train/good/*.png"))]).astype(float)
        tested = sorted(folder.glob("test/*/*.png"))
        z_scores = np.abs(np.stack([_pixels(path) for path in tested]) - training.mean(axis=0)) / training.std(axis=0)
        labels = [path.parent.name != "good" for path in tested]
        assert roc_auc_score(labels, z_scores.max(axis=(1, 2))) < 0.75, folder.name


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path, folders: list[Path]) -> None:
    again = make_textures(tmp_path / "again", train=2, validation=1, good=1, defects=1)
    other = make_textures(tmp_path / "other", seed=1, train=2, validation=1, good=1, defects=1)
    for first, second, third in zip(folders, again, other, strict=True):
        for path in second.rglob("*.png"):
            place = path.relative_to(second)
            assert path.read_bytes() == (first / place).read_bytes()
            assert path.read_bytes() != (third / place).read_bytes()


@pytest.mark.parametrize(("part", "unseen"), [("train", slice(None, SPLIT)), ("test", slice(SPLIT, None))])
def test_training_and_test_images_share_no_pixel_of_the_photograph(
    part: str, unseen: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    for texture in TEXTURES:
        before = [make_crop(texture, part, "good", index).image for index in range(12)]
        blackened = TEXTURES[texture]().copy()
        blackened[:, unseen] = 0
        monkeypatch.setitem(textures.TEXTURES, texture, blackened.copy)
        after = [make_crop(texture, part, "good", index).image for index in range(12)]
        assert np.array_equal(before, after)
        blackened[:] = 0
        assert not np.array_equal(before[0], make_crop(texture, part, "good", 0).image)


def test_images_of_another_set_in_the_folder_are_refused_by_name(tmp_path: Path) -> None:
    make_textures(tmp_path, train=2, validation=0, good=0, defects=0)
    make_textures(tmp_path, train=2, validation=0, good=0, defects=0)
    with pytest.raises(DataError, match=r"brick/train/good/001\.png .*another folder"):
        make_textures(tmp_path, train=1, validation=0, good=0, defects=0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CFlowFastError, match="file"):
        make_textures(tmp_path / "file", train=1, validation=0, good=0, defects=0)
