"""MVTec AD's layout is read as it is laid out, and a file that cannot be used is named, not fatal to the others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cflow_fast.datasets import ImageDataset, MVTecCategory, Sample, find_images, load_images, read_mask
from cflow_fast.errors import DataError
from cflow_fast.images import as_rgb, read_image, resize, to_tensor


def save(path: Path, size: tuple[int, int] = (8, 6), value: int = 100) -> Path:
    """Write a grey image; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A category with two training images and, to test on, two good ones and two kinds of defects."""
    root = tmp_path / "cable"
    for name in ("train/good/001.png", "train/good/000.png", "test/good/000.png", "test/good/001.png"):
        save(root / name)
    for name in ("cut/000", "cut/001", "bent/000"):
        save(root / f"test/{name}.png")
        save(root / f"ground_truth/{name}_mask.png")
    return root


def test_category_lists_its_images_defects_and_masks(root: Path) -> None:
    category = MVTecCategory(root)
    assert category.name == "cable"
    assert category.train == [root / "train/good/000.png", root / "train/good/001.png"]
    assert category.test == [
        Sample(root / "test/bent/000.png", "bent", root / "ground_truth/bent/000_mask.png"),
        Sample(root / "test/cut/000.png", "cut", root / "ground_truth/cut/000_mask.png"),
        Sample(root / "test/cut/001.png", "cut", root / "ground_truth/cut/001_mask.png"),
        Sample(root / "test/good/000.png", "good", None),
        Sample(root / "test/good/001.png", "good", None),
    ]
    assert [sample.is_defective for sample in category.test] == [True, True, True, False, False]


def test_category_is_named_by_its_folder_however_it_is_reached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert MVTecCategory(".").name == "cable"


def test_category_is_told_from_a_plain_folder(root: Path, tmp_path: Path) -> None:
    assert MVTecCategory.is_category(root)
    assert not MVTecCategory.is_category(root / "train/good")
    assert not MVTecCategory.is_category(tmp_path)
    assert not MVTecCategory.is_category(tmp_path / "missing")


def test_category_without_good_training_images_says_the_layout(root: Path) -> None:
    (root / "train/good").rename(root / "train/fine")
    assert MVTecCategory.is_category(root), "else it would be taken for a plain folder and the error would mislead"
    with pytest.raises(DataError, match=r"cable has no folder train/good; a category is laid out as train/good/\*"):
        MVTecCategory(root).train  # noqa: B018 - reading it raises


def test_category_without_test_images_can_still_be_trained_on(root: Path) -> None:
    (root / "test").rename(root / "elsewhere")
    category = MVTecCategory(root)
    assert len(category.train) == 2
    with pytest.raises(DataError, match="cable has no folder test"):
        category.test  # noqa: B018


def test_category_with_an_empty_test_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "cable/test").mkdir(parents=True)
    with pytest.raises(DataError, match="test holds no folder of images"):
        MVTecCategory(tmp_path / "cable").test  # noqa: B018


def test_defective_image_without_a_mask_is_named_with_the_missing_file(root: Path) -> None:
    (root / "ground_truth/cut/001_mask.png").unlink()
    with pytest.raises(DataError, match=r"test/cut/001\.png has no mask: .*ground_truth/cut/001_mask\.png"):
        MVTecCategory(root).test  # noqa: B018


def test_images_are_found_sorted_without_hidden_files_subfolders_and_other_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.tiff", ".hidden.png", "inside/d.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in find_images(tmp_path)] == ["a.JPG", "b.png", "c.tiff"]


def test_empty_folder_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))} holds no image; files that end in .*\.png"):
        find_images(tmp_path)


def test_missing_folder_and_file_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is missing; name a folder of images"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a\.png is a file, not a folder"):
        find_images(save(tmp_path / "a.png"))


DEFECT = np.array([[False, True, False], [True, False, False]])


def masked(path: Path, mask: Image.Image) -> Sample:
    mask.save(path)
    return Sample(path.with_name("image.png"), "cut", path)


@pytest.mark.parametrize(
    ("suffix", "mask"),
    [
        ("png", Image.fromarray(DEFECT.astype(np.uint8) * np.uint8(255))),
        ("png", Image.fromarray(DEFECT.astype(np.uint8))),
        ("png", Image.fromarray(DEFECT)),
        ("png", Image.fromarray(DEFECT.astype(np.uint16))),
        ("tif", Image.fromarray(DEFECT.astype(np.float32))),
        ("tif", Image.fromarray(DEFECT.astype(np.int32))),
        ("png", Image.merge("RGB", [Image.fromarray(DEFECT.astype(np.uint8)), *[Image.new("L", (3, 2))] * 2])),
        ("png", Image.fromarray(DEFECT.astype(np.uint8)).convert("RGBA")),
        ("png", Image.fromarray(DEFECT.astype(np.uint8)).convert("P")),
    ],
    ids=["0/255", "0/1", "1-bit", "16-bit", "float", "32-bit", "red", "opaque RGBA", "palette"],
)
def test_whatever_is_not_black_is_defect(tmp_path: Path, suffix: str, mask: Image.Image) -> None:
    result = read_mask(masked(tmp_path / f"mask.{suffix}", mask), (2, 3))
    assert result.dtype == bool
    np.testing.assert_array_equal(result, DEFECT)


def test_good_image_has_an_empty_mask() -> None:
    mask = read_mask(Sample(Path("a.png"), "good", None), (2, 3))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, np.zeros((2, 3), bool))


def test_mask_of_another_size_is_named_with_its_image(tmp_path: Path) -> None:
    sample = masked(tmp_path / "mask.png", Image.fromarray(DEFECT))
    with pytest.raises(DataError, match=r"mask .*mask\.png is 3 x 2 .* image .*image\.png is 2 x 3") as caught:
        read_mask(sample, (3, 2))
    assert "\n" not in str(caught.value)


def test_unreadable_mask_is_named(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_text("not an image")
    with pytest.raises(DataError, match=r"mask\.png"):
        read_mask(Sample(tmp_path / "image.png", "cut", tmp_path / "mask.png"), (2, 3))


def test_defective_sample_without_a_mask_is_refused() -> None:
    with pytest.raises(DataError, match=r"a\.png has a defect, cut, but no mask"):
        read_mask(Sample(Path("a.png"), "cut", None), (2, 3))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Seven files of different sizes and brightness, of which the third is cut short and the last two are no images."""
    paths = [save(tmp_path / f"{i}.png", size=(8 + i, 6 + i), value=30 * i) for i in range(7)]
    paths[2].write_bytes(paths[2].read_bytes()[:40])
    paths[5].write_text("not an image")
    paths[6].unlink()
    return paths


