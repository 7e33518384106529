"""The end of a flow: per row, tiles' sums to log p.

log_det  = log_scale + sum of j
log_prob = log_det - (||u||^2 + D ln 2 pi) / 2
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from cflow_fast.kernels.configs import ReductionConfig
from cflow_fast.kernels.launch import Launch, cdiv, early_option
from cflow_fast.kernels.tiles import wait_for_earlier


def reduction_launch(
    sums: Tensor,
    log_dets: int,
    log_scale: float,
    features: int,
    log_prob: Tensor,
    log_det: Tensor,
    config: ReductionConfig,
    early: bool = False,
) -> Launch:
    """sums: (tiles, padded N), `log_dets` sums of j and then those of u^2; log_prob, log_det: (N,); all float32.

    early: see `tiles`.
    """
    rows = len(log_prob)
    args = {
        "sums_ptr": sums,
        "log_prob_ptr": log_prob,
        "log_det_ptr": log_det,
        "rows": rows,
        "log_dets": log_dets,
        "tiles": len(sums),
        "sums_stride": sums.stride(0),
        "log_scale": log_scale,
        "constant": features * math.log(2 * math.pi),
    }
    constexprs = {"EARLY": early, "BLOCK_TILES": config.block_tiles, "BLOCK_ROWS": config.block_rows}
    options = {"num_warps": config.warps} | early_option(early)
    grid = (cdiv(rows, config.block_rows),)
    return Launch(reduction_kernel, grid, args, constexprs, options)


@triton.jit
def reduction_kernel(
    sums_ptr,
    log_prob_ptr,
    log_det_ptr,
    rows,
    log_dets,
    tiles,
    sums_stride,
    log_scale,
    constant,
    EARLY: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    wait_for_earlier(EARLY)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    step = tl.arange(0, BLOCK_TILES)
    log_det = tl.zeros((BLOCK_TILES, BLOCK_ROWS), tl.float32)
    norm = tl.zeros((BLOCK_TILES, BLOCK_ROWS), tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + step
        valid = (tile < tiles)[:, None] & (row < rows)[None, :]
        share = tl.load(sums_ptr + tile[:, None] * sums_stride + row[None, :], mask=valid, other=0.0)
        is_log_det = (tile < log_dets)[:, None]
        log_det += tl.where(is_log_det, share, 0.0)
        norm += tl.where(is_log_det, 0.0, share)
    total = log_scale + tl.sum(log_det, 0)
    tl.store(log_det_ptr + row, total, mask=row < rows)
    tl.store(log_prob_ptr + row, total - 0.5 * (tl.sum(norm, 0) + constant), mask=row < rows)
