"""Compile kernels before they are timed, on all cores; run small ones for a memory checker.

    python -m cflow_fast.bench.warm SHARE OF     compile every OF-th kernel of the suite, from the SHARE-th on
    python -m cflow_fast.bench.warm --candidates SHARE OF DEVICE    of the candidates for targets (JSON on stdin)
    python -m cflow_fast.bench.warm --small      run small decoders of every kind once

Every process asks Triton itself for the binary, by the launch it will make, and Triton keeps it on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from cflow_fast.bench.planned import (
    CONDITION,
    SMALL_BLOCKS,
    SMALL_FEATURES,
    SMALL_MAPS,
    SMALL_PRECISIONS,
    SMALL_ROWS,
    planned_launches,
)
from cflow_fast.bench.processes import group, kill
from cflow_fast.bench.tune_targets import Target, candidate_launches
from cflow_fast.decoder import FlowDecoder
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch, settle

MOST_PROCESSES = 16
PROCESSES_BESIDE = 8
"""At most while something is timed: each has a context on the card."""
COMPILED = "compiled: "
"""How a process that compiles a share begins a line about a kernel; what follows is why it failed, or nothing."""


def compile_on_all_cores(seconds: float) -> str:
    """What was compiled, in words. Processes that are not done by then are stopped: the rest is compiled in use."""
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    commands = [[sys.executable, "-m", "cflow_fast.bench.warm", str(i), str(count)] for i in range(count)]
    ends = time.monotonic() + seconds
    told: list[str] = []
    stopped, wrong = 0, []
    with ExitStack() as stack:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        for process in [stack.enter_context(group(command, **pipes)) for command in commands]:
            try:
                output, errors = process.communicate(timeout=max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                kill(process)
                output, errors = process.communicate()
                stopped += 1
            else:
                if process.returncode:
                    wrong.append((errors.strip().splitlines() or ["no output"])[-1])
            told += [line.removeprefix(COMPILED) for line in output.splitlines() if line.startswith(COMPILED)]
    wrong += filter(None, told)
    words = f"{told.count('')} kernels in {count} processes"
    words += f"; {stopped} processes did not finish in {seconds:.0f} s" if stopped else ""
    return f"failed: {len(wrong)} of them, the first: {wrong[0]}; {words}" if wrong else words


def compile_share(share: int, of: int) -> Iterator[str]:
    """For each of a share of the kernels, once it is compiled, why it could not be, or nothing."""
    yield from map(_compile, distinct(planned_launches(Chip.of(torch.device("cuda", 0))))[share::of])


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One for each binary, in the order of their first use."""
    return list({_binary_key(launch): launch for launch in launches}.values())


@contextmanager
def compiling_ahead(wanted: Sequence[Target], device: torch.device) -> Iterator[None]:
    """Processes that compile the candidates for targets in the order in which they are tried, until this is left.

    They yield to whoever measures, and what they have not reached is compiled by whoever wants it.
    """
    count = min(PROCESSES_BESIDE, (os.cpu_count() or 1) - 1)
    text = json.dumps([asdict(target) for target in wanted])
    running = []
    for share in range(count):
        command = [sys.executable, "-m", "cflow_fast.bench.warm", "--candidates", *map(str, (share, count, device))]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        )
        running.append(process)
        assert process.stdin is not None
        try:
            process.stdin.write(text)
            process.stdin.close()
        except OSError:  # it ended already
            continue
    try:
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def compile_candidates(wanted: Sequence[Target], chip: Chip, share: int, of: int) -> None:
    """Every of-th of the binaries that tuning for these targets asks for, from the share-th on, in its order."""
    seen: set[object] = set()
    for launch in candidate_launches(wanted, chip):
        key = _binary_key(launch)
        if key not in seen and len(seen) % of == share:
            _compile(launch)
        seen.add(key)


def _binary_key(launch: Launch) -> tuple[object, ...]:
    """Launches with one key are one binary: Triton specialises on dtypes, on 1, on what 16 divides, on the width."""

    def kind(value: Any) -> object:
        if isinstance(value, Tensor):
            return str(value.dtype)
        if isinstance(value, int) and value != 1:
            return value % 16 == 0, abs(value) >= 2**31
        return value if value in (None, 1) else type(value).__name__

    options = tuple(sorted(launch.options.items()))
    arguments = tuple(kind(value) for value in launch.args.values())
    return launch.kernel.__name__, arguments, tuple(launch.constexprs.items()), options


def warmed(launch: Launch) -> CompiledKernel:
    """Compiled as the launch would, with dtypes in the place of tensors."""
    arguments: list[Any] = [launch.args[name] for name in launch.kernel.arg_names if name in launch.args]
    dtypes = [value.dtype if isinstance(value, Tensor) else value for value in arguments]
    settle(launch.kernel)
    return launch.kernel.warmup(*dtypes, grid=launch.grid, **launch.constexprs, **launch.options)


def _compile(launch: Launch) -> str:
    """Why it failed, or nothing."""
    try:
        kernel = warmed(launch)
        kernel._init_handles()  # the launcher too is built and kept, and the card is asked whether it takes the binary
    except Exception as error:  # a compiler may fail in any way; the others are worth having
        return f"{launch.kernel.__name__}: {type(error).__name__}: {str(error).splitlines()[:1]}"
    return ""


def run_small(device: torch.device) -> None:
    """Every kind of decoder on maps that end inside a tile, and on loose rows."""
    for features in SMALL_FEATURES:
        z, condition = (
            torch.randn(SMALL_ROWS, features, device=device),
            torch.randn(SMALL_ROWS, CONDITION, device=device),
        )
        for permute_soft in (False, True):
            decoder = FlowDecoder(features, CONDITION, coupling_blocks=SMALL_BLOCKS, permute_soft=permute_soft)
            for precision in SMALL_PRECISIONS:
                folded = decoder.to(device).fold(precision)
                for batch, height, width in SMALL_MAPS:
                    folded.log_prob(torch.randn(batch, features, height, width, device=device))
                folded(z, [condition])
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    if sys.argv[1:] == ["--small"]:
        run_small(torch.device("cuda", 0))
    elif sys.argv[1:2] == ["--candidates"]:
        os.nice(10)
        torch.cuda.set_device(torch.device(sys.argv[4]))
        read = [Target(**fields) for fields in json.load(sys.stdin)]
        compile_candidates(read, Chip.of(torch.device(sys.argv[4])), int(sys.argv[2]), int(sys.argv[3]))
    else:
        for reason in compile_share(int(sys.argv[1]), int(sys.argv[2])):
            print(f"{COMPILED}{reason}", flush=True)
