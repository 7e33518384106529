"""Processes that end together with all that they started, and work that is shared between some."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

LONGEST = 300.0
"""Seconds for a piece of shared work; one that hangs must not hold up the rest for ever."""

Item = TypeVar("Item")
Found = TypeVar("Found")

GRACE = 3.0
"""Seconds for a process that has groups of its own to end them."""

_running: dict[int, subprocess.Popen[str]] = {}
"""Those that `group` has not left yet, by process id, which is their group's too."""
_with_groups: set[int] = set()
"""Those of them that have groups of their own, which no signal to theirs reaches."""


@contextmanager
def group(command: Sequence[str], has_groups: bool = False, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; whatever is left of the group is killed on leaving.

    has_groups: it is told first, by SIGTERM, and given a moment: see `end_groups_when_told`.
    """
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    _running[process.pid] = process
    if has_groups:
        _with_groups.add(process.pid)
    try:
        yield process
    finally:
        kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        del _running[process.pid]
        _with_groups.discard(process.pid)


def run_group(command: Sequence[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with a timeout after which nothing of what was started runs on."""
    with group(command, **options) as process:
        output, errors = process.communicate(timeout=max(0.0, seconds))
        return subprocess.CompletedProcess(list(command), process.returncode, output, errors)


def kill_groups() -> None:
    """For a process that is about to end without leaving what it is in."""
    kill(*_running.values())


def end_groups_when_told() -> None:
    """On SIGTERM this process ends with all that it started."""

    def end(*_: object) -> None:
        kill_groups()
        os._exit(1)

    signal.signal(signal.SIGTERM, end)


def kill(*processes: subprocess.Popen[str]) -> None:
    """With their groups, and with the groups that they have."""
    told = [process for process in processes if process.pid in _with_groups and process.poll() is None]
    for process in told:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
    ends = time.monotonic() + GRACE
    for process in told:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, ends - time.monotonic()))
    for process in processes:
        with suppress(ProcessLookupError):  # it ended, and left nothing
            os.killpg(process.pid, signal.SIGKILL)


_work: tuple[Callable[[Any], Any], Sequence[Any]]


def in_processes(
    function: Callable[[Item], Found], items: Sequence[Item], processes: int | None = None, until: float = math.inf
) -> Iterator[Found | str]:
    """What a function makes of each item, in order, on all cores if nothing else is said; a string is why it failed.

    items: need not be such as can be pickled. until: time.monotonic() from which on nothing is waited for.
    """
    global _work
    _work = function, items  # workers are forked: an item cannot be pickled, its place in a list can
    gc.collect()  # by a worker, what is garbage here would be given back to a card that is not its own
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        results = [pool.apply_async(_worked, (index,)) for index in range(len(items))]
        for result in results:
            try:
                yield result.get(max(0.0, min(LONGEST, until - time.monotonic())))
            except multiprocessing.TimeoutError:  # it hangs, or took its process with it
                yield "it was not done in time"


def _worked(index: int) -> Any:
    function, items = _work
    try:
        return function(items[index])
    except Exception as error:  # whatever goes wrong, the others are worth having
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
