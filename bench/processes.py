"""Processes that end together with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_running: dict[int, subprocess.Popen[str]] = {}
"""Those that `group` has not left yet, by process id, which is their group's too."""


@contextmanager
def group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; whatever is left of the group is killed on leaving."""
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    _running[process.pid] = process
    try:
        yield process
    finally:
        kill_group(process)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        del _running[process.pid]


def run_group(command: Sequence[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with a timeout after which nothing of what was started runs on."""
    with group(command, **options) as process:
        output, errors = process.communicate(timeout=max(0.0, seconds))
        return subprocess.CompletedProcess(list(command), process.returncode, output, errors)


def kill_groups() -> None:
    """For a process that is about to end without leaving what it is in."""
    for process in list(_running.values()):
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # it ended, and left nothing
        os.killpg(process.pid, signal.SIGKILL)
