"""Rows measured by the benchmarks, collected and written as one table: `pytest bench --results FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from cflow_fast.bench.timing import Ratio, matrix_rate
from cflow_fast.files import write_text
from cflow_fast.precision import cpu_has

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder that the table is written to")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """record(case, precision, against, ratio, milliseconds, share): one row of the table."""

    def add(case: str, precision: str, against: str, ratio: Ratio, milliseconds: float, share: float | None) -> None:
        row = {"case": case, "precision": precision, "against": against, "milliseconds": round(milliseconds, 1)}
        row |= {"ratio": round(ratio.median, 3), "low": round(ratio.low, 3), "high": round(ratio.high, 3)}
        row["share_of_matrix_rate"] = None if share is None else round(share, 3)
        request.config.stash[ROWS].append(row)
        print(f"\n{case}, {precision}: {ratio} {against}" + ("" if share is None else f", {share:.0%} of the rate"))

    return add


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows, folder = session.config.stash.get(ROWS, []), session.config.getoption("--results")
    if not rows or folder is None:
        return
    facts = {
        "command": "make bench-cpu",
        "machine": _machine(),
        "matrix_rate_gflops": {
            str(dtype).removeprefix("torch."): round(matrix_rate(dtype) / 1e9)
            for dtype in (torch.float32, torch.bfloat16)
            if dtype == torch.float32 or cpu_has("amx_bf16") or cpu_has("avx512_bf16")
        },
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cflow-fast": version("cflow-fast")},
        "rows": rows,
    }
    write_text(folder / "cpu.json", json.dumps(facts, indent=2) + "\n")
    write_text(folder / "cpu.md", _markdown(facts))


def _machine() -> dict[str, Any]:
    features = [name for name in ("avx2", "avx512", "avx512_bf16", "amx_bf16") if cpu_has(name)]
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else "unknown", "threads": torch.get_num_threads(), "features": features}


def _markdown(facts: dict[str, Any]) -> str:
    machine, rate = facts["machine"], facts["matrix_rate_gflops"]
    head = f"`{facts['command']}` on {machine['cpu']}, {machine['threads']} threads, {', '.join(machine['features'])}; "
    head += ", ".join(f"{name} matrix rate {value} GFLOP/s" for name, value in rate.items())
    head += "; " + ", ".join(f"{name} {value}" for name, value in facts["versions"].items()) + ".\n\n"
    table = "| case | precision | against | speed-up, median [95% interval] | ms | share of the matrix rate |\n"
    table += "| --- | --- | --- | --- | --- | --- |\n"
    for row in facts["rows"]:
        share = "" if row["share_of_matrix_rate"] is None else f"{row['share_of_matrix_rate']:.0%}"
        table += f"| {row['case']} | {row['precision']} | {row['against']} | {row['ratio']:.2f} "
        table += f"[{row['low']:.2f}, {row['high']:.2f}] | {row['milliseconds']} | {share} |\n"
    return head + table
