"""Phase B, a coupling layer's second product with all that follows it, as one persistent kernel:

    s, t = w2 hidden + b2;   j = alpha tanh(s);   y2 = x2 exp(j) + t;   sum of j per row and tile

A program makes the same columns of s and t, so that neither leaves it. The state is row-major, (N, [passive | active])
with both halves padded, or feature-major, (features, N), read and written by index with the scale and shift that hard
permutations leave pending.

The first block reads the caller's features, unless they were packed, and moves the passive half into the state along
with y2. The last one also leaves the active and passive halves' share of ||u||^2, in which the last permutation plays
no part: sums of (gain x + shift)^2 per row and tile.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cflow_fast.kernels.configs import CouplingConfig
from cflow_fast.kernels.lang import INTERPRET, add_product, operand, power_reciprocal, taken, tanh
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
class Halves:
    """Where a block finds its halves, in the same strides but not always in one tensor."""

    passive: Rows
    active: Rows


@dataclass(frozen=True)
class Target:
    """Where y2 goes, and x1 too when it has to be carried from the caller's features into the state."""

    active: Rows
    passive: Rows | None = None


@dataclass(frozen=True)
class Pending:
    """x2 = gain v + shift: what a hard permutation leaves to be applied on reading."""

    gain: Tensor  # (d,) float32
    shift: Tensor


@dataclass(frozen=True)
class Norm:
    """The last block's share of ||u||^2: sums of (gain x + shift)^2 over y2 and, unless None, over x1."""

    squares: Tensor  # (tiles, padded N) float32
    active_gain: Tensor  # (d,) float32
    active_shift: Tensor
    passive_gain: Tensor | None  # (h,)
    passive_shift: Tensor | None


def coupling_launch(
    hidden: Rows,
    weight: Tensor,
    bias: Tensor,
    source: Halves,
    target: Target | None,
    log_det: Tensor,
    clamp: float,
    config: CouplingConfig,
    precision: str,
    scratch: Scratch,
    multiprocessors: int,
    *,
    pending: Pending | None = None,
    norm: Norm | None = None,
    rounded: bool = True,
    low: Tensor | None = None,
    weight_scale: Tensor | None = None,
    early: bool = False,
) -> Launch:
    """One block's y2 and row sums.

    hidden: m operands a row, in a workspace, one row after another; weight: (2 half, m), rows of s then of t, each
    padded to `half`; bias: (2 half,).
    target: None where nobody needs y2. log_det: (tiles, padded N) float32, the sums of j over a tile's columns.
    rounded: y2 is stored as an operand, otherwise in float32. low, weight_scale, early: see `linear_launch`.
    """
    assert (low is not None) == in_two_parts(precision)
    assert (hidden.scale is None) == (weight_scale is None)
    assert hidden.row_stride == hidden.features
    assert hidden.features % config.block_k == 0, "a last step would run into the next row's inputs"
    takes = how_taken(precision)
    half, rows = weight.shape[0] // 2, source.active.count
    row_tiles, out_tiles = cdiv(rows, config.block_rows), cdiv(half, config.block_out)
    tiles, splits = row_tiles * out_tiles, config.split_k > 1
    sums = 2 * tiles * config.split_k * config.block_rows * config.block_out
    reads, writes, carried = source.active, (target or source).active, target.passive if target else None
    args = {
        "hidden_ptr": hidden.tensor,
        "hidden_low_ptr": hidden.low,
        "hidden_scale_ptr": hidden.scale,
        "w_ptr": weight,
        "w_low_ptr": low,
        "w_scale_ptr": weight_scale,
        "bias_ptr": bias,
        "x1_ptr": source.passive.tensor,
        "x2_ptr": source.active.tensor,
        "y1_ptr": carried.tensor if carried else None,
        "y2_ptr": target.active.tensor if target else None,
        "x1_index_ptr": source.passive.index,
        "x2_index_ptr": source.active.index,
        "y1_index_ptr": carried.index if carried else None,
        "y2_index_ptr": target.active.index if target else None,
        "gain_ptr": pending.gain if pending else None,
        "shift_ptr": pending.shift if pending else None,
        "u1_gain_ptr": norm.passive_gain if norm else None,
        "u1_shift_ptr": norm.passive_shift if norm else None,
        "u2_gain_ptr": norm.active_gain if norm else None,
        "u2_shift_ptr": norm.active_shift if norm else None,
        "log_det_ptr": log_det,
        "squares_ptr": norm.squares if norm else None,
        "partial_ptr": scratch.partials(sums) if splits else None,
        "counter_ptr": scratch.counters(tiles) if splits else None,
        "rows": rows,
        "inputs": hidden.features,
        "half": half,
        "x1_features": source.passive.features,
        "x2_features": source.active.features,
        "y1_features": carried.features if carried else 0,
        "y2_features": target.active.features if target else 0,
        **reads.addresses("x"),
        "y_row_stride": writes.row_stride,
        "y_feature_stride": writes.feature_stride,
        "sums_stride": log_det.stride(0),
        "clamp": clamp,
    }
    constexprs = {
        "OUTER": reads.outer,
        "MAPS": reads.maps is not None,
        "RAGGED": half % config.block_out != 0,
        "ROUNDED": rounded,
        "TAKES": takes,
        "IN_PARTS": adds_in_parts(precision, takes),
        "EARLY": early,
        "PRECISION": precision,
        **config.constexprs(),
    }
    grid = (min(tiles * config.split_k, multiprocessors * config.programs),)
    return Launch(coupling_kernel, grid, args, constexprs, config.options(early))


