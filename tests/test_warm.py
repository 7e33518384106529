"""Compiling in processes of their own while something else is timed."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from cflow_fast.bench import warm
from cflow_fast.bench.headline import Headline
from cflow_fast.bench.tune_targets import candidate_launches, targets
from cflow_fast.kernels.chip import Chip

CHIP = Chip((9, 0), 132, "Some Card")


def test_processes_share_the_candidates_in_the_order_in_which_they_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(warm, "_compile", lambda launch: compiled.append(warm._binary_key(launch)) or "")
    wanted = targets(("resnet18",), ("bf16",), (64,), (1,))
    shares = []
    for share in range(3):
        compiled.clear()
        warm.compile_candidates(wanted, CHIP, share, 3)
        shares.append(list(compiled))
    everything = list(dict.fromkeys(map(warm._binary_key, candidate_launches(wanted, CHIP))))
    assert all(shares)
    assert [shares[i % 3][i // 3] for i in range(len(everything))] == everything
    assert sum(map(len, shares)) == len(everything)


@pytest.mark.parametrize("module", ["import sys, time; sys.stdin.read(); time.sleep(60)", "raise SystemExit(1)"])
def test_processes_that_compile_ahead_get_the_targets_and_end_with_the_search(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a search that ends early, and those that cannot even begin."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        assert command[1:4] == ["-m", "cflow_fast.bench.warm", "--candidates"]
        assert command[4:] == [str(len(started)), "3", "cuda:1"]
        started.append(popen([sys.executable, "-c", module], **options))
        return started[-1]

    monkeypatch.setattr(warm.subprocess, "Popen", start)
    monkeypatch.setattr(warm.os, "cpu_count", lambda: 4)

    def search() -> None:
        with warm.compiling_ahead(targets(), torch.device("cuda", 1)):
            assert len(started) == 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search()
    assert all(process.returncode is not None for process in started)


@pytest.fixture
def two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of one decoder at two sizes of image, on an H100."""
    lines = [Headline("resnet18", 2, 512, "soft", "bf16", size, 1) for size in (256, 512)]
    launches = [launch for line in lines for launch in line.launches(Chip())]
    monkeypatch.setattr(warm, "planned_launches", lambda chip: launches)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip()))


@pytest.mark.usefixtures("two_sizes")
def test_every_binary_is_compiled_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(warm, "_compile", lambda launch: compiled.append(warm._binary_key(launch)) or "")
    told = [line for share in range(3) for line in warm.compile_share(share, 3)]
    assert len(told) == len(compiled) == len(set(compiled))
    assert set(told) == {""}


@pytest.mark.usefixtures("two_sizes")
def test_a_kernel_that_cannot_be_compiled_is_a_line_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_compile", lambda launch: "linear_kernel: CompilationError: ['no']")
    told = list(warm.compile_share(0, 1))
    assert len(told) > 1
    assert all(told)


def compile_by(programs: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[int]]:
    """What is said of processes that run these programs in the place of compiling, and their exit codes."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        assert command[1:] == ["-m", "cflow_fast.bench.warm", str(len(started)), str(len(programs))]
        started.append(popen([sys.executable, "-c", programs[len(started)]], **options))
        return started[-1]

    monkeypatch.setattr(warm.subprocess, "Popen", start)
    monkeypatch.setattr(warm.os, "cpu_count", lambda: len(programs))
    words = warm.compile_on_all_cores(seconds)
    return words, [process.wait() for process in started]


def test_kernels_are_counted_whatever_else_a_process_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = ["print('a warning')\nfor _ in range(2): print('compiled: ')\nprint(3)", "print('compiled: ')"]
    assert compile_by(programs, 60, monkeypatch)[0] == "3 kernels in 2 processes"


def test_what_fails_is_told_beside_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = [
        "print('compiled: ')\nprint('compiled: linear_kernel: no')",
        "print('compiled: ')\nraise SystemExit('no card')",
    ]
    words, codes = compile_by(programs, 60, monkeypatch)
    assert words == "failed: 2 of them, the first: no card; 2 kernels in 2 processes"
    assert codes == [0, 1]


def test_nothing_is_compiled_any_more_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor beside what is timed next; what was compiled until then counts."""
    slow = "import time\nprint('compiled: ', flush=True)\ntime.sleep(600)"
    began = time.monotonic()
    words, codes = compile_by([slow, slow], 6, monkeypatch)
    assert words == "2 kernels in 2 processes; 2 processes did not finish in 6 s"
    assert codes == [-9, -9]
    assert time.monotonic() - began < 30


def test_an_error_while_waiting_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess.Popen, "communicate", lambda *_, **__: pytest.fail("interrupted"))
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[-1]

    monkeypatch.setattr(warm.subprocess, "Popen", start)
    with pytest.raises(pytest.fail.Exception, match="interrupted"):
        warm.compile_on_all_cores(60)
    assert started
    assert all(process.returncode == -9 for process in started)