READABLE = [0, 1, 3, 4]
UNREADABLE = [2, 5, 6]


def test_item_is_the_resized_image_and_the_size_of_its_file(paths: list[Path]) -> None:
    dataset = ImageDataset(paths, (5, 4))
    assert len(dataset) == 7
    position, tensor, original_size, error = dataset[3]
    assert (position, original_size, error) == (3, (9, 11), None)
    assert tensor is not None
    torch.testing.assert_close(tensor, torch.full((3, 5, 4), 90 / 255))


def test_item_of_an_unreadable_file_is_its_error(paths: list[Path]) -> None:
    for i in UNREADABLE:
        position, tensor, original_size, error = ImageDataset(paths, (5, 4))[i]
        assert (position, tensor, original_size) == (i, None, (0, 0))
        assert error is not None
        assert str(paths[i]) in error


@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_in_order_and_unreadable_ones_are_reported(paths: list[Path], workers: int) -> None:
    skipped: list[tuple[Path, str]] = []
    batches = list(
        load_images(paths, (5, 4), batch_size=2, workers=workers, on_skip=lambda *skip: skipped.append(skip))
    )
    assert [batch.indices for batch in batches] == [[0, 1], [3], [4]], "the last batch lost its only file"
    assert [size for batch in batches for size in batch.original_sizes] == [(6 + i, 8 + i) for i in READABLE]
    for batch in batches:
        assert batch.images.shape == (len(batch.indices), 3, 5, 4)
    brightness = torch.cat([batch.images for batch in batches]).mean(dim=(1, 2, 3)) * 255
    torch.testing.assert_close(brightness, torch.tensor([30.0 * i for i in READABLE]))
    assert [path for path, _ in skipped] == [paths[i] for i in UNREADABLE]
    assert all(str(path) in error for path, error in skipped)


def test_skip_is_reported_before_its_batch(paths: list[Path]) -> None:
    skipped: list[Path] = []
    batches = load_images(paths[:4], (5, 4), batch_size=4, on_skip=lambda path, _: skipped.append(path))
    assert next(batches).indices == [0, 1, 3]
    assert skipped == [paths[2]]


def test_loaded_image_is_the_one_that_is_read_in_memory(tmp_path: Path) -> None:
    """A file goes the same way as an image that a user hands over: one conversion and one resize rule."""
    noise = np.random.default_rng(0).integers(0, 256, (21, 33, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (batch,) = load_images([tmp_path / "a.png"], (16, 16), on_skip=never)
    in_memory = resize(to_tensor(as_rgb(noise))[None], (16, 16))
    assert torch.equal(batch.images, in_memory)
    assert torch.equal(to_tensor(read_image(tmp_path / "a.png")), to_tensor(as_rgb(noise)))


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    state = torch.get_rng_state()
    list(load_images([path], (4, 4), on_skip=never))
    assert torch.equal(torch.get_rng_state(), state)


def never(path: Path, error: str) -> None:
    raise AssertionError(f"{path} was skipped: {error}")
