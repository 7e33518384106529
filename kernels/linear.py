"""y = epilogue(x W^T + bias): the products of phases A and C, and those of a rotation, as one persistent kernel.

    "hidden"   y = act(x W^T + bias)
    "offset"   y = x W^T + bias               a permutation's matrix, u, a condition's share of the hidden layer
    "rotate"   w = x W^T + bias;  y = C v - S w;  rotated = S v + C w

The bias is one vector, or the positional tables' rows[r] + columns[q], or what every row has of its own is added to
either. It starts the sums instead of being added to them afterwards; where operands are scaled (`scaling`), divided by
what the sums are then multiplied by.
Outputs of W beyond y's are v, in float32 (x2 of the next block, which no product takes; a rotation's V1 below w1, which
shares x): what is kept of it are the values, the sums of its squares per row and tile, or both. Before v there may be
outputs that are kept as operands (x1 of the next block, where its hidden layer is y).

x is (rows, inputs) as `rows.Rows` describes it. Widths of W and y are padded to multiples of 64 and the rows of
workspaces to whole tiles, so that only a caller's own features need masks in the inner loop; what padded rows hold is
never looked at.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cflow_fast.kernels.configs import LinearConfig
from cflow_fast.kernels.lang import activate, activated_operand, add_product, operand, power_reciprocal, taken
from cflow_fast.kernels.launch import Launch, Scratch, cdiv
from cflow_fast.kernels.operands import adds_in_parts, how_taken, in_two_parts
from cflow_fast.kernels.rows import Rows
from cflow_fast.kernels.tiles import (
    arrives_last,
    leave_split,
    locate,
    row_offsets,
    sum_splits,
    wait_for_earlier,
)


@dataclass(frozen=True)
class Positions:
    """One block's bias by position, rows[r] + columns[q], and what has none."""

    rows: Tensor  # (H, outputs of W) operand precision
    columns: Tensor  # (W, outputs of W)
    everywhere: Tensor | None = None  # (outputs of W,) float32


@dataclass(frozen=True)
class Rotation:
    """The elementwise part of a rotation."""

    v: Tensor  # (N, h) float32
    cosine: Tensor  # (h,) float32, padded with 1
    sine: Tensor  # (h,) float32, padded with 0
    rotated: Tensor  # (N, h) in y's strides: S v + C w
    rotated_low: Tensor | None = None  # the second part of scaled operands


@dataclass(frozen=True)
class Beyond:
    """What is kept of v, the outputs of W beyond y's; at least one of the first two."""

    values: Tensor | None  # (N, outputs) float32
    squares: Tensor | None  # (tiles, padded N) float32: sums over a tile's columns, row by row
    operands: Tensor | None = None  # (N, outputs between y's and v's)


