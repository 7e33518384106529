"""Compile kernels before they are timed, on all cores; run small ones for a memory checker.

    python -m cflow_fast.bench.warm SHARE OF     compile every OF-th headline launch, from the SHARE-th on
    python -m cflow_fast.bench.warm --small      run small decoders of every kind once

Every process asks Triton itself for the binary, by the launch it will make, and Triton keeps it on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from cflow_fast.bench.aot import compile_key
from cflow_fast.bench.headline import headlines
from cflow_fast.decoder import FlowDecoder
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch

MOST_PROCESSES = 16


def compile_on_all_cores(seconds: float) -> str:
    """What was compiled, in words. Processes that are not done by then are stopped: the rest is compiled in use."""
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    commands = [[sys.executable, "-m", "cflow_fast.bench.warm", str(i), str(count)] for i in range(count)]
    ends = time.monotonic() + seconds
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    kernels, stopped, wrong = 0, 0, []
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(1.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            stopped += 1
            continue
        last = output.strip().splitlines()[-1] if output.strip() else "no output"
        if process.returncode:
            wrong.append(last)
        else:
            kernels += int(last)
    words = f"{kernels} kernels in {count} processes"
    words += f"; {stopped} processes did not finish in {seconds:.0f} s" if stopped else ""
    return f"failed: {wrong[0]} ({len(wrong)} processes)" if wrong else words


def compile_share(share: int, of: int) -> int:
    chip = Chip.of(torch.device("cuda", 0))
    seen, done = set(), 0
    for line in headlines():
        for launch in line.launches(chip):
            key = compile_key(launch, 10 * chip.capability[0] + chip.capability[1])
            if key in seen:
                continue
            seen.add(key)
            if len(seen) % of == share:
                _compile(launch)
                done += 1
    return done


def _compile(launch: Launch) -> None:
    """As the launch would, with dtypes in the place of tensors."""
    arguments: list[Any] = [launch.args[name] for name in launch.kernel.arg_names if name in launch.args]
    dtypes = [value.dtype if isinstance(value, Tensor) else value for value in arguments]
    launch.kernel.warmup(*dtypes, grid=launch.grid, **launch.constexprs, **launch.options)


def run_small() -> None:
    """Every kind of decoder on maps that end inside a tile."""
    for features in (41, 64, 160, 320):
        for permute_soft in (False, True):
            decoder = FlowDecoder(features, coupling_blocks=2, permute_soft=permute_soft).cuda()
            for precision in ("fp32", "tf32", "bf16"):
                folded = decoder.fold(precision)
                for batch, side in ((1, 7), (2, 16)):
                    folded.log_prob(torch.randn(batch, features, side, side + 1, device="cuda"))
                folded(torch.randn(5, features, device="cuda"), [torch.randn(5, 128, device="cuda")])
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["--small"]:
        run_small()
    else:
        print(compile_share(int(sys.argv[1]), int(sys.argv[2])))
