"""Features laid down as products take them: x1 as operands, x2 as it is.

Products read a factor once per tile of outputs. The caller's features, where they would be rounded each time or lie
feature by feature where a state is row-major, are read here once and written in the state's own strides. And what hard
permutations leave feature by feature is laid down row by row where reading it by index takes longer
(`configs.select_laying`).
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from cflow_fast.kernels.configs import PackingConfig
from cflow_fast.kernels.lang import operand
from cflow_fast.kernels.launch import Launch, cdiv, early_option
from cflow_fast.kernels.rows import Rows
from cflow_fast.kernels.tiles import row_offsets, wait_for_earlier


def packing_launch(
    x1: Rows,
    x2: Rows | None,
    y1: Rows,
    y2: Rows | None,
    config: PackingConfig,
    precision: str,
    rounded: bool,
    early: bool = False,
) -> Launch:
    """x1 to y1, rounded to operands or not, and x2 to y2 where a state keeps one; zeros in what pads y1 and y2.

    x1, x2: halves of the caller's features, in the same strides; or x1 alone, of a state. y1, y2: places in workspaces,
    padded. x1 and y1 by index if they have one. early: see `tiles`.
    """
    row_tiles, tiles1 = cdiv(x1.count, config.block_rows), cdiv(y1.features, config.block_features)
    tiles = tiles1 + (cdiv(y2.features, config.block_features) if y2 else 0)
    args = {
        "x1_ptr": x1.tensor,
        "x2_ptr": x2.tensor if x2 else None,
        "y1_ptr": y1.tensor,
        "y2_ptr": y2.tensor if y2 else None,
        "x1_index_ptr": x1.index,
        "y1_index_ptr": y1.index,
        "rows": x1.count,
        "x1_features": x1.features,
        "x2_features": x2.features if x2 else 0,
        "y1_features": y1.features,
        "y2_features": y2.features if y2 else 0,
        **x1.addresses("x"),
        "y1_row_stride": y1.row_stride,
        "y1_feature_stride": y1.feature_stride,
        "y2_row_stride": y2.row_stride if y2 else 0,
        "y2_feature_stride": y2.feature_stride if y2 else 0,
    }
    constexprs = {
        "MAPS": x1.maps is not None,
        "ROUNDED": rounded,
        "EARLY": early,
        "PRECISION": precision,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_FEATURES": config.block_features,
    }
    options = {"num_warps": config.warps, "enable_fp_fusion": True} | early_option(early)
    return Launch(packing_kernel, (row_tiles, tiles), args, constexprs, options)


@triton.jit
def packing_kernel(
    x1_ptr,
    x2_ptr,
    y1_ptr,
    y2_ptr,
    x1_index_ptr,
    y1_index_ptr,
    rows,
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
    y1_row_stride,
    y1_feature_stride,
    y2_row_stride,
    y2_feature_stride,
    MAPS: tl.constexpr,
    ROUNDED: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    x_row = row_offsets(row, x_row_stride, x_line_stride, x_image_stride, x_height, x_width, MAPS, True)
    wait_for_earlier(EARLY)
    tile, tiles1 = tl.program_id(1), tl.cdiv(y1_features, BLOCK_FEATURES)
    if tile < tiles1:
        column = tile * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
        x1 = _load(x1_ptr, x1_index_ptr, x_row, row < rows, column, x1_features, x_feature_stride)
        valid = column < y1_features
        feature = column if y1_index_ptr is None else tl.load(y1_index_ptr + column, mask=valid, other=0)
        if ROUNDED:
            x1 = operand(x1, PRECISION)
        tl.store(y1_ptr + row[:, None] * y1_row_stride + feature[None, :] * y1_feature_stride, x1, mask=valid[None, :])
    elif y2_ptr is not None:
        column = (tile - tiles1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
        x2 = _load(x2_ptr, None, x_row, row < rows, column, x2_features, x_feature_stride)
        valid = column < y2_features
        tl.store(y2_ptr + row[:, None] * y2_row_stride + column[None, :] * y2_feature_stride, x2, mask=valid[None, :])


@triton.jit
def _load(x_ptr, index_ptr, x_row, row_valid, column, features, feature_stride):
    valid = column < features
    feature = column if index_ptr is None else tl.load(index_ptr + column, mask=valid, other=0)
    mask = row_valid[:, None] & valid[None, :]
    x = tl.load(x_ptr + x_row[:, None] + feature[None, :] * feature_stride, mask=mask, other=0.0)
    return x.to(tl.float32)
