"""Half of a decoder's features as a pair of tiles, (main, side): what the whole-decoder kernel works with.

A tile's width is a power of two; 80 features are 64 + 16. With SIDE = 0 the second tile is a placeholder that nobody
reads. Everything here is on (ROWS, MAIN) and (ROWS, SIDE) and inlined into the kernel.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from cflow_fast.kernels.lang import dot, operand


@triton.jit
def nothing():
    return tl.zeros((1, 1), tl.float32)


@triton.jit
def zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr):
    main = tl.zeros((ROWS, MAIN), tl.float32)
    side = tl.zeros((ROWS, SIDE), tl.float32) if SIDE else nothing()
    return main, side


@triton.jit
def kept(half, PRECISION: tl.constexpr, SIDE: tl.constexpr):
    """A half that products take, as it lies in registers: bf16 beside bf16 operands, else float32 and not rounded."""
    main, side = half
    if PRECISION == "bf16":
        main = operand(main, PRECISION)
        if SIDE:
            side = operand(side, PRECISION)
    return main, side


@triton.jit
def operands(half, PRECISION: tl.constexpr, SIDE: tl.constexpr):
    main, side = half
    main = operand(main, PRECISION)
    if SIDE:
        side = operand(side, PRECISION)
    return main, side


@triton.jit
def _row_vector(ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.broadcast_to(tl.load(ptr + tl.arange(0, WIDTH))[None, :], (ROWS, WIDTH))


@triton.jit
def vector(ptr, ROWS: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr):
    """A vector over the places of a half, the same for every row."""
    main = _row_vector(ptr, ROWS, MAIN)
    side = _row_vector(ptr + MAIN, ROWS, SIDE) if SIDE else nothing()
    return main, side


@triton.jit
def squares(half, SIDE: tl.constexpr):
    main, side = half
    total = tl.sum(main * main, 1)
    if SIDE:
        total += tl.sum(side * side, 1)
    return total


@triton.jit
def product(
    acc, half, rest, w_ptr, output, PRECISION: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr, SPLIT: tl.constexpr
):
    """acc + half w^T for some outputs, or SPLIT (half + rest) w^T; w (outputs, h)."""
    row = output[None, :] * (MAIN + SIDE)
    w = tl.load(w_ptr + row + tl.arange(0, MAIN)[:, None])
    if SPLIT:
        acc = dot(rest[0], w, acc, PRECISION)
    acc = dot(half[0], w, acc, PRECISION)
    if SIDE:
        w = tl.load(w_ptr + row + (MAIN + tl.arange(0, SIDE))[:, None])
        if SPLIT:
            acc = dot(rest[1], w, acc, PRECISION)
        acc = dot(half[1], w, acc, PRECISION)
    return acc


@triton.jit
def _rest(half, large, PRECISION: tl.constexpr, SIDE: tl.constexpr):
    """What rounding to tf32 left, as another operand."""
    main = operand(half[0] - large[0], PRECISION)
    side = operand(half[1] - large[1], PRECISION) if SIDE else nothing()
    return main, side


@triton.jit
def mapped(acc, half, w_ptr, PRECISION: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr, HALVES: tl.constexpr = 1):
    """acc + half w^T; w (HALVES h, h). In tf32 half is taken as two operands: nothing else keeps its digits."""
    SPLIT: tl.constexpr = PRECISION == "tf32"
    large = operands(half, PRECISION, SIDE)
    rest = _rest(half, large, PRECISION, SIDE) if SPLIT else large
    main, side = acc
    main = product(main, large, rest, w_ptr, tl.arange(0, HALVES * MAIN), PRECISION, MAIN, SIDE, SPLIT)
    if SIDE:
        output = HALVES * MAIN + tl.arange(0, HALVES * SIDE)
        side = product(side, large, rest, w_ptr, output, PRECISION, MAIN, SIDE, SPLIT)
    return main, side


@triton.jit
def _features(index_ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Places FIRST, FIRST + 1, ... of a half, and where each is found: by index or, without one, in that order."""
    place = FIRST + tl.arange(0, WIDTH)
    if index_ptr is None:
        return place, place.to(tl.int64)
    else:
        return place, tl.load(index_ptr + place).to(tl.int64)


@triton.jit
def _read_tile(base, index_ptr, stride, inside, COUNT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    place, feature = _features(index_ptr, FIRST, WIDTH)
    mask = inside[:, None] & (place < COUNT)[None, :]
    return tl.load(base[:, None] + feature[None, :] * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def read(base, index_ptr, stride, inside, COUNT: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr):
    """A half of COUNT features, in float32; the places beyond them are 0."""
    main = _read_tile(base, index_ptr, stride, inside, COUNT, 0, MAIN)
    side = _read_tile(base, index_ptr, stride, inside, COUNT, MAIN, SIDE) if SIDE else nothing()
    return main, side


@triton.jit
def _write_tile(base, index_ptr, stride, inside, x, COUNT: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    place, feature = _features(index_ptr, FIRST, WIDTH)
    tl.store(base[:, None] + feature[None, :] * stride, x, mask=inside[:, None] & (place < COUNT)[None, :])


@triton.jit
def write(base, index_ptr, stride, inside, half, COUNT: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr):
    main, side = half
    _write_tile(base, index_ptr, stride, inside, main, COUNT, 0, MAIN)
    if SIDE:
        _write_tile(base, index_ptr, stride, inside, side, COUNT, MAIN, SIDE)


@triton.jit
def scaled(half, vector_ptr, ROWS: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr):
    """gain x + shift; vector_ptr: gain (h), then shift (h)."""
    gain, gain_side = vector(vector_ptr, ROWS, MAIN, SIDE)
    shift, shift_side = vector(vector_ptr + MAIN + SIDE, ROWS, MAIN, SIDE)
    main, side = half
    main = main * gain + shift
    if SIDE:
        side = side * gain_side + shift_side
    return main, side


@triton.jit
def _unpair_tile(acc, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """See whole_flow_weights.paired: the two halves lie so that a thread of a matrix instruction owns both."""
    acc = tl.reshape(acc, (ROWS, WIDTH // 8, 2, 4, 2))
    return tl.split(tl.reshape(tl.permute(acc, (0, 1, 3, 2, 4)), (ROWS, WIDTH, 2)))


@triton.jit
def unpair(acc, ROWS: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr):
    """Two halves out of one product that made both."""
    main, side = acc
    first, second = _unpair_tile(main, ROWS, MAIN)
    if SIDE:
        first_side, second_side = _unpair_tile(side, ROWS, SIDE)
    else:
        first_side, second_side = nothing(), nothing()
    return (first, first_side), (second, second_side)
