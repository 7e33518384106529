"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cflow_fast.errors import CFlowFastError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on an error nothing is left behind.

    Parent folders are made. Raises CFlowFastError naming `path` when it cannot be written.
    """
    target = Path(path)
    temporary = _create_beside(target)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp made it private; a result is as readable as any other file
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(target, error) from error
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise at once what `atomic_path` would, before hours of work end in it; parent folders are made."""
    _create_beside(Path(path)).unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _create_beside(target: Path) -> Path:
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise _cannot_write(target, error) from error
    os.close(descriptor)
    return Path(name)


def _cannot_write(target: Path, error: OSError) -> CFlowFastError:
    reason = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror or error
    return CFlowFastError(f"cannot write {target}: {reason}; choose a place that can be written")