def linear_launch(
    x: Rows,
    weight: Tensor,
    y: Tensor,
    config: LinearConfig,
    precision: str,
    scratch: Scratch,
    multiprocessors: int,
    *,
    bias: Tensor | Positions | None = None,
    added: Tensor | None = None,
    activation: str = "none",
    rotation: Rotation | None = None,
    beyond: Beyond | None = None,
    rounded: bool = True,
    takes: str | None = None,
    low: Tensor | None = None,
    weight_scale: Tensor | None = None,
    y_low: Tensor | None = None,
    y_scale: Tensor | None = None,
    early: bool = False,
) -> Launch:
    """y[:N] = epilogue(x weight^T + bias) for N = x.count rows.

    weight: (outputs, inputs) operands, inputs a multiple of 64; y: (padded N, its outputs), rows evenly spaced.
    bias: float32 (outputs,), or two tables by position. added: (padded N, y's outputs) what every row adds; y itself
    may be it.
    rounded: y is stored as an operand, otherwise as the float32 that it was summed in.
    takes: how x is taken, see `operands.TAKES`; None: as it has to be. low: what rounding left of weight, where factors
    are taken in two parts. weight_scale: () float32, what scaled weights were divided by.
    y_low, y_scale: where y is stored as scaled operands, and what a rotation makes with it, its second part, if it has
    one, and the scale of both (padded N,).
    early: see `tiles`; whatever else is launched between launches of one chain has to be early too, or end before them.
    """
    assert (low is not None) == in_two_parts(precision)
    assert (x.scale is None) == (weight_scale is None)
    takes = takes or how_taken(precision, x)
    assert takes != "parts" or x.low is not None
    (outputs, inputs), y_outputs = weight.shape, y.shape[1]
    assert inputs % config.block_k == 0, "a last step would run into the next row's inputs"
    assert (outputs > y_outputs) == (beyond is not None)
    row_tiles = cdiv(x.count, config.block_rows)
    out_tiles = cdiv(y_outputs, config.block_out) + cdiv(outputs - y_outputs, config.block_out)
    units = row_tiles * out_tiles * config.split_k
    splits = config.split_k > 1
    positions = bias if isinstance(bias, Positions) else None
    values, squares = (beyond.values, beyond.squares) if beyond else (rotation.v if rotation else None, None)
    operands = beyond.operands if beyond else None
    assert operands is None or squares is None, "squares are summed over all that is beyond y"
    args = {
        "x_ptr": x.tensor,
        "x_low_ptr": x.low if takes == "parts" else None,
        "x_scale_ptr": x.scale,
        "index_ptr": x.index,
        "w_ptr": weight,
        "w_low_ptr": low,
        "w_scale_ptr": weight_scale,
        "bias_ptr": bias if isinstance(bias, Tensor) else positions.everywhere if positions else None,
        "lines_ptr": positions.rows if positions else None,
        "columns_ptr": positions.columns if positions else None,
        "cosine_ptr": rotation.cosine if rotation else None,
        "sine_ptr": rotation.sine if rotation else None,
        "added_ptr": added,
        "y_ptr": y,
        "y_low_ptr": y_low,
        "y_scale_ptr": y_scale,
        "rotated_ptr": rotation.rotated if rotation else None,
        "rotated_low_ptr": rotation.rotated_low if rotation else None,
        "v_ptr": values,
        "squares_ptr": squares,
        "operands_ptr": operands,
        "partial_ptr": scratch.partials(units * config.block_rows * config.block_out) if splits else None,
        "counter_ptr": scratch.counters(row_tiles * out_tiles) if splits else None,
        "rows": x.count,
        "inputs": inputs,
        "outputs": outputs,
        "y_outputs": y_outputs,
        "x_features": x.features,
        **x.addresses("x"),
        "added_row_stride": 0 if added is None else added.stride(0),
        "y_row_stride": y.stride(0),
        "v_row_stride": 0 if values is None else values.stride(0),
        "squares_stride": 0 if squares is None else squares.stride(0),
        "operands": 0 if operands is None else operands.shape[1],
        "operands_row_stride": 0 if operands is None else operands.stride(0),
        "table_height": len(positions.rows) if positions else 0,
        "table_width": len(positions.columns) if positions else 0,
    }
    constexprs = {
        "EPILOGUE": "rotate" if rotation else "offset" if activation == "none" else "hidden",
        "HAS_V": beyond is not None,
        "ACTIVATION": activation,
        "LINE": _line(positions, config.block_rows),
        "OUTER": x.outer,
        "MAPS": x.maps is not None,
        "ROUNDED": rounded,
        "TAKES": takes,
        "IN_PARTS": adds_in_parts(precision, takes),
        "EARLY": early,
        "PRECISION": precision,
        **config.constexprs(),
    }
    grid = (min(units, multiprocessors * config.programs),)
    return Launch(linear_kernel, grid, args, constexprs, config.options(early))


def _line(positions: Positions | None, block_rows: int) -> int:
    """How many positions of a line a tile holds as a block, 0 where its lines do not divide it evenly."""
    if positions is None:
        return 0
    width = len(positions.columns)
    return min(width, block_rows) if width & (width - 1) == 0 else 0


