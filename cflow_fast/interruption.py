"""Ctrl-C while the command line still imports what it needs, which takes seconds: a word in the place of a traceback.

Once a command runs it ends by itself. In a program that imports the package nothing is changed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells know it."""


def is_command_line() -> bool:
    """Whether this process is `cflow-fast` or `python -m cflow_fast`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # until the package that is to run has been imported
        return "cflow_fast" in sys.orig_argv
    return Path(program).stem == "cflow-fast"


_before = sys.excepthook


def end_quietly(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Of `sys.excepthook`'s form; what is no Ctrl-C goes to the one that was there before."""
    if not issubclass(kind, KeyboardInterrupt):
        _before(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr)
    raise SystemExit(INTERRUPTED)


if is_command_line():
    sys.excepthook = end_quietly
