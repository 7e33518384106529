"""A file is written whole or not at all, and a place that cannot be written is named."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cflow_fast.errors import CFlowFastError
from cflow_fast.files import atomic_path, check_writable, write_text


def test_text_replaces_what_was_there_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "old")
    write_text(path, "grün")
    assert path.read_text("utf-8") == "grün"
    assert list(path.parent.iterdir()) == [path]


def test_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "atomic", "")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def write_half(path: Path, interruption: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise interruption


@pytest.mark.parametrize("interruption", [ValueError("no"), KeyboardInterrupt()])
def test_interruption_leaves_the_old_file_and_nothing_else(tmp_path: Path, interruption: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(interruption)):
        write_half(path, interruption)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CFlowFastError, match=r"cannot write .*/a\.txt: No space left on device"):
        write_half(tmp_path / "a.txt", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_named_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.txt", Path("/proc/a.txt"), tmp_path):
        for write in (check_writable, lambda path: write_text(path, "")):
            with pytest.raises(CFlowFastError, match="cannot write") as caught:
                write(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_checking_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    check_writable(tmp_path / "a.txt")
    check_writable(tmp_path / "b.txt")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
