"""What follows a coupling block of the whole-decoder kernel: the soft permutation, as it is stored."""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from cflow_fast.kernels.whole_flow_halves import mapped, nothing, squares, unpair, vector, zeros


@triton.jit
def soft_mixing(
    block,
    x1,
    y2,
    matrix_ptr,
    offset_ptr,
    rotation_ptr,
    angle_ptr,
    norm,
    BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
):
    """x1 and x2 of the next block in float32, and the norm that u would have after this one.

    The first MATRICES blocks by matrices, the others by rotations. A decoder with one kind has no branch here.
    """
    h: tl.constexpr = MAIN + SIDE
    k = tl.cast(block, tl.int64)
    if MATRICES:
        matrix_ptr += k * (4 * h * h)
        offset_ptr += k * (2 * h)
    if MATRICES < BLOCKS:
        rotation_ptr += (k - MATRICES) * (3 * h * h)
        angle_ptr += (k - MATRICES) * (4 * h)
    if MATRICES == BLOCKS:
        x1, x2 = _matrix_mixing(x1, y2, matrix_ptr, offset_ptr, PRECISION, ROWS, MAIN, SIDE)
        norm = squares(x1, SIDE) + squares(x2, SIDE)
    elif MATRICES == 0:
        x1, x2, norm = _rotation_mixing(x1, y2, rotation_ptr, angle_ptr, PRECISION, ROWS, MAIN, SIDE)
    else:
        x2 = y2
        if block < MATRICES:
            u1, x2 = _matrix_mixing(x1, y2, matrix_ptr, offset_ptr, PRECISION, ROWS, MAIN, SIDE)
        else:
            u1, x2, norm = _rotation_mixing(x1, y2, rotation_ptr, angle_ptr, PRECISION, ROWS, MAIN, SIDE)
        x1 = u1
    return x1, x2, norm


@triton.jit
def _matrix_mixing(
    x1, y2, matrix_ptr, offset_ptr, PRECISION: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr
):
    """x1 and x2 of the next block, in float32."""
    acc = vector(offset_ptr, ROWS, 2 * MAIN, 2 * SIDE)
    acc = mapped(acc, x1, matrix_ptr, PRECISION, MAIN, SIDE, 2)
    acc = mapped(acc, y2, matrix_ptr + 2 * (MAIN + SIDE) * (MAIN + SIDE), PRECISION, MAIN, SIDE, 2)
    return unpair(acc, ROWS, MAIN, SIDE)


@triton.jit
def _rotation_mixing(
    q, y2, rotation_ptr, angle_ptr, PRECISION: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr
):
    """q and x2 of the next block, and ||v||^2 + ||w||^2, which is what their norm would be."""
    h: tl.constexpr = MAIN + SIDE
    v = mapped(vector(angle_ptr, ROWS, MAIN, SIDE), q, rotation_ptr, PRECISION, MAIN, SIDE)
    w = mapped(vector(angle_ptr + h, ROWS, MAIN, SIDE), y2, rotation_ptr + h * h, PRECISION, MAIN, SIDE)
    norm = squares(v, SIDE) + squares(w, SIDE)
    cosine, cosine_side = vector(angle_ptr + 2 * h, ROWS, MAIN, SIDE)
    sine, sine_side = vector(angle_ptr + 3 * h, ROWS, MAIN, SIDE)
    rotated = v[0] * sine + w[0] * cosine
    main = v[0] * cosine - w[0] * sine
    if SIDE:
        rotated_side = v[1] * sine_side + w[1] * cosine_side
        side = v[1] * cosine_side - w[1] * sine_side
    else:
        rotated_side = nothing()
        side = nothing()
    x2 = mapped(zeros(ROWS, MAIN, SIDE), (rotated, rotated_side), rotation_ptr + 2 * h * h, PRECISION, MAIN, SIDE)
    return (main, side), x2, norm
