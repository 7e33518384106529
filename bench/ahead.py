"""The kernels of `make gpu` compiled where there is no card, for one that is elsewhere: an archive to take along.

    make gpu-kernels            here, with the versions of Python and Triton that are there: build/gpu-kernels.tar.xz
    make gpu KERNELS=FILE       there, in the same checkout

Two cores took 16 minutes for 2,200 of them and then 7 seconds to unpack them, where a card would have waited for its
host's cores. Triton finds a binary by a hash of its kernel's source, of all options, and of Triton itself, whose
library is another one for each version of Python: binaries of another checkout, Triton or Python do no harm and are of
no use.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
import tarfile
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from cflow_fast.bench.planned import planned_launches
from cflow_fast.bench.processes import in_processes
from cflow_fast.bench.warm import distinct, warmed
from cflow_fast.errors import CFlowFastError
from cflow_fast.files import atomic_path, check_writable
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch

FACTS = "facts.json"
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


def facts() -> dict[str, str]:
    """What has to be the same on both machines, as far as it can be told in words."""
    return {"triton": triton.__version__, "python": str(sysconfig.get_config_var("EXT_SUFFIX"))}


def pack(folders: Iterable[Path], archive: Path) -> None:
    with atomic_path(archive) as temporary, tarfile.open(temporary, "w:xz", preset=6) as tar:
        text = json.dumps(facts()).encode()
        about = tarfile.TarInfo(FACTS)
        about.size = len(text)
        tar.addfile(about, BytesIO(text))
        for folder in sorted(set(folders)):
            for path in sorted(folder.iterdir()):
                name = f"{folder.name}/{path.name}"
                if KEPT.fullmatch(name):
                    tar.add(path, name)


def unpack(archive: Path, cache: Path | None = None) -> str:
    """Put an archive's kernels where Triton looks for them; how many there are, in words.

    cache: unless given, Triton's own. Kernels that are there already stay as they are.
    Raises CFlowFastError where it cannot be read or is of another Triton or Python.
    """
    cache = cache or Path(triton.knobs.cache.dir)
    try:
        with tarfile.open(archive) as tar:
            members = {member.name: member for member in tar.getmembers() if member.isfile()}
            about = tar.extractfile(members[FACTS]) if FACTS in members else None
            if about is None:
                raise CFlowFastError(f"{archive} holds no compiled kernels: `make gpu-kernels` makes such a file")
            of = json.loads(about.read())
            if of != facts():
                raise CFlowFastError(f"{archive} is of {_in_words(of)}, and here is {_in_words(facts())}")
            names = [name for name in members if KEPT.fullmatch(name)]
            names.sort(key=lambda name: GROUP in name)  # a kernel is there once its list is
            for name in names:
                file = tar.extractfile(members[name])
                assert file is not None
                _place(file.read(), cache / name)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise CFlowFastError(f"cannot unpack {archive}: {error}") from error
    return f"{sum(GROUP in name for name in names)} kernels from {archive.name}"


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
    return f"Triton {of['triton']} for Python's {of['python']}"


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
    pack(folders, archive)
    size = archive.stat().st_size / 1e6
    click.echo(f"{len(folders)} of {len(launches)} kernels in {archive}, {size:.0f} MB, for {_in_words(facts())}")
    for line in wrong[:5]:
        click.echo(line, err=True)
    if wrong:
        raise click.ClickException(f"{len(wrong)} kernels are missing")


if __name__ == "__main__":
    main()