@triton.jit
def linear_kernel(
    x_ptr,
    x_low_ptr,
    x_scale_ptr,
    index_ptr,
    w_ptr,
    w_low_ptr,
    w_scale_ptr,
    bias_ptr,
    lines_ptr,
    columns_ptr,
    cosine_ptr,
    sine_ptr,
    added_ptr,
    y_ptr,
    y_low_ptr,
    y_scale_ptr,
    rotated_ptr,
    rotated_low_ptr,
    v_ptr,
    squares_ptr,
    operands_ptr,
    partial_ptr,
    counter_ptr,
    rows,
    inputs,
    outputs,
    y_outputs,
    x_features,
    x_row_stride,
    x_feature_stride,
    x_line_stride,
    x_image_stride,
    x_height,
    x_width,
    added_row_stride,
    y_row_stride,
    v_row_stride,
    squares_stride,
    operands,
    operands_row_stride,
    table_height,
    table_width,
    EPILOGUE: tl.constexpr,
    HAS_V: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINE: tl.constexpr,
    OUTER: tl.constexpr,
    MAPS: tl.constexpr,
    ROUNDED: tl.constexpr,
    TAKES: tl.constexpr,
    IN_PARTS: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles, y_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(y_outputs, BLOCK_OUT)
    out_tiles = y_tiles
    if HAS_V:
        out_tiles += tl.cdiv(outputs - y_outputs, BLOCK_OUT)
    split_inputs = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLIT_K) * BLOCK_K
    step = tl.arange(0, BLOCK_K)
    wait_for_earlier(EARLY)
    for unit in tl.range(tl.program_id(0), row_tiles * out_tiles * SPLIT_K, tl.num_programs(0)):
        split, row_tile, out_tile = locate(unit, row_tiles, out_tiles, SPLIT_K, GROUP)
        first_row = row_tile * BLOCK_ROWS
        first_column, end, is_v = _columns(out_tile, y_tiles, y_outputs, outputs, HAS_V, BLOCK_OUT)
        row, column = first_row + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_OUT)
        x_row = row_offsets(row, x_row_stride, x_line_stride, x_image_stride, x_height, x_width, MAPS, OUTER)
        w_row = tl.minimum(column, outputs - 1) * inputs

        acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        biased = (column < end) & (split == 0)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + column, mask=biased, other=0.0)[None, :]
        if lines_ptr is not None:
            acc = _add_positions(
                acc, first_row, column, biased, outputs, lines_ptr, columns_ptr, table_height, table_width,
                LINE, BLOCK_ROWS, BLOCK_OUT,
            )  # fmt: skip
        if added_ptr is not None:
            added_tile_ptr = added_ptr + row[:, None] * added_row_stride + column[None, :]
            acc += tl.load(added_tile_ptr, mask=(biased & (column < y_outputs))[None, :], other=0.0).to(tl.float32)
        scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
        if x_scale_ptr is not None:
            scale = tl.load(x_scale_ptr + row) * tl.load(w_scale_ptr)
            acc *= power_reciprocal(scale)[:, None]
        for start in tl.range(split * split_inputs, tl.minimum((split + 1) * split_inputs, inputs), BLOCK_K):
            k = start + step
            feature = k if index_ptr is None else tl.load(index_ptr + k)
            x_at = x_row[:, None] + feature[None, :] * x_feature_stride
            if OUTER:
                valid = (row < rows)[:, None] & (k < x_features)[None, :]
                x = tl.load(x_ptr + x_at, mask=valid, other=0.0)
            else:
                x = tl.load(x_ptr + x_at)
            x = (x, tl.load(x_low_ptr + x_at)) if TAKES == "parts" else taken(x, TAKES, PRECISION)
            acc = add_product(acc, x, w_ptr, w_low_ptr, w_row[None, :] + k[:, None], TAKES, IN_PARTS, PRECISION)

        complete = True
        if SPLIT_K > 1:
            tile = row_tile * out_tiles + out_tile
            leave_split(acc, partial_ptr, tile * SPLIT_K + split, BLOCK_ROWS, BLOCK_OUT)
            complete = arrives_last(counter_ptr, tile, SPLIT_K)
            if complete:
                acc = sum_splits(partial_ptr, tile * SPLIT_K, SPLIT_K, BLOCK_ROWS, BLOCK_OUT)
        if complete:
            if x_scale_ptr is not None:
                acc *= scale[:, None]
            if is_v:
                valid, v_column = column < outputs, column - y_outputs
                if operands_ptr is not None:
                    operand_tile_ptr = operands_ptr + row[:, None] * operands_row_stride + v_column[None, :]
                    kept = valid & (v_column < operands)
                    tl.store(operand_tile_ptr, operand(acc, PRECISION), mask=kept[None, :])
                    valid, v_column = valid & (v_column >= operands), v_column - operands
                if v_ptr is not None:
                    v_tile_ptr = v_ptr + row[:, None] * v_row_stride + v_column[None, :]
                    tl.store(v_tile_ptr, acc, mask=valid[None, :])
                if squares_ptr is not None:
                    v = tl.where(valid[None, :], acc, 0.0)
                    tl.store(squares_ptr + (out_tile - y_tiles) * squares_stride + row, tl.sum(v * v, 1))
            else:
                _store_y(
                    acc, row, column, y_outputs, y_ptr, y_low_ptr, y_scale_ptr, y_row_stride, v_ptr, v_row_stride,
                    cosine_ptr, sine_ptr, rotated_ptr, rotated_low_ptr, EPILOGUE, ACTIVATION, ROUNDED, PRECISION,
                )  # fmt: skip


