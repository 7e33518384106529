"""A run of many steps: what fails, hangs or is killed costs no more than itself, and leaves nothing running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cflow_fast.bench.processes import group, run_group
from cflow_fast.bench.suite import Suite, watched

FACTS = {"card": "Some Card", "torch": "2", "triton": "3"}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path / "card", time.time() + 600, dict(FACTS), pack=tmp_path / "card.tar.gz")


def test_a_step_that_fails_is_told_and_the_next_ones_run(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(suite: Suite) -> str:
        raise RuntimeError("an illegal memory access was encountered")

    for name, step in (("first", lambda suite: "fine"), ("second", broken), ("third", lambda suite: "failed: 3 of 4")):
        suite.run(name, step)
    suite.store()
    text = (suite.folder / "summary.md").read_text()
    assert "## first\n\nfine" in text
    assert "- second: failed: RuntimeError: an illegal memory access was encountered" in text
    assert "- third: failed: 3 of 4" in text
    told = capsys.readouterr().out
    assert "first ...\nfine\n(0 s)\n" in told
    assert "third ...\nfailed: 3 of 4\n" in told


def test_a_step_without_time_left_is_not_begun(suite: Suite) -> None:
    suite.ends = time.time() + 1
    suite.run("late", lambda suite: pytest.fail("it was begun"))
    assert suite.failed == ["late: no time was left"]


def test_another_process_takes_over_with_all_that_was_found(suite: Suite) -> None:
    suite.facts["roofline"] = {"matrix": {"bf16": 1e15}}
    suite.run("first", lambda suite: "fine")
    suite.store()
    assert Suite.stored(suite.folder, suite.pack) == suite


def test_the_archive_holds_all_files_as_they_are_after_the_last_step(suite: Suite) -> None:
    for words in ("fine", "fine as well"):
        suite.write("rows.json", words)
        suite.write(".on its way", words)
        suite.run(words, lambda suite: "done")
        suite.store()
    assert suite.pack is not None
    with tarfile.open(suite.pack) as archive:
        assert sorted(archive.getnames()) == ["card/rows.json", "card/state.json", "card/summary.md"]
        packed = archive.extractfile("card/rows.json")
        assert packed is not None
        assert packed.read() == b"fine as well"


def test_an_archive_inside_the_folder_does_not_hold_itself(suite: Suite) -> None:
    suite.pack = suite.folder / "all.tar.gz"
    for _ in range(2):
        suite.store()
    with tarfile.open(suite.pack) as archive:
        assert sorted(archive.getnames()) == ["card/state.json", "card/summary.md"]


HANGING = """
import sys, time
from pathlib import Path
from cflow_fast.bench import suite
from cflow_fast.bench.processes import group, run_group

suite.SLACK, suite.LEAST_SECONDS = 0.5, 0.0

def hang(run):
    with (run.folder / "child.txt").open("w") as log:
        run_group(["sh", "-c", "echo $$; exec sleep 600"], 600, stdout=log)

run = suite.Suite(Path(sys.argv[1]), time.time() + 3, {"card": "Some Card", "torch": "2", "triton": "3"})
with suite.watched(run):
    run.run("first", lambda run: "fine")
    run.run("second", hang)
