"""What the matrix-product kernels share: the tile of a program, where rows lie, how split sums come together; and how
a launch begins before the one that it waits for has ended.

Of few rows a decoder is a chain of launches of a few microseconds each. EARLY: programs begin as soon as there is room
for them and wait where they would read: half a microsecond from one launch to the next instead of one (programmatic
dependent launch, Hopper on). Fetching weights to L2 in the meantime made decoders slower (bench/results).
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cflow_fast.kernels.lang import INTERPRET


@triton.jit
def locate(unit, row_tiles, output_tiles, SPLIT_K: tl.constexpr, GROUP: tl.constexpr):
    """A unit of work as (split, row tile, output tile).

    GROUP row tiles pass all outputs together, so that a weight that came into L2 is used GROUP times; the splits of a
    tile are neighbours and run at the same time.
    """
    tile = unit // SPLIT_K
    group_tiles = GROUP * output_tiles
    first = (tile // group_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = tile % group_tiles
    return unit % SPLIT_K, first + within % size, within // size


@triton.jit
def row_offsets(row, row_stride, line_stride, image_stride, height, width, MAPS: tl.constexpr, LONG: tl.constexpr):
    """Where rows begin: evenly spaced, or position by position through maps of height x width. LONG: in 64 bits."""
    if MAPS:
        line = row // width
        image = (line // height).to(tl.int64)
        return image * image_stride + (line % height).to(tl.int64) * line_stride + (row % width) * row_stride
    elif LONG:
        return row.to(tl.int64) * row_stride
    else:
        return row * row_stride


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """Nothing that a launch before this one writes may be read, and nothing that it reads written, before this."""
    if EARLY and not INTERPRET:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def leave_split(acc, partial_ptr, slot, ROWS: tl.constexpr, OUT: tl.constexpr):
    """Store one split's sum where the tile's last program finds it."""
    element = tl.arange(0, ROWS)[:, None] * OUT + tl.arange(0, OUT)[None, :]
    tl.store(partial_ptr + slot * (ROWS * OUT) + element, acc)


@triton.jit
def arrives_last(counter_ptr, tile, SPLIT_K: tl.constexpr):
    """Whether all other splits of this tile have left their sums; the counter is then 0 again for the next launch."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counter_ptr + tile, 0)
    return last


@triton.jit
def sum_splits(partial_ptr, first_slot, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr):
    """In the order of the splits' numbers, so that a result does not depend on who came last."""
    element = tl.arange(0, ROWS)[:, None] * OUT + tl.arange(0, OUT)[None, :]
    acc = tl.zeros((ROWS, OUT), tl.float32)
    for split in range(SPLIT_K):
        acc += tl.load(partial_ptr + (first_slot + split) * (ROWS * OUT) + element, cache_modifier=".cg")
    return acc
