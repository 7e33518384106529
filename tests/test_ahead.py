"""Kernels compiled on one machine are found on another, and an archive of something else is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cflow_fast.bench import ahead
from cflow_fast.errors import CFlowFastError

HOPPER = (9, 0)
BEGIN = """
import sys
from pathlib import Path
from cflow_fast.bench import ahead
from cflow_fast.bench.headline import tail_launches
from cflow_fast.bench.processes import in_processes
from cflow_fast.bench.warm import distinct
"""
WARMED = """
ahead.driver.set_active(ahead.NoCard((9, 0)))
launches = distinct(tail_launches(256, (1, 32), (3,)))
assert len(launches) == 2
folders = list(in_processes(ahead._compile, launches))
"""
PACKED = "ahead.pack(folders, Path(sys.argv[1]), (9, 0))"
UNPACKED = "print(ahead.unpack(Path(sys.argv[1]), (9, 0)))\n"


ORDERED = """
from triton.runtime.jit import JITFunction
from cflow_fast.kernels import coupling, linear, pointwise, reduction
from cflow_fast.kernels.launch import settle

begun = []
owner = next(each for each in JITFunction.__mro__ if "cache_key" in vars(each))
real = vars(owner)["cache_key"]
owner.cache_key = property(lambda self: begun.append(self.fn.__name__) or real.fget(self))
kernels = [coupling.coupling_kernel, linear.linear_kernel, pointwise.coupled_kernel, reduction.reduction_kernel]
for kernel in kernels[:: int(sys.argv[1])]:
    settle(kernel)
    assert list(dict.fromkeys(begun))[-1] == kernel.fn.__name__, "what it calls comes before it"
