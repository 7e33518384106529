"""A run of many steps with one end: every step's words and files are kept as soon as it is done, whatever comes next.

A step that fails ends itself alone; one that hangs is ended with the process, a little after the time is over. Steps
that time nothing may run side by side, in a process each.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import subprocess
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cflow_fast.bench.processes import group, kill, kill_groups
from cflow_fast.files import atomic_path, write_text

LEAST_SECONDS = 10.0
"""A step is not begun with less."""
SLACK = 15.0
"""Seconds after the end at which a step that is still at it is given up."""

STDERR = 2
"""As it was given to the process, whatever `sys.stderr` is by now."""


@dataclass
class Suite:
    """Where results go, how much time is left for them, and what has been found so far; kept in state.json."""

    folder: Path
    ends: float  # time.time(), which a process that takes over reads too
    facts: dict[str, Any] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    pack: Path | None = None  # an archive of the folder, made anew with every summary
    doing: str = ""  # the step that was begun last
    waiting: list[str] = field(default_factory=list, compare=False)  # steps whose processes are waited for

    @property
    def seconds_left(self) -> float:
        return self.ends - time.time()

    def run(self, name: str, step: Callable[[Suite], str]) -> None:
        """A step's own words are told and go into the summary; it is left out when there is no time for it."""
        if self.seconds_left < LEAST_SECONDS:
            self.failed.append(f"{name}: no time was left")
            return
        self.doing, began = name, time.time()
        print(f"{name} ...", flush=True)
        try:
            words = step(self)
        except Exception as error:  # whatever goes wrong, the other steps are worth having
            traceback.print_exc()
            words = f"failed: {type(error).__name__}: {error}"
        if words.startswith("failed"):
            self.failed.append(f"{name}: {words.splitlines()[0]}")
        took = f"{time.time() - began:.0f} s"
        print(f"{words}\n({took})\n", flush=True)
        self.summary.append(f"## {name}\n\n{words}\n\n*{took}*\n")

    def run_together(self, commands: Mapping[str, Callable[[float], Sequence[str]]], seconds: float) -> None:
        """Steps side by side, told in their order once all are done.

        commands: by a step's name, what begins a process that runs it as a `Part` of this suite, given its seconds.
        """
        if min(seconds, self.seconds_left) < LEAST_SECONDS:
            self.failed += [f"{name}: no time was left" for name in commands]
            return
        self.doing = ", ".join(commands)
        print(f"{self.doing}, side by side ...", flush=True)
        self.store()
        self.waiting = list(commands)
        ends = time.monotonic() + seconds + 3 * SLACK  # a process has its own end, and ends itself after it
        with ExitStack() as stack:
            running = {}
            for name, command in commands.items():
                _report(self.folder, name).unlink(missing_ok=True)  # of a run that was ended before it was taken over
                # A file: a pipe that nobody reads fills up.
                log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
                output: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
                running[name] = stack.enter_context(group(command(seconds), has_groups=True, **output)), log
            for name, (process, log) in running.items():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.1, ends - time.monotonic()))
                if process.poll() is None:
                    kill(process)
                log.seek(0)
                told = log.read().strip()
                print(f"{told}\n", flush=True)
                self._take_over(name, process.wait(), (told.splitlines() or ["no output"])[-1])

    def take_over_the_rest(self) -> None:
        """What parts that are waited for have found by now, when the time is over."""
        for name in list(self.waiting):
            self._take_over(name, 1, "still at it when the time was over")

    def _take_over(self, name: str, code: int, last: str) -> None:
        """code, last: the process's exit code, and its last line, which count where it left no report."""
        self.waiting.remove(name)
        report = _report(self.folder, name)
        found = json.loads(report.read_text()) if report.exists() else {"summary": [], "failed": []}
        report.unlink(missing_ok=True)
        self.summary += found["summary"]
        self.failed += found["failed"]
        if not found["failed"] and (code or not found["summary"]):
            self.failed.append(f"{name}: exit code {code}: {last}")

    def store(self) -> None:
        command = self.facts.get("command", "make gpu")
        head = f"# {self.facts['card']}\n\n`{command}`, torch {self.facts['torch']}, triton {self.facts['triton']}\n"
        failures = ["## Failed\n", *(f"- {line}" for line in self.failed)] if self.failed else []
        self.write("summary.md", "\n".join([head, *self.summary, *failures]) + "\n")
        kept = ("ends", "facts", "summary", "failed", "doing")
        self.write_json("state.json", {name: getattr(self, name) for name in kept})
        if self.pack is not None:
            self._archive(self.pack)

    @classmethod
    def stored(cls, folder: Path, pack: Path | None = None) -> Suite:
        state = json.loads((folder / "state.json").read_text())
        return cls(folder, pack=pack, **state)

    def write(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)

    def write_json(self, name: str, content: object) -> None:
        self.write(name, json.dumps(content, indent=1) + "\n")

    def _archive(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            files = [each for each in sorted(self.folder.glob("[!.]*")) if each.is_file()]  # the others come and go
            with tarfile.open(temporary, "w:gz") as archive:
                for each in files:
                    if each.resolve() not in (path.resolve(), temporary.resolve()):
                        archive.add(each, f"{self.folder.name}/{each.name}")


class Part(Suite):
    """One step of a suite in a process of its own, which leaves what it found for the one that waits for it."""

    def store(self) -> None:
        write_text(_report(self.folder, self.doing), json.dumps({"summary": self.summary, "failed": self.failed}))

    @classmethod
    def of(cls, folder: Path, seconds: float) -> Part:
        """Of the suite whose state is stored in the folder."""
        return cls(folder, time.time() + seconds, Suite.stored(folder).facts)


def _report(folder: Path, name: str) -> Path:
    return folder / f".{name}.json"


@contextmanager
def watched(suite: Suite) -> Iterator[None]:
    """Within it the process ends soon after the suite's time, with what is known stored and all that was started gone.

    What holds Python's lock while it hangs stops a thread of Python's too: then, a little later, only the process ends.
    """
    seconds = max(0.0, suite.seconds_left) + SLACK
    timer = threading.Timer(seconds, _give_up, [suite])
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + SLACK, exit=True, file=STDERR)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _give_up(suite: Suite) -> None:
    try:
        faulthandler.dump_traceback(file=STDERR)
        if suite.waiting:
            suite.take_over_the_rest()
        else:
            suite.failed.append(f"{suite.doing}: still at it when the time was over")
        print(f"{suite.doing}: the time is over; see {suite.folder / 'summary.md'}", flush=True)
        suite.store()
    finally:
        kill_groups()  # not before: what waits for them would go on
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)