"""


def test_a_step_that_hangs_is_told_and_ends_with_all_that_it_started(tmp_path: Path) -> None:
    done = run_python(HANGING, tmp_path)
    assert done.returncode == 1
    assert "second: the time is over; see " in done.stdout
    assert "in hang" in done.stderr
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["failed"] == ["second: still at it when the time was over"]
    assert "## first\n\nfine" in (tmp_path / "summary.md").read_text()
    assert is_gone(int((tmp_path / "child.txt").read_text()))


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def is_gone(pid: int, within: float = 10.0) -> bool:
    ends = time.monotonic() + within
    while time.monotonic() < ends:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_watch_that_is_left_ends_nothing(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.bench.suite.SLACK", 0.05)
    suite.ends = time.time()
    with watched(suite):
        pass
    time.sleep(0.3)
    assert suite.failed == []


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds", [0, 600], ids=["ends", "takes too long"])
def test_a_command_leaves_no_process_behind(seconds: int, tmp_path: Path) -> None:
    command: Sequence[str] = [sys.executable, "-c", PARENT.format(seconds=seconds)]
    with (tmp_path / "pid").open("w") as log:
        if seconds:
            with pytest.raises(subprocess.TimeoutExpired):
                run_group(command, 6, stdout=log)
        else:
            assert run_group(command, 60, stdout=log).returncode == 0
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_what_a_command_says_is_told() -> None:
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    done = run_group([sys.executable, "-c", code], 60, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, "one\n", "two\n")


PART = """
import os, sys, time
from pathlib import Path
from cflow_fast.bench.suite import Part
part = Part.of(Path(sys.argv[1]), 60)
time.sleep(float(sys.argv[3]))
part.run(sys.argv[2], lambda part: sys.argv[4])
part.store()
"""
PYTHON = (sys.executable, "-c")


@pytest.fixture
def python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def commands_of(commands: dict[str, list[str]]) -> dict[str, Callable[[float], list[str]]]:
    return {name: lambda seconds, command=command: command for name, command in commands.items()}


@pytest.mark.usefixtures("python_path")
def test_steps_side_by_side_are_told_in_their_order(
    suite: Suite, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes longer, one that fails, those that are gone with a report or without one, and one that hangs."""
    folder = str(suite.folder)
    commands = {
        "slow": [*PYTHON, PART, folder, "slow", "2", "fine"],
        "wrong": [*PYTHON, PART, folder, "wrong", "0", "failed: 3 of 4"],
        "crashes": [*PYTHON, PART + "os._exit(7)", folder, "crashes", "0", "fine"],
        "gone": [*PYTHON, r"import os; os.write(1, b'once\nwhy: \xe2\n'); raise SystemExit(3)"],
        "hangs": [*PYTHON, "import time; time.sleep(600)"],
    }
    monkeypatch.setattr("cflow_fast.bench.suite.SLACK", 1.0)
    began = time.monotonic()
    suite.run_together(commands_of(commands), 20)
    assert 20 < time.monotonic() - began < 60
    assert [text.split("\n")[0] for text in suite.summary] == ["## slow", "## wrong", "## crashes"]
    assert suite.failed == [
        *("wrong: failed: 3 of 4", "crashes: exit code 7: (0 s)", "gone: exit code 3: why: \ufffd"),
        "hangs: exit code -15: no output",
    ]
    told = capsys.readouterr().out
    assert told.startswith("slow, wrong, crashes, gone, hangs, side by side ...\nslow ...\nfine\n(")
    assert sorted(path.name for path in suite.folder.iterdir()) == ["state.json", "summary.md"]


def test_what_an_earlier_run_left_is_no_result_of_this_one(suite: Suite) -> None:
    suite.write(".step.json", json.dumps({"summary": ["## step\n\nfine, then"], "failed": []}))
    suite.run_together(commands_of({"step": ["false"]}), 60)
    assert suite.summary == []
    assert suite.failed == ["step: exit code 1: no output"]


def test_steps_side_by_side_without_time_left_are_not_begun(suite: Suite) -> None:
    suite.ends = time.time() + 1
    suite.run_together({"late": lambda seconds: pytest.fail("it was begun")}, 60)
    assert suite.failed == ["late: no time was left"]


GIVEN_UP = """
import sys, time
from pathlib import Path
from cflow_fast.bench import suite

suite.SLACK, suite.LEAST_SECONDS = 0.5, 0.0
run = suite.Suite(Path(sys.argv[1]), time.time() + 8, {"card": "Some Card", "torch": "2", "triton": "3"})
report = run.folder / ".done.json"
found = '{"summary": ["## done"], "failed": []}'
sleeping = ["sh", "-c", f"echo $$ > '{run.folder}/child.txt'; exec sleep 600"]
commands = {"hangs": lambda seconds: sleeping, "done": lambda seconds: ["sh", "-c", f"echo '{found}' > '{report}'"]}
with suite.watched(run):
    run.run_together(commands, 600)
"""


def test_what_was_found_side_by_side_is_kept_when_the_time_is_over(tmp_path: Path) -> None:
    done = run_python(GIVEN_UP, tmp_path)
    assert done.returncode == 1
    assert "hangs, done: the time is over; see " in done.stdout
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["summary"] == ["## done"]
    assert state["failed"][0] == "hangs: exit code 1: still at it when the time was over"
    assert not (tmp_path / ".done.json").exists()
    assert is_gone(int((tmp_path / "child.txt").read_text()))


WITH_GROUPS = """
import subprocess, sys
from cflow_fast.bench.processes import end_groups_when_told, group

end_groups_when_told()
with group([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
    print(child.pid, flush=True)
    child.wait()
"""


@pytest.mark.usefixtures("python_path")
def test_a_process_that_has_groups_ends_them_when_it_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "pid"
    with log.open("w") as output, group([*PYTHON, WITH_GROUPS], has_groups=True, stdout=output) as process:
        ends = time.monotonic() + 60
        while not log.read_text() and time.monotonic() < ends:
            time.sleep(0.05)
        child = int(log.read_text())
        assert not is_gone(child, within=0.2)
    assert process.returncode == 1
    assert is_gone(child)
