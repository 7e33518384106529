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
        _kill(process.pid)
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
    for pid in list(_running):
        _kill(pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it ended, and left nothing
        os.killpg(pid, signal.SIGKILL)