@triton.jit
def coupling_kernel(
    hidden_ptr,
    hidden_low_ptr,
    hidden_scale_ptr,
    w_ptr,
    w_low_ptr,
    w_scale_ptr,
    bias_ptr,
    x1_ptr,
    x2_ptr,
    y1_ptr,
    y2_ptr,
    x1_index_ptr,
    x2_index_ptr,
    y1_index_ptr,
    y2_index_ptr,
    gain_ptr,
    shift_ptr,
    u1_gain_ptr,
    u1_shift_ptr,
    u2_gain_ptr,
    u2_shift_ptr,
    log_det_ptr,
    squares_ptr,
    partial_ptr,
    counter_ptr,
    rows,
    inputs,
    half,
    x1_features,
    x2_features,
    y1_features,
    y2_features,
    x_row_stride,
    x_feature_stride,
    x_line_stride,
    x_image_stride,
    x_height,
    x_width,
    y_row_stride,
    y_feature_stride,
    sums_stride,
    clamp,
    OUTER: tl.constexpr,
    MAPS: tl.constexpr,
    RAGGED: tl.constexpr,
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
    row_tiles, out_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(half, BLOCK_OUT)
    split_inputs = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLIT_K) * BLOCK_K
    step = tl.arange(0, BLOCK_K)
    wait_for_earlier(EARLY)
    for unit in tl.range(tl.program_id(0), row_tiles * out_tiles * SPLIT_K, tl.num_programs(0)):
        split, row_tile, out_tile = locate(unit, row_tiles, out_tiles, SPLIT_K, GROUP)
        row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        hidden_row = row * inputs
        s_row = tl.minimum(column, half - 1) * inputs

        biased = (column < half) & (split == 0)
        s = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        t = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        s += tl.load(bias_ptr + column, mask=biased, other=0.0)[None, :]
        t += tl.load(bias_ptr + half + column, mask=biased, other=0.0)[None, :]
        scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
        if hidden_scale_ptr is not None:
            scale = tl.load(hidden_scale_ptr + row) * tl.load(w_scale_ptr)
            s *= power_reciprocal(scale)[:, None]
            t *= power_reciprocal(scale)[:, None]
        for start in tl.range(split * split_inputs, tl.minimum((split + 1) * split_inputs, inputs), BLOCK_K):
            k = start + step
            hidden_at = hidden_row[:, None] + k[None, :]
            x = tl.load(hidden_ptr + hidden_at)
            x = (x, tl.load(hidden_low_ptr + hidden_at)) if TAKES == "parts" else taken(x, TAKES, PRECISION)
            offsets = s_row[None, :] + k[:, None]
            s = add_product(s, x, w_ptr, w_low_ptr, offsets, TAKES, IN_PARTS, PRECISION)
            t = add_product(t, x, w_ptr, w_low_ptr, half * inputs + offsets, TAKES, IN_PARTS, PRECISION)

        complete = True
        if SPLIT_K > 1:
            tile = row_tile * out_tiles + out_tile
            slot = 2 * tile * SPLIT_K
            leave_split(s, partial_ptr, slot + split, BLOCK_ROWS, BLOCK_OUT)
            leave_split(t, partial_ptr, slot + SPLIT_K + split, BLOCK_ROWS, BLOCK_OUT)
            complete = arrives_last(counter_ptr, tile, SPLIT_K)
            if complete:
                s = sum_splits(partial_ptr, slot, SPLIT_K, BLOCK_ROWS, BLOCK_OUT)
                t = sum_splits(partial_ptr, slot + SPLIT_K, SPLIT_K, BLOCK_ROWS, BLOCK_OUT)
        if complete:
            if hidden_scale_ptr is not None:
                s *= scale[:, None]
                t *= scale[:, None]
            j = clamp * tanh(s, PRECISION)
            if RAGGED:
                j = tl.where((column < half)[None, :], j, 0.0)
            tl.store(log_det_ptr + out_tile * sums_stride + row, tl.sum(j, 1))

            x_row = row_offsets(row, x_row_stride, x_line_stride, x_image_stride, x_height, x_width, MAPS, OUTER)
            x2 = _load_half(
                x2_ptr,
                x2_index_ptr,
                x_row,
                row < rows,
                column,
                x2_features,
                x_feature_stride,
                gain_ptr,
                shift_ptr,
                OUTER,
            )
            y2 = x2 * _exp(j) + t
            if y2_ptr is not None:
                _store_half(
                    y2,
                    y2_ptr,
                    y2_index_ptr,
                    row * y_row_stride,
                    column,
                    y2_features,
                    y_feature_stride,
                    ROUNDED,
                    PRECISION,
                )
            if squares_ptr is not None:
                squares = _squares(y2, u2_gain_ptr, u2_shift_ptr, column, x2_features)
            if y1_ptr is not None or u1_gain_ptr is not None:
                x1 = _load_half(
                    x1_ptr, x1_index_ptr, x_row, row < rows, column, x1_features, x_feature_stride, None, None, OUTER
                )
                if y1_ptr is not None:
                    _store_half(
                        x1,
                        y1_ptr,
                        y1_index_ptr,
                        row * y_row_stride,
                        column,
                        y1_features,
                        y_feature_stride,
                        ROUNDED,
                        PRECISION,
                    )
                if u1_gain_ptr is not None:
                    squares += _squares(x1, u1_gain_ptr, u1_shift_ptr, column, x1_features)
            if squares_ptr is not None:
                tl.store(squares_ptr + out_tile * sums_stride + row, squares)


