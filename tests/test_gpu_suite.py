"""`make gpu` without a card: every step that can run on a CPU does, and what fails is told and passed over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from cflow_fast import parity
from cflow_fast.bench import gpu
from cflow_fast.bench.cases import DecoderCase, Scales
from cflow_fast.bench.contenders import PLAIN
from cflow_fast.bench.decoder import CONTENDERS
from cflow_fast.bench.gpu import Step
from cflow_fast.bench.planned import FIRST_SIZES, NARROW_SIZES, WIDE_SIZES
from cflow_fast.bench.suite import Part, Suite
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import Problem, candidates
from cflow_fast.kernels.tuning_table import Entry, Table

CPU = torch.device("cpu")
FACTS = {"card": "Some Card", "torch": "2", "triton": "3"}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path, time.time() + 600, dict(FACTS))


def test_without_a_card_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    result = CliRunner().invoke(gpu.main)
    assert result.exit_code == 1
    assert "there is no CUDA device here" in result.output


def without_make() -> dict[str, str]:
    """The environment, but for what a `make` that runs these tests tells another that it runs."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def test_make_gpu_needs_nothing_installed(tmp_path: Path) -> None:
    """Of a checkout, by a Python that knows the other packages alone, whatever it looks for modules in first."""
    if torch.cuda.is_available() or shutil.which("make") is None:
        pytest.skip("there is a card, or no make")
    checkout, python = tmp_path / "checkout", tmp_path / "python"
    checkout.mkdir()
    for name in ("Makefile", "cflow_fast", "kernels", "bench"):
        (checkout / name).symlink_to(gpu.BENCH.parent / name)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # -S: no installation in development mode
    python.chmod(0o755)
    packages = str(Path(torch.__file__).parents[1])
    for safe_path in ("", "1"):  # nothing to Python 3.10
        environment = without_make() | {"PYTHONPATH": packages, "PYTHONSAFEPATH": safe_path}
        command = ["make", "--silent", "gpu", "PYTHON=../python", "OUTPUT=results"]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        said = done.stderr.splitlines()
        assert said[0] == "Error: there is no CUDA device here; `make aot` says what can be said without one"
        assert [line.split()[0] for line in said[1:]] == ["make:"]


def test_make_gpu_hands_on_where_results_go() -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    command = ["make", "-n", "gpu", "OUTPUT=here", "PACK=packed.tar.gz", "PYTHON=python3"]
    root = gpu.BENCH.parent
    said = subprocess.run(command, cwd=root, env=without_make(), capture_output=True, text=True, check=True).stdout
    assert f'--output "{root / "here"}" --pack "{root / "packed.tar.gz"}"' in " ".join(said.split())


def test_results_are_kept_in_the_checkout() -> None:
    assert gpu.RESULTS == gpu.BENCH / "results"
    assert (gpu.BENCH.parent / "tests" / Path(__file__).name).samefile(__file__)


def fine(suite: Suite) -> str:
    return "fine"


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")


@pytest.mark.usefixtures("card")
def test_steps_are_kept_one_by_one_and_a_lost_card_is_left_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    summary = tmp_path / "results/nvidia-h100-80gb-hbm3/summary.md"

    def third(suite: Suite) -> str:
        assert "## second\n\nfine" in summary.read_text()
        return "failed: an illegal memory access"

    steps = (Step("first", fine), Step("second", fine), Step("third", third), Step("fourth", pytest.fail))
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "_card_answers", lambda: not summary.exists() or "third" not in summary.read_text())
    monkeypatch.setattr(gpu.subprocess, "call", lambda command: begun.append(command) or 1)
    pack = tmp_path / "all.tar.gz"
    assert CliRunner().invoke(gpu.main, ["--pack", str(pack)]).exit_code == 1
    ((*_, number_of, number, output, folder, packing, packed),) = begun
    assert (number_of, number) == ("--go-on-from", "3")
    assert (output, folder, packing, packed) == ("--output", str(summary.parent), "--pack", str(pack))
    assert pack.exists()

    monkeypatch.setattr(gpu, "STEPS", (*(Step(step.name, pytest.fail) for step in steps[:3]), Step("fourth", fine)))
    monkeypatch.setattr(gpu, "_card_answers", lambda: True)
    result = CliRunner().invoke(gpu.main, [number_of, number, output, folder])
    assert result.exit_code == 1
    assert "FAILED third: failed: an illegal memory access" in result.output
    assert [line for line in summary.read_text().splitlines() if line.startswith("## ")] == [
        *("## first", "## second", "## third", "## fourth", "## Failed")
    ]


