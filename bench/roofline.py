"""What a card can do at most, measured: matrix rates, copies through memory, reads from the L2 cache.

L2 is read in two ways, since tiles do both: every multiprocessor the same bytes (the weights of one tile column), or
every one its own (the rows of different tiles).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cflow_fast.bench.contenders import IN_THREE, device_precisions
from cflow_fast.bench.measurement import clock, matrix_rate
from cflow_fast.kernels.launch import Launch

COPY_BYTES = 1 << 30
SHARED_BYTES = 16 << 20
OWN_BYTES = 64 << 10
"""The second times all programs: both fit each of the two halves of a Hopper card's L2 cache (25 MB), since what lies
in the other half is kept in both, and not the caches before it."""
BLOCK = 4096
SHARED_READS, OWN_READS = 32, 2048
"""Of its region by a program: the time that a launch takes before it begins (20 to 40 us) must not count."""
ROUNDS = 9


@dataclass(frozen=True)
class Roofline:
    """FLOP/s by precision, bytes/s. None: not measured on this device."""

    matrix: dict[str, float]
    copy: float  # read and written bytes together
    l2_shared: float | None
    l2_own: float | None


def measure_roofline(device: torch.device, copy_bytes: int = COPY_BYTES) -> Roofline:
    made_in = [precision for precision in device_precisions(device) if precision not in IN_THREE]
    matrix = {precision: matrix_rate(precision, device) for precision in made_in}
    if device.type != "cuda":
        return Roofline(matrix, copy_rate(device, copy_bytes), None, None)
    return Roofline(matrix, copy_rate(device, copy_bytes), *(l2_rate(device, shared) for shared in (True, False)))


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes/s, read and written, of a copy of `size` bytes: the best of a few."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    seconds_of = clock(device)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(ROUNDS))


def l2_rate(device: torch.device, shared: bool) -> float:
    """Bytes/s that all multiprocessors read from the L2 cache together: the best of a few."""
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    launch = read_launch(device, programs, shared)
    seconds_of = clock(device)
    launch.run()
    return bytes_read(launch) / min(seconds_of(launch.run) for _ in range(ROUNDS))


def read_launch(
    device: torch.device,
    programs: int,
    shared: bool,
    region: int | None = None,
    reads: int | None = None,
    block: int = BLOCK,
) -> Launch:
    """Every program reads a region of `region` bytes `reads` times and leaves the sum."""
    reads = reads or (SHARED_READS if shared else OWN_READS)
    elements = (region or (SHARED_BYTES if shared else OWN_BYTES)) // 4
    x = torch.ones(elements if shared else programs * elements, device=device)
    sums = torch.empty(programs, device=device)
    args = {"x_ptr": x, "sums_ptr": sums, "elements": elements, "reads": reads}
    return Launch(read_kernel, (programs,), args, {"SHARED": shared, "BLOCK": block}, {"num_warps": 8})


def bytes_read(launch: Launch) -> int:
    return launch.grid[0] * 4 * launch.args["elements"] * launch.args["reads"]


@triton.jit
def read_kernel(x_ptr, sums_ptr, elements, reads, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """Programs that share a region start at different places in it, so that they do not ask for one line at once."""
    program = tl.program_id(0)
    first = 0 if SHARED else program * elements
    blocks = elements // BLOCK
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, reads * blocks):
        block = (i + program) % blocks
        total += tl.load(x_ptr + first + block * BLOCK + lane, cache_modifier=".cg")
    tl.store(sums_ptr + program, tl.sum(total, 0))
