"""Results of one kind of CPU never take the place of another's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cflow_fast.bench.conftest import command_of, results_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu-intel-xeon-processor.json"),
        ("Intel(R) Xeon(R) CPU E5-2670 v3 @ 2.30GHz", "cpu-intel-xeon-cpu-e5-2670-v3.json"),
        ("AMD EPYC", "cpu-amd-epyc.json"),
        ("AMD Ryzen(TM) 9/7950X", "cpu-amd-ryzen-9-7950x.json"),
        ("", "cpu-unknown.json"),
    ],
)
def test_a_folder_gets_a_file_named_after_the_cpu(cpu: str, name: str) -> None:
    assert results_file(Path("folder"), cpu) == Path("folder", name)
    assert results_file(Path("folder/mine.json"), cpu) == Path("folder/mine.json")


@pytest.mark.parametrize(
    ("options", "place"), [([], "bench/results"), (["RESULTS=build/mine.json"], "build/mine.json")]
)
def test_make_bench_cpu_keeps_results_where_it_is_told_and_under_its_own_name(options: list[str], place: str) -> None:
    command = ["make", "-n", "--no-print-directory", "bench-cpu", *options]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "RESULTS")}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    words = said.stdout.splitlines()[-1].split(" -m pytest ")[1].split()
    assert words[-2:] == ["--results", place]
    assert command_of(words) == "make bench-cpu"
    assert command_of(["bench/test_others.py", *words[1:]]).startswith("python -m pytest bench/test_others.py ")
