"""All blocks of a folded decoder for one tile of rows, its state in registers from the features to log p.

Per block, with weights as `whole_flow_weights` pads them and halves of h = MAIN + SIDE places:

    hidden = act(w1 x1 + bias)      in chunks of BLOCK_HIDDEN, never stored: each goes straight into s and t
    s, t   = w2 hidden + b2
    j      = clamp tanh(s);   y2 = x2 exp(j) + t;   log_det += sum(j)         x2 in float32: no product takes it
    mixing   a matrix:    x1, x2 = offset + the four quarters of P [x1; y2]
             a rotation:  v = passive x1 + .., w = active y2 + ..; x1 = C v - S w, x2 = output (S v + C w)
             hard:        y2 goes back to where it was read from in a feature-major scratch of the tile's own;
                          the next block reads its features by index, x2 when s and t are there

bias is b1; or w1_condition c + b1; or the positional tables' rows[r] + columns[q]. A tile touches few of the tables'
entries, so these are one more product: a selection (BLOCK_ROWS x ENTRIES) of zeros and ones, two of them ones in each
row, times the entries. That costs the matrix units 16 or 32 steps beside w1's h, and no other instruction. In fp32
without matrix units the tables start the accumulator instead, element by element.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from cflow_fast.kernels.lang import activated_operand, dot, exp2, operand, tanh
from cflow_fast.kernels.whole_flow_halves import (
    kept,
    mapped,
    nothing,
    operands,
    product,
    read,
    scaled,
    squares,
    unpair,
    vector,
    write,
    zeros,
)
from cflow_fast.kernels.whole_flow_mixing import soft_mixing


@triton.jit
def whole_flow_kernel(
    features_ptr,  # element (image, feature, line, column) by the four strides
    condition_ptr,  # (rows, CHANNELS) operands, when CONDITION is "rows"
    tables_ptr,  # (BLOCKS, height + width, HIDDEN), when CONDITION is "tables"
    w1_ptr,
    w1_condition_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    matrix_ptr,
    offset_ptr,
    rotation_ptr,
    angle_ptr,
    passive_output_ptr,
    index_ptr,
    pending_ptr,
    final_ptr,
    place_ptr,
    scratch_ptr,  # (programs, PASSIVE + ACTIVE, BLOCK_ROWS) float32, when HARD
    log_prob_ptr,  # (images, height, width)
    log_det_ptr,  # the same or None
    u_ptr,  # (images, height, width, PASSIVE + ACTIVE) or None
    images,
    height,
    width,
    image_stride,
    feature_stride,
    line_stride,
    column_stride,
    clamp,
    log_scale,
    log_normaliser,  # log_scale - D/2 ln 2 pi
    BLOCKS: tl.constexpr,
    MATRICES: tl.constexpr,
    HARD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CONDITION: tl.constexpr,
    CHANNELS: tl.constexpr,
    PASSIVE: tl.constexpr,
    ACTIVE: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    h: tl.constexpr = MAIN + SIDE
    program = tl.program_id(0)
    image, line, column, inside, touched_line, touched_column, first_line, first_column = _positions(
        program, images, height, width, IMAGES, LINES, COLUMNS, BLOCK_ROWS
    )
    row_number = (image.to(tl.int64) * height + line) * width + column
    base = features_ptr + image.to(tl.int64) * image_stride
    base += line.to(tl.int64) * line_stride + column.to(tl.int64) * column_stride
    passive = read(base, None, feature_stride, inside, PASSIVE, MAIN, SIDE)
    base += PASSIVE * tl.cast(feature_stride, tl.int64)
    if HARD:
        everywhere = tl.full((BLOCK_ROWS,), True, tl.int1)
        slot = scratch_ptr + program.to(tl.int64) * ((PASSIVE + ACTIVE) * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)
        write(slot, None, BLOCK_ROWS, everywhere, passive, PASSIVE, MAIN, SIDE)
    else:
        x1 = kept(passive, PRECISION, SIDE)
        x2 = read(base, None, feature_stride, inside, ACTIVE, MAIN, SIDE)
    if ENTRIES:
        entry = tl.arange(0, ENTRIES)
        chosen = entry[None, :] == touched_line[:, None]
        chosen |= entry[None, :] == LINES + touched_column[:, None]
        selection = operand(tl.where(chosen, 1.0, 0.0), PRECISION)
        is_line = entry < LINES
        entry_column = first_column + entry - LINES
        known = is_line | (entry_column < width)
        entry = tl.where(is_line, (first_line + entry) % height, height + entry_column)
    log_det = tl.zeros((BLOCK_ROWS,), tl.float32)
    norm = tl.zeros((BLOCK_ROWS,), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=1):
        k = tl.cast(block, tl.int64)
        if HARD:
            found = index_ptr + k * (2 * h)
            tl.debug_barrier()  # what other threads of this program wrote at the end of the block before
            own = operands(read(slot, found, BLOCK_ROWS, everywhere, PASSIVE, MAIN, SIDE), PRECISION, SIDE)
        else:
            own = operands(x1, PRECISION, SIDE)
        acc = vector(b2_ptr + k * (2 * h), BLOCK_ROWS, 2 * MAIN, 2 * SIDE)
        w1_block_ptr = w1_ptr + k * (HIDDEN * h)
        w2_block_ptr = w2_ptr + k * (2 * h * HIDDEN)
        if CONDITION == "tables":
            block_tables_ptr = tables_ptr + k * (height + width) * HIDDEN
        for first in tl.range(0, HIDDEN, BLOCK_HIDDEN, num_stages=STAGES):
            unit = first + tl.arange(0, BLOCK_HIDDEN)
            if ENTRIES:
                offsets = entry[:, None] * HIDDEN + unit[None, :]
                entries = tl.load(block_tables_ptr + offsets, mask=known[:, None], other=0.0)
                hidden = dot(selection, entries, tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32), PRECISION)
            elif CONDITION == "tables":
                hidden = tl.load(block_tables_ptr + line[:, None] * HIDDEN + unit[None, :])
                offsets = (height + column)[:, None] * HIDDEN + unit[None, :]
                hidden += tl.load(block_tables_ptr + offsets, mask=inside[:, None], other=0.0)
            else:
                hidden = tl.broadcast_to(tl.load(b1_ptr + k * HIDDEN + unit)[None, :], (BLOCK_ROWS, BLOCK_HIDDEN))
            if CONDITION == "rows":
                own_ptr = condition_ptr + row_number * CHANNELS
                for first_channel in tl.static_range(0, CHANNELS, BLOCK_CHANNELS):
                    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
                    c = tl.load(own_ptr[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
                    matrix_ptrs = w1_condition_ptr + (k * HIDDEN + unit)[None, :] * CHANNELS + channel[:, None]
                    hidden = dot(c, tl.load(matrix_ptrs), hidden, PRECISION)
            hidden = product(hidden, own, own, w1_block_ptr, unit, PRECISION, MAIN, SIDE, False)
            hidden = activated_operand(hidden, ACTIVATION, PRECISION)
            acc = _second_layer(acc, hidden, w2_block_ptr, unit, HIDDEN, PRECISION, MAIN, SIDE)
        s, t = unpair(acc, BLOCK_ROWS, MAIN, SIDE)
        if HARD:
            found += h
            active = _active_half(
                block, base, feature_stride, inside, slot, found, pending_ptr + k * (2 * h), BLOCK_ROWS, ACTIVE,
                MAIN, SIDE,
            )  # fmt: skip
        else:
            active = x2
        y2, j = _affine(active, s, t, clamp, PRECISION, SIDE)
        log_det += j
        if HARD:
            norm = squares(scaled(y2, final_ptr + 2 * h, BLOCK_ROWS, MAIN, SIDE), SIDE)  # the last block's counts
            tl.debug_barrier()  # all have read what is overwritten now
            write(slot, found, BLOCK_ROWS, everywhere, y2, ACTIVE, MAIN, SIDE)
        else:
            x1, x2, norm = soft_mixing(
                block,
                x1,
                y2,
                matrix_ptr,
                offset_ptr,
                rotation_ptr,
                angle_ptr,
                norm,
                BLOCKS,
                MATRICES,
                PRECISION,
                BLOCK_ROWS,
                MAIN,
                SIDE,
            )
            x1 = kept(x1, PRECISION, SIDE)
    if HARD:
        found = index_ptr + (BLOCKS - 1) * (2 * h)
        tl.debug_barrier()
        x1 = scaled(read(slot, found, BLOCK_ROWS, everywhere, PASSIVE, MAIN, SIDE), final_ptr, BLOCK_ROWS, MAIN, SIDE)
        norm += squares(x1, SIDE)
    tl.store(log_prob_ptr + row_number, log_normaliser + (log_det - 0.5 * norm), mask=inside)
    if log_det_ptr is not None:
        tl.store(log_det_ptr + row_number, log_scale + log_det, mask=inside)
    if u_ptr is not None:
        if HARD:
            x2 = read(slot, found + h, BLOCK_ROWS, everywhere, ACTIVE, MAIN, SIDE)
            x2 = scaled(x2, final_ptr + 2 * h, BLOCK_ROWS, MAIN, SIDE)
        elif MATRICES < BLOCKS:
            x1 = mapped(zeros(BLOCK_ROWS, MAIN, SIDE), x1, passive_output_ptr, PRECISION, MAIN, SIDE)
        own_u_ptr = u_ptr + row_number * (PASSIVE + ACTIVE)
        write(own_u_ptr, place_ptr, 1, inside, x1, PASSIVE, MAIN, SIDE)
        write(own_u_ptr, place_ptr + h, 1, inside, x2, ACTIVE, MAIN, SIDE)


@triton.jit
def _positions(
    program,
    images,
    height,
    width,
    IMAGES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Image, line and column of a tile's rows, whether they exist, and the tile's first line and column.

    A tile is a patch of LINES x COLUMNS positions in IMAGES images, or (COLUMNS = 0) the next ROWS positions in the
    order of the output; its lines are then counted through the batch.
    """
    local = tl.arange(0, ROWS)
    if COLUMNS:
        across = tl.cdiv(width, COLUMNS)
        patches = tl.cdiv(height, LINES) * across
        patch = program % patches
        first_line, first_column = patch // across * LINES, patch % across * COLUMNS
        image = program // patches * IMAGES + local // (LINES * COLUMNS)
        line, column = first_line + local // COLUMNS % LINES, first_column + local % COLUMNS
        inside = (image < images) & (line < height) & (column < width)
        touched_line = line - first_line
    else:
        row = program * ROWS + local
        first_line, first_column = program * ROWS // width, 0
        image, column = row // width // height, row % width
        line = row // width % height
        inside = image < images
        touched_line = row // width - first_line
    return image, line, column, inside, touched_line, column - first_column, first_line, first_column