assert len(set(begun)) > 2 * len(kernels)
print([kernel.cache_key for kernel in kernels])
"""


def run(code: str, cache: Path, archive: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET")
    command = [sys.executable, "-c", BEGIN + code, str(archive)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)


def test_what_was_packed_is_not_compiled_again(tmp_path: Path) -> None:
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "kernels.tar.xz"
    run(WARMED + PACKED, here, archive)
    assert len(list(here.glob("*/*.ptx"))) == 2
    assert run(UNPACKED + WARMED, there, archive).stdout == "2 kernels from kernels.tar.xz\n"
    assert len(list(there.glob("*/*.cubin"))) == 2
    assert not list(there.glob("*/*.ptx"))  # which a compilation leaves
    assert {path.parent.name for path in there.glob("*/*.cubin")} == {p.parent.name for p in here.glob("*/*.cubin")}
    names = [run(ORDERED, tmp_path, Path(order)).stdout for order in ("1", "-1")]
    assert names[0].startswith("['")
    assert names[0] == names[1], "whatever was launched before"


def packed(folder: Path, files: dict[str, str], archive: Path) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    ahead.pack([folder / name.split("/")[0] for name in files], archive, HOPPER)


def test_only_what_a_launch_reads_is_packed_and_paths_are_those_of_the_new_place(tmp_path: Path) -> None:
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "there"
    listed = {name: f"/elsewhere/{name}" for name in ("k.json", "k.cubin", "k.ptx")}
    files = {"AAAABBBB/__grp__k.json": json.dumps({"child_paths": listed})}
    files |= {f"AAAABBBB/{name}": name for name in listed} | {"not a kernel/k.json": "{}"}
    packed(tmp_path / "here", files, archive)
    assert ahead.unpack(archive, HOPPER, cache) == "1 kernels from kernels.tar.xz"
    assert sorted(str(path.relative_to(cache)) for path in cache.rglob("*.*")) == [
        *("AAAABBBB/__grp__k.json", "AAAABBBB/k.cubin", "AAAABBBB/k.json")
    ]
    child_paths = json.loads((cache / "AAAABBBB/__grp__k.json").read_text())["child_paths"]
    assert child_paths == {name: str(cache / "AAAABBBB" / name) for name in ("k.json", "k.cubin")}


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "there"
    packed(tmp_path / "here", {"AAAABBBB/k.json": "new"}, archive)
    (cache / "AAAABBBB").mkdir(parents=True)
    (cache / "AAAABBBB/k.json").write_text("own")
    ahead.unpack(archive, HOPPER, cache)
    assert (cache / "AAAABBBB/k.json").read_text() == "own"


def handmade(archive: Path, files: dict[str, str]) -> None:
    with tarfile.open(archive, "w:xz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


@pytest.mark.parametrize("name", ["../AAAABBBB/k.json", "/AAAABBBB/k.json", "AAAABBBB/../../k.json", "AAAABBBB/k.so"])
def test_nothing_is_written_elsewhere(name: str, tmp_path: Path) -> None:
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "deep" / "there"
    about = {"facts": ahead.facts(HOPPER), "sources": ahead.sources(), "files": {}}
    handmade(archive, {ahead.ABOUT: json.dumps(about), name: "{}"})
    ahead.unpack(archive, HOPPER, cache)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_an_archive_of_another_triton_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "kernels.tar.xz"
    of = {"triton": "3.1", "python": ".cpython-39-x86_64.so", "capability": "9.0"}
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(ahead, "facts", lambda capability: of)
        packed(tmp_path / "here", {"AAAABBBB/k.json": "{}"}, archive)
    with pytest.raises(CFlowFastError, match=r"is for sm 9\.0, Triton 3\.1 and Python's \.cpython-39-x86_64\.so, and"):
        ahead.unpack(archive, HOPPER, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_an_archive_for_another_card_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "kernels.tar.xz"
    packed(tmp_path / "here", {"AAAABBBB/k.json": "{}"}, archive)
    with pytest.raises(CFlowFastError, match=r"is for sm 9\.0, .* and this is sm 8\.0, "):
        ahead.unpack(archive, (8, 0), tmp_path / "there")


def test_an_archive_of_other_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "kernels.tar.xz"
    packed(tmp_path / "here", {"AAAABBBB/__grp__k.json": '{"child_paths": {}}'}, archive)
    assert ahead.unpack(archive, HOPPER, tmp_path / "there") == "1 kernels from kernels.tar.xz"
    monkeypatch.setattr(ahead, "sources", lambda: "others")
    assert ahead.unpack(archive, HOPPER, tmp_path / "there").endswith(
        "xz; of other sources: what has changed since is compiled anew"
    )


@pytest.mark.parametrize("size", [100, 300_000])
def test_a_damaged_archive_is_refused_whole(size: int, tmp_path: Path) -> None:
    archive, noise = tmp_path / "kernels.tar.xz", "".join(map(str, torch.randint(10, (size,)).tolist()))
    packed(tmp_path / "here", {"AAAABBBB/k.cubin": noise, "AAAABBBB/k.json": "{}"}, archive)
    whole = archive.read_bytes()
    for place in range(50, len(whole) - 50, len(whole) // 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        archive.write_bytes(damaged)
        with pytest.raises(CFlowFastError, match="cannot unpack"):
            ahead.unpack(archive, HOPPER, tmp_path / "there")
        assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("about", ["[]", "{}", "7", "no JSON", '{"facts": [], "sources": "", "files": {}}'])
def test_an_archive_that_says_nothing_of_itself_is_refused(about: str, tmp_path: Path) -> None:
    archive = tmp_path / "kernels.tar.xz"
    handmade(archive, {ahead.ABOUT: about, "AAAABBBB/k.json": "{}"})
    with pytest.raises(CFlowFastError, match="cannot unpack"):
        ahead.unpack(archive, HOPPER, tmp_path / "there")


def test_a_file_that_is_no_such_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kernels.tar.xz"
    file.write_bytes(b"something else")
    with pytest.raises(CFlowFastError, match="cannot unpack"):
        ahead.unpack(file, HOPPER, tmp_path)
    handmade(file, {"empty": ""})
    with pytest.raises(CFlowFastError, match="holds no compiled kernels"):
        ahead.unpack(file, HOPPER, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [((), "unset TRITON_INTERPRET"), (("--capability", "sm_90"), "it is a number like 9.0, got 'sm_90'")],
)
def test_what_cannot_be_compiled_for_is_said(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options:
        monkeypatch.setattr(ahead.triton.knobs.runtime, "interpret", False)
    result = CliRunner().invoke(ahead.main, [str(tmp_path / "kernels.tar.xz"), *options])
    assert result.exit_code == 2
    assert said in result.output