@pytest.mark.usefixtures("card")
def test_steps_can_be_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (Step("first", fine), Step("slow one", pytest.fail), Step("third", fine))
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "_card_answers", lambda: True)
    options = ["--minutes", "4", "--case-seconds", "0.5", "--leave-out", "slow one"]
    assert CliRunner().invoke(gpu.main, options).exit_code == 0
    summary = (tmp_path / "results/nvidia-h100-80gb-hbm3/summary.md").read_text()
    assert summary.splitlines()[2].startswith("`make gpu SUITE='--minutes 4 --case-seconds 0.5 --leave-out ")
    assert [line for line in summary.splitlines() if line.startswith("## ")] == ["## first", "## third"]
    result = CliRunner().invoke(gpu.main, ["--leave-out", "fourth"])
    assert result.exit_code == 2
    assert "'fourth' is none of first, slow one, third" in result.output


def test_what_tuning_found_is_launched_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_CACHE", "/the/user's/own")
    chip, problem = Chip((9, 0), 132, "Some Card"), Problem("linear", "bf16", 64, (512, 1280, 0))
    usual = tuning.select_linear(64, 512, 1280, "bf16", chip)
    other = next(config for config in candidates(problem, chip) if config != usual)
    try:
        gpu._put_to_use(Table("Some Card", 132, {problem: Entry(other, None, 1.0)}, {}, {}))
        assert tuning.select_linear(64, 512, 1280, "bf16", chip) == other
        assert tuning.cache_path("Some Card").exists()
    finally:
        tuning.forget()


