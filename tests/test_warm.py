"""Compiling in processes of their own while something else is timed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from cflow_fast.bench import warm
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
