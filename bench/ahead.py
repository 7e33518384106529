"""The kernels of `make gpu` compiled where there is no card, for one that is elsewhere: an archive to take along.

    make gpu-kernels PYTHON=...     here, by a Python and with a Triton of the versions that are there:
                                    build/gpu-kernels.tar.xz, or KERNELS=FILE
    make gpu KERNELS=FILE           there, in the same checkout

Two cores took 16 minutes for 2,200 of them and then 7 seconds to unpack them, where a card would have waited for its
host's cores. Triton finds a binary by a hash of its kernel's source, of all options, and of Triton itself, whose
library is another one for each version of Python: an archive of another Triton or Python is refused, and of another
checkout what has changed since is compiled anew.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import sysconfig
import tarfile
import time
import zlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from cflow_fast import kernels
from cflow_fast.bench.planned import planned_launches
from cflow_fast.bench.processes import in_processes
from cflow_fast.bench.warm import distinct, warmed
from cflow_fast.errors import CFlowFastError
from cflow_fast.files import atomic_path, check_writable
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch

ABOUT = "about.json"
DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error)
KEPT = re.compile(r"[A-Z2-7]{8,}/[\w.-]+\.(json|cubin)")
"""Of what Triton keeps of a kernel: what it reads to launch it."""
GROUP = "__grp__"
"""How Triton begins the name of the file that lists a kernel's others, by their full paths."""
TOLD_EVERY = 30.0


class NoCard:
    """All that Triton asks a driver for when it compiles and does not launch."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def facts(capability: tuple[int, int]) -> dict[str, str]:
    """What has to be the same on both machines, as far as it can be told in words."""
    python = str(sysconfig.get_config_var("EXT_SUFFIX"))
    return {"triton": triton.__version__, "python": python, "capability": f"{capability[0]}.{capability[1]}"}


def sources() -> str:
    """A digest of the kernels' own code: of other kernels there are other binaries."""
    found = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def pack(folders: Iterable[Path], archive: Path, capability: tuple[int, int]) -> None:
    """Of each folder of Triton's cache what a launch reads. First of all, in JSON, what it is of and every file's
    digest: the archive's own is looked at when everything has been unpacked."""
    paths = [path for folder in sorted(set(folders)) for path in sorted(folder.iterdir())]
    files = {f"{path.parent.name}/{path.name}": path for path in paths}
    files = {name: path for name, path in files.items() if KEPT.fullmatch(name)}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    about = json.dumps({"facts": facts(capability), "sources": sources(), "files": digests}).encode()
    with atomic_path(archive) as temporary, tarfile.open(temporary, "w:xz", preset=6) as tar:
        member = tarfile.TarInfo(ABOUT)
        member.size = len(about)
        tar.addfile(member, BytesIO(about))
        for name, path in files.items():
            tar.add(path, name)


def unpack(archive: Path, capability: tuple[int, int], cache: Path | None = None) -> str:
    """Put an archive's kernels where Triton looks for them; how many there are, in words.

    cache: unless given, Triton's own. Kernels that are there already stay as they are.
    Raises CFlowFastError where it cannot be read, is damaged, or is of another card, Triton or Python: then nothing is
    put anywhere.
    """
    try:
        about, files = _read(archive)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, *DAMAGED) as error:
        raise CFlowFastError(f"cannot unpack {archive}: {type(error).__name__}: {error}") from error
    if about["facts"] != facts(capability):
        raise CFlowFastError(
            f"{archive} is for {_in_words(about['facts'])}, and this is {_in_words(facts(capability))}"
        )
    names = sorted(files, key=lambda name: GROUP in name)  # a kernel is there once its list is
    for name in names:
        _place(files[name], (cache or Path(triton.knobs.cache.dir)) / name)
    count = sum(GROUP in name for name in names)
    others = "" if about["sources"] == sources() else "; of other sources: what has changed since is compiled anew"
    return f"{count} kernels from {archive.name}{others}"


def _read(archive: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What an archive says of itself, and its files, which are what it says."""
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar.getmembers() if member.isfile()}
        if ABOUT not in members:
            raise ValueError("it holds no compiled kernels: `make gpu-kernels` makes such a file")
        contents = {}
        for name, member in members.items():
            file = tar.extractfile(member)
            assert file is not None
            contents[name] = file.read()
    about = json.loads(contents.pop(ABOUT))
    files = {name: content for name, content in contents.items() if KEPT.fullmatch(name)}
    if {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} != about["files"]:
        raise ValueError("it is damaged")
    _in_words(about["facts"])
    return about, files


def _place(content: bytes, path: Path) -> None:
    if path.exists():
        return
    if path.name.startswith(GROUP):
        listed = {name: path.parent / name for name in json.loads(content)["child_paths"]}
        there = {name: str(place) for name, place in listed.items() if place.exists()}
        content = json.dumps({"child_paths": there}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _in_words(of: Any) -> str:
    return f"sm {of['capability']}, Triton {of['triton']} and Python's {of['python']}"


def _compile(launch: Launch) -> Path:
    return Path(get_cache_manager(warmed(launch).hash).cache_dir)


@click.command()
@click.argument("archive", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--capability", default="9.0", show_default=True, help="Of the card that they are for.")
@click.option("--multiprocessors", type=click.IntRange(1), default=132, show_default=True, help="Of that card.")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Compiled before, and kept here.")
def main(archive: Path, capability: str, multiprocessors: int, cache: Path | None) -> None:
    """Compile what `make gpu` is going to launch on a card that is not here."""
    if triton.knobs.runtime.interpret:
        raise click.UsageError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    if not re.fullmatch(r"\d+\.\d", capability):
        raise click.BadParameter(f"it is a number like 9.0, got {capability!r}", param_hint="--capability")
    try:
        check_writable(archive)
    except CFlowFastError as error:
        raise click.ClickException(str(error)) from error
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    major, minor = map(int, capability.split("."))
    chip = Chip((major, minor), multiprocessors)
    driver.set_active(NoCard(chip.capability))
    launches = distinct(planned_launches(chip))
    began = told = time.monotonic()
    folders: list[Path] = []
    wrong: list[str] = []
    for number, found in enumerate(in_processes(_compile, launches), 1):
        if isinstance(found, Path):
            folders.append(found)
        else:
            wrong.append(f"{launches[number - 1].kernel.__name__}: {found}")
        if time.monotonic() > told + TOLD_EVERY:
            told = time.monotonic()
            click.echo(f"{number} of {len(launches)} kernels after {told - began:.0f} s", err=True)
    pack(folders, archive, chip.capability)
    what = f"{archive.stat().st_size / 1e6:.0f} MB, for {_in_words(facts(chip.capability))}"
    click.echo(f"{len(folders)} of {len(launches)} kernels in {archive}, {what}")
    for line in wrong[:5]:
        click.echo(line, err=True)
    if wrong:
        raise click.ClickException(f"{len(wrong)} kernels are missing")


if __name__ == "__main__":
    main()
