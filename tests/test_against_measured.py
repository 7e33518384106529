"""Predictions beside what was measured, of stubbed machine code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_stubs import CODE, H100

from cflow_fast.bench import against_measured
from cflow_fast.bench.against_measured import Pair, pairs, summary
from cflow_fast.bench.aot import Kernel
from cflow_fast.bench.compiled import Compiled
from cflow_fast.bench.prediction import predict
from cflow_fast.kernels.configs import LinearConfig, Problem

ROW = {"permutations": "soft", "kernel": "linear", "precision": "bf16", "rows": 64, "inputs": 1024, "outputs": 2304}
TILE = {"block_rows": 64, "block_out": 32, "block_k": 128, "warps": 4, "stages": 4, "split_k": 1, "programs": 8}
RESULTS = Path(__file__).parents[1] / "bench/results/nvidia-h100-80gb-hbm3/candidates.json"


def row(run: int, microseconds: float, **tile: int) -> dict[str, object]:
    return ROW | {"second": 0, "run": run, "config": TILE | tile, "microseconds": microseconds}


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """What was compiled: deep pipelines spill."""
    found: list[Kernel] = []

    def machine_code(kernels: Sequence[Kernel]) -> list[Compiled]:
        found.extend(kernels)
        return [replace(CODE, spills=9 * (kernel.launch.options["num_stages"] == 6)) for kernel in kernels]

    monkeypatch.setattr(against_measured, "compile_all", machine_code)
    return found


def test_launches_of_the_last_run_are_predicted_as_they_were_timed(tmp_path: Path, compiled: list[Kernel]) -> None:
    rows = [row(1, 9.0), row(2, 6.0), row(2, 7.0, block_out=64, programs=4), row(2, 5.0, stages=6)]
    (tmp_path / "candidates.json").write_text(json.dumps(rows))
    found = pairs(tmp_path / "candidates.json", H100)
    assert [round(1e6 * pair.measured, 3) for pair in found] == [6.0, 7.0]
    assert {pair.group for pair in found} == {("soft", Problem("linear", "bf16", 64, (1024, 2304, 0)))}
    for pair, kernel in zip(found, compiled, strict=False):
        assert pair.predicted == predict(kernel.launch, CODE, H100).seconds
        assert not kernel.launch.constexprs["EARLY"]
        assert "launch_pdl" not in kernel.launch.options


def test_the_summary_says_how_far_off_and_what_that_costs() -> None:
    few, many = (("soft", Problem("linear", "bf16", rows, (64, 64, 0))) for rows in (64, 32768))
    found = [Pair(few, 1e-6, 2e-6), Pair(few, 2e-6, 1e-6), Pair(many, 3e-6, 3e-6), Pair(many, 4e-6, 4e-6)]
    assert summary(found).splitlines() == [
        "4 launches: predicted over measured 1.00, within 49.0% (RMS)",
        "1 problems of few rows: what is predicted fastest takes 100.0% longer than the fastest, at most 100.0%",
        "1 problems of many rows: what is predicted fastest takes 0.0% longer than the fastest, at most 0.0%",
    ]


def test_what_is_kept_of_a_card_is_read() -> None:
    timed = against_measured._timed(json.loads(RESULTS.read_text()))
    assert {permutations for permutations, _ in timed} == {"soft", "hard"}
    assert all(isinstance(config, LinearConfig) for (_, p), d in timed.items() if p.kernel == "linear" for config in d)
    assert len({problem for _, problem in timed}) == 30