@triton.jit
def _exp(x):
    """Of a clamped value, which needs none of the range checks that tl.exp has."""
    if INTERPRET:
        return tl.exp(x)
    else:
        scaled = x * 1.4426950408889634
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [scaled], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _load_half(
    x_ptr, index_ptr, x_row, row_valid, column, features, feature_stride, gain_ptr, shift_ptr, OUTER: tl.constexpr
):
    """A tile of one half in fp32, 0 beyond its features. The state's padded rows may be read, a caller's may not."""
    valid = column < features
    feature = column if index_ptr is None else tl.load(index_ptr + column, mask=valid, other=0)
    mask = valid[None, :] & row_valid[:, None] if OUTER else valid[None, :]
    x = tl.load(x_ptr + x_row[:, None] + feature[None, :] * feature_stride, mask=mask, other=0.0).to(tl.float32)
    if gain_ptr is not None:
        x *= tl.load(gain_ptr + column, mask=valid, other=0.0)[None, :]
        x += tl.load(shift_ptr + column, mask=valid, other=0.0)[None, :]
    return x


@triton.jit
def _store_half(
    y, y_ptr, index_ptr, y_row, column, features, feature_stride, ROUNDED: tl.constexpr, PRECISION: tl.constexpr
):
    valid = column < features
    feature = column if index_ptr is None else tl.load(index_ptr + column, mask=valid, other=0)
    if ROUNDED:
        y = operand(y, PRECISION)
    tl.store(y_ptr + y_row[:, None] + feature[None, :] * feature_stride, y, mask=valid[None, :])


@triton.jit
def _squares(x, gain_ptr, shift_ptr, column, features):
    """Row sums of (gain x + shift)^2 over a tile's columns."""
    valid = column < features
    gain = tl.load(gain_ptr + column, mask=valid, other=0.0)[None, :]
    u = gain * x + tl.load(shift_ptr + column, mask=valid, other=0.0)[None, :]
    return tl.sum(tl.where(valid[None, :], u * u, 0.0), 1)