@triton.jit
def _columns(out_tile, y_tiles, y_outputs, outputs, HAS_V: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """A tile's first output, where y or v ends, and whether it is v's."""
    first, end, is_v = out_tile * BLOCK_OUT, y_outputs, False
    if HAS_V:
        is_v = out_tile >= y_tiles
        first += tl.where(is_v, y_outputs - y_tiles * BLOCK_OUT, 0)
        end = tl.where(is_v, outputs, y_outputs)
    return first, end, is_v


@triton.jit
def _add_positions(
    acc, first_row, column, valid, outputs, lines_ptr, columns_ptr, height, width,
    LINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """acc + rows[r] + columns[q]. LINE > 0: a tile is whole lines of so many positions each, or a part of one line.

    Line by line and column by column: an element by element gather costs as many instructions as the product.
    """
    valid, column = valid[None, :], column[None, :]
    if LINE:
        line = (first_row // width + tl.arange(0, BLOCK_ROWS // LINE)) % height
        position = first_row % width + tl.arange(0, LINE)
    else:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        line, position = row // width % height, row % width
    by_line = tl.load(lines_ptr + line[:, None] * outputs + column, mask=valid, other=0.0).to(tl.float32)
    by_column = tl.load(columns_ptr + position[:, None] * outputs + column, mask=valid, other=0.0).to(tl.float32)
    if LINE:
        by_position = tl.reshape(acc, (BLOCK_ROWS // LINE, LINE, BLOCK_OUT))
        by_position += by_line[:, None, :]
        by_position += by_column[None, :, :]
        return tl.reshape(by_position, (BLOCK_ROWS, BLOCK_OUT))
    else:
        return acc + by_line + by_column


@triton.jit
def _store_y(
    acc, row, column, outputs, y_ptr, y_low_ptr, y_scale_ptr, y_row_stride, v_ptr, v_row_stride,
    cosine_ptr, sine_ptr, rotated_ptr, rotated_low_ptr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, ROUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    valid = column < outputs
    at = row[:, None] * y_row_stride + column[None, :]
    if EPILOGUE == "rotate":
        v_at = row[:, None] * v_row_stride + column[None, :]
        v = tl.load(v_ptr + v_at, mask=valid[None, :], other=0.0)
        cosine = tl.load(cosine_ptr + column, mask=valid, other=1.0)[None, :]
        sine = tl.load(sine_ptr + column, mask=valid, other=0.0)[None, :]
        rotated = sine * v + cosine * acc
        if y_scale_ptr is not None:
            rotated *= power_reciprocal(tl.load(y_scale_ptr + row))[:, None]
            _store_scaled(rotated, at, valid, rotated_ptr, rotated_low_ptr, PRECISION)
        else:
            tl.store(rotated_ptr + at, operand(rotated, PRECISION) if ROUNDED else rotated, mask=valid[None, :])
        acc = cosine * v - sine * acc
    if y_scale_ptr is not None:
        if EPILOGUE == "hidden":
            acc = activate(acc, ACTIVATION)
        acc *= power_reciprocal(tl.load(y_scale_ptr + row))[:, None]
        _store_scaled(acc, at, valid, y_ptr, y_low_ptr, PRECISION)
        return
    if EPILOGUE == "hidden":
        y = activated_operand(acc, ACTIVATION, PRECISION)
    else:
        y = operand(acc, PRECISION) if ROUNDED else acc
    tl.store(y_ptr + at, y, mask=valid[None, :])


@triton.jit
def _store_scaled(y, at, valid, y_ptr, y_low_ptr, PRECISION: tl.constexpr):
    large = operand(y, PRECISION)
    tl.store(y_ptr + at, large, mask=valid[None, :])
    if y_low_ptr is not None:
        tl.store(y_low_ptr + at, operand(y - large.to(tl.float32), PRECISION), mask=valid[None, :])