@pytest.mark.usefixtures("card")
def test_an_archive_that_cannot_be_written_is_found_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STEPS", (Step("first", pytest.fail),))
    (tmp_path / "file").touch()
    result = CliRunner().invoke(gpu.main, ["--pack", str(tmp_path / "file" / "all.tar.gz")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: cannot write")


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that notes how it was called and runs what it is to check."""
    tool = tmp_path / "sanitizer"
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"\nshift 6\n"$@" || exit 9\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu, "SANITIZER", ("no-such-tool", str(tool)))
    return tool


def test_small_decoders_run_alone_and_then_under_the_sanitizer(
    suite: Suite, sanitizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SMALL", ("echo", "small"))
    monkeypatch.setattr(gpu, "_runs", lambda tool: tool == str(sanitizer))
    assert gpu.memory_check(suite) == "no error"
    alone, under, called, again = (suite.folder / "sanitizer.txt").read_text().split("small\n")[:4]
    assert alone == "$ echo "
    assert under == ""
    assert called.startswith(f"$ {sanitizer} --tool memcheck --report-api-errors no --error-exitcode 9 echo ")
    assert again == "1 --tool memcheck --report-api-errors no --error-exitcode 9 echo "


def test_an_error_under_the_sanitizer_fails(suite: Suite, sanitizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SMALL", ("sh", "-c", 'test -z "$PYTORCH_NO_CUDA_MEMORY_CACHING"'))
    monkeypatch.setattr(gpu, "_runs", lambda tool: tool == str(sanitizer))
    assert gpu.memory_check(suite) == f"failed: exit code 9 of {sanitizer}, see sanitizer.txt"


def test_a_memory_check_without_time_or_tool_is_not_measured(
    suite: Suite, sanitizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_runs", lambda tool: False)
    assert "is not installed" in gpu.memory_check(suite)
    monkeypatch.setattr(gpu, "_runs", lambda tool: True)
    monkeypatch.setattr(gpu, "LEAST_SANITIZING", 0.2)
    monkeypatch.setattr(gpu, "SMALL", ("sleep", "60"))
    suite.ends = time.time()
    assert gpu.memory_check(suite) == "not measured: sleep was not done in time"


def test_decoders_are_measured_beside_the_plain_path_and_tabled(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CARD", CPU)
    monkeypatch.setattr(gpu, "Effort", lambda seconds: gpu_effort(0.2))
    case = DecoderCase("tiny", Scales((16, 24), (8, 16)), 136, 2, "soft", coupling_blocks=2, condition=8)
    table = gpu._measured(suite, "tiny.json", CONTENDERS, [case], [PLAIN], ["fp32"])
    lines = table.splitlines()
    assert len(lines) == 4
    assert f"| {PLAIN} fp32 |" in table
    assert "not measured" not in table
    assert len(json.loads((suite.folder / "tiny.json").read_text())["rows"]) == 2


def gpu_effort(seconds: float) -> object:
    from cflow_fast.bench.measurement import Effort

    return Effort(seconds=seconds, least_rounds=6)


def small_case(features: int, permute_soft: bool, device: torch.device) -> parity.Case:
    return parity.random_case(features, permute_soft, condition=8, size=(1, 8, 8))


def test_parity_keeps_and_counts_what_was_compared_before_the_time_was_over(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 1.0, 200.0])
    monkeypatch.setattr(parity, "failures", lambda kind, ours, theirs: [])
    monkeypatch.setattr(gpu, "parity", SimpleNamespace(check=parity.check, random_case=small_case, Row=parity.Row))
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    suite.ends = time.time() + 150
    words = gpu._parity(suite, "parity.json", (8, 12))
    rows = json.loads((suite.folder / "parity.json").read_text())
    assert {row["case"].split(",")[0] for row in rows} == {"D=8 hard", "D=8 soft"}
    assert words == f"{len(rows)} comparisons with float64 within their bounds; 2 of 4 decoders, for want of time"


def test_parity_names_what_is_out_of_bounds(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(case: parity.Case) -> Iterator[parity.Row]:
        yield replace(next(iter(parity.check(case))), failures=["maximum is 3, over 2"])

    monkeypatch.setattr(gpu, "parity", SimpleNamespace(check=check, random_case=small_case, Row=parity.Row))
    words = gpu._parity(suite, "parity.json", (8,))
    assert words.startswith("failed: D=8 hard")
    assert words.count("fp32: maximum is 3, over 2") == 2


def test_what_was_compared_before_a_failure_is_kept(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(case: parity.Case) -> Iterator[parity.Row]:
        yield next(iter(parity.check(case)))
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu, "parity", SimpleNamespace(check=check, random_case=small_case, Row=parity.Row))
    suite.run("parity", lambda suite: gpu._parity(suite, "parity.json", (8,)))
    assert len(json.loads((suite.folder / "parity.json").read_text())) == 1
    assert suite.failed == ["parity: failed: RuntimeError: an illegal memory access"]


def test_what_is_right_is_found_out_before_what_is_fast() -> None:
    names = [step.name for step in gpu.STEPS]
    assert names[:3] == ["kernels compiled ahead", "tests on the card", "parity, first sizes"]
    assert [step.together for step in gpu.STEPS] == [False, *[True] * 5, *[False] * (len(names) - 6)]
    assert sorted((*FIRST_SIZES, *NARROW_SIZES, *WIDE_SIZES)) == sorted(parity.SIZES)


SIDE_BY_SIDE = (
    Step("first", fine, together=True),
    Step("second", lambda suite: pytest.fail("it is left out"), together=True),
    Step("third", fine, together=True),
    Step("alone", fine),
)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("memory", [80e9, 16e9], ids=["roomy", "small"])
def test_what_times_nothing_runs_side_by_side_where_there_is_room(
    memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[dict[str, list[str]]] = []

    def run(suite: Suite, commands: dict[str, Callable[[float], list[str]]], seconds: float) -> None:
        together.append({name: command(seconds) for name, command in commands.items()})

    monkeypatch.setattr(gpu, "STEPS", SIDE_BY_SIDE)
    monkeypatch.setattr(gpu, "_card_answers", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    monkeypatch.setattr(Suite, "run_together", run)
    clock = iter([0.0, 0.0, 130.0])  # the first of two takes as long
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    assert CliRunner().invoke(gpu.main, ["--leave-out", "second"]).exit_code == 0
    assert [list(some) for some in together] == ([["first", "third"]] if memory > 40e9 else [["first"], ["third"]])
    if memory < 40e9:
        assert together[1]["third"][-1] == "0.333", "what is left of the time for all"
    minutes = gpu.MOST_CHECKING / 60
    options = ["--output", str(tmp_path / "results/nvidia-h100-80gb-hbm3"), "--minutes", f"{minutes:.3f}"]
    assert together[0]["first"][1:] == ["-m", "cflow_fast.bench.gpu", "--part", "first", *options]
    summary = (tmp_path / "results/nvidia-h100-80gb-hbm3/summary.md").read_text()
    assert "## alone\n\nfine" in summary


@pytest.mark.usefixtures("card")
def test_a_part_leaves_what_it_found_to_the_process_that_waits(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def third(part: Suite) -> str:
        assert isinstance(part, Part)
        assert 50 < part.seconds_left <= 60
        assert part.facts["roofline"] == 7
        return "failed: 1 of 2"

    watched: list[Suite] = []
    monkeypatch.setattr(gpu, "watched", lambda part: watched.append(part) or contextlib.nullcontext())
    monkeypatch.setattr(gpu, "end_groups_when_told", lambda: watched.append(suite))
    monkeypatch.setattr(gpu, "STEPS", (*SIDE_BY_SIDE[:2], Step("third", third, together=True)))
    suite.facts["roofline"] = 7
    suite.run("before", fine)
    suite.store()
    result = CliRunner().invoke(gpu.main, ["--part", "third", "--minutes", "1", "--output", str(suite.folder)])
    assert result.exit_code == 0, result.output
    assert watched[0] is suite
    assert isinstance(watched[1], Part)
    assert Suite.stored(suite.folder) == suite
    report = suite.folder / ".third.json"
    kept = report.rename(suite.folder.parent / "report.json")
    suite.run_together({"third": lambda seconds: ["cp", str(kept), str(report)]}, 60)
    assert suite.failed == ["third: failed: 1 of 2"]
    assert suite.summary[1].startswith("## third\n\nfailed: 1 of 2")
    assert sorted(path.name for path in suite.folder.iterdir()) == ["state.json", "summary.md"]


@pytest.mark.usefixtures("card")
def test_an_archive_that_is_of_no_use_does_not_stop_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "kernels.tar.xz"
    archive.touch()
    monkeypatch.setattr(gpu, "STEPS", (Step("first", fine),))
    monkeypatch.setattr(gpu, "_card_answers", lambda: True)
    result = CliRunner().invoke(gpu.main, ["--kernels", str(archive)])
    assert result.exit_code == 0
    assert "compiled before: nothing: cannot unpack" in result.output


@pytest.mark.usefixtures("card")
def test_kernels_of_an_archive_are_put_in_place_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "kernels.tar.xz"
    archive.touch()

    def first(suite: Suite) -> str:
        return suite.facts["compiled_before"]

    monkeypatch.setattr(gpu, "STEPS", (Step("first", first),))
    monkeypatch.setattr(gpu, "_card_answers", lambda: True)
    monkeypatch.setattr(gpu, "unpack", lambda path, capability: f"7 kernels for {capability} from {path.name}")
    result = CliRunner().invoke(gpu.main, ["--kernels", str(archive)])
    assert result.exit_code == 0
    assert result.output.startswith(
        "compiled before: 7 kernels for (9, 0) from kernels.tar.xz\n\nfirst ...\n7 kernels for"
    )


def test_time_is_left_to_what_is_timed(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long everything before it takes."""
    given: list[float] = []
    monkeypatch.setattr(gpu, "compile_on_all_cores", lambda seconds: given.append(seconds) or "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(Suite, "run_together", lambda suite, commands, seconds: given.append(seconds))
    for minutes in (gpu.MINUTES, 4):
        suite.ends = time.time() + 60 * minutes
        gpu.compiled(suite)
        suite.ends -= given[-1]
        gpu._run_together(suite, ["first", "second"])
        suite.ends -= given[-1]
        assert suite.seconds_left > gpu.FOR_TIMES - 5
    suite.ends = time.time() + gpu.FOR_TIMES + 5
    assert gpu.tuned(suite).startswith("not measured: what time is left")


def test_cases_without_time_are_counted(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CARD", CPU)
    suite.ends = time.time() + 15
    case = DecoderCase("tiny", Scales((16,), (8,)), 64, 1, "soft", coupling_blocks=1, condition=8)
    assert "1 cases were left out" in gpu._measured(suite, "tiny.json", CONTENDERS, [case], [PLAIN], ["fp32"])