@triton.jit
def _active_half(
    block,
    base,
    feature_stride,
    inside,
    slot,
    index_ptr,
    pending_ptr,
    ROWS: tl.constexpr,
    ACTIVE: tl.constexpr,
    MAIN: tl.constexpr,
    SIDE: tl.constexpr,
):
    """x2 of a hard permutation, where it lies; the first block's are features.

    It waits for s and t in memory: registers have no room for it beside them.
    """
    if block > 0:
        everywhere = tl.full((ROWS,), True, tl.int1)
        x2 = read(slot, index_ptr, ROWS, everywhere, ACTIVE, MAIN, SIDE)
        x2 = scaled(x2, pending_ptr, ROWS, MAIN, SIDE)
    else:
        x2 = read(base, None, feature_stride, inside, ACTIVE, MAIN, SIDE)
    return x2


@triton.jit
def _second_layer(
    acc, hidden, w2_ptr, unit, HIDDEN: tl.constexpr, PRECISION: tl.constexpr, MAIN: tl.constexpr, SIDE: tl.constexpr
):
    """acc + the share of some hidden units in the pairs of s and t; w2 (2 h, HIDDEN)."""
    main, side = acc
    w2_ptr += unit[:, None]
    main = dot(hidden, tl.load(w2_ptr + tl.arange(0, 2 * MAIN)[None, :] * HIDDEN), main, PRECISION)
    if SIDE:
        side = dot(hidden, tl.load(w2_ptr + (2 * MAIN + tl.arange(0, 2 * SIDE))[None, :] * HIDDEN), side, PRECISION)
    return main, side


@triton.jit
def _affine(x, s, t, clamp, PRECISION: tl.constexpr, SIDE: tl.constexpr):
    """y2 = x exp(j) + t and the row sums of j = clamp tanh(s)."""
    exponent = clamp * 1.4426950408889634  # log2 e
    bent = tanh(s[0], PRECISION)
    total = tl.sum(bent, 1)
    main = x[0] * exp2(bent * exponent) + t[0]
    if SIDE:
        bent = tanh(s[1], PRECISION)
        total += tl.sum(bent, 1)
        side = x[1] * exp2(bent * exponent) + t[1]
    else:
        side = nothing()
    return (main, side), clamp * total
