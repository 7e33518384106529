"""What lies between the products of the plain path on a card, fused: a coupling layer's end, and a rotation.

The state is feature-major, (features, N), as `products.MatmulProducts` keeps it: a tile is some features of
consecutive rows. Sums of j leave as one per tile and row, added up in a fixed order by the caller.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cflow_fast.kernels.configs import POINTWISE
from cflow_fast.kernels.lang import operand, tanh
from cflow_fast.kernels.launch import Launch, cdiv


def coupled(s_and_t: Tensor, x2: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """j = clamp tanh(s): y2 = x2 exp(j) + t (d, N) and the sums of j (N,), both float32.

    s_and_t: (2 d, N), rows of s then of t; x2: (d, N); contiguous, float32 or bfloat16.
    """
    active, rows = x2.shape
    y2 = torch.empty(x2.shape, dtype=torch.float32, device=x2.device)
    sums = torch.empty(cdiv(active, POINTWISE.block_features), rows, dtype=torch.float32, device=x2.device)
    if rows:
        coupled_launch(s_and_t, x2, clamp, y2, sums).run()
    return y2, sums.sum(0)


def coupled_launch(s_and_t: Tensor, x2: Tensor, clamp: float, y2: Tensor, sums: Tensor) -> Launch:
    args = {"s_and_t_ptr": s_and_t, "x2_ptr": x2, "y2_ptr": y2, "sums_ptr": sums}
    return _launch(coupled_kernel, args | {"features": len(x2), "rows": x2.shape[1], "clamp": clamp}, s_and_t)


def rotated(v: Tensor, w: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """q' = C v - S w and S v + C w, (d, N) each, in the precision of v and w, contiguous; the angles (d,) float32."""
    q, turned = torch.empty_like(w), torch.empty_like(w)
    if w.shape[1]:
        rotated_launch(v, w, cosine, sine, q, turned).run()
    return q, turned


def rotated_launch(v: Tensor, w: Tensor, cosine: Tensor, sine: Tensor, q: Tensor, turned: Tensor) -> Launch:
    args = {"v_ptr": v, "w_ptr": w, "cosine_ptr": cosine, "sine_ptr": sine, "q_ptr": q, "turned_ptr": turned}
    return _launch(rotated_kernel, args | {"features": len(w), "rows": w.shape[1]}, w)


def _launch(kernel: Any, args: dict[str, Any], operands: Tensor) -> Launch:
    features, rows = args["features"], args["rows"]
    grid = (cdiv(rows, POINTWISE.block_rows), cdiv(features, POINTWISE.block_features))
    tile = {"BLOCK_FEATURES": POINTWISE.block_features, "BLOCK_ROWS": POINTWISE.block_rows}
    precision = "bf16" if operands.dtype == torch.bfloat16 else "ieee"
    return Launch(
        kernel, grid, args, {"PRECISION": precision, **tile}, {"num_warps": POINTWISE.warps, "enable_fp_fusion": True}
    )


@triton.jit
def coupled_kernel(
    s_and_t_ptr,
    x2_ptr,
    y2_ptr,
    sums_ptr,
    features,
    rows,
    clamp,
    PRECISION: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    at, valid, row = _tile(features, rows, BLOCK_FEATURES, BLOCK_ROWS)
    s = tl.load(s_and_t_ptr + at, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(s_and_t_ptr + tl.cast(features, tl.int64) * rows + at, mask=valid, other=0.0).to(tl.float32)
    x2 = tl.load(x2_ptr + at, mask=valid, other=0.0).to(tl.float32)
    j = clamp * tanh(s, PRECISION)
    tl.store(y2_ptr + at, x2 * tl.exp(j) + t, mask=valid)
    tl.store(
        sums_ptr + tl.cast(tl.program_id(1), tl.int64) * rows + row, tl.sum(tl.where(valid, j, 0.0), 0), mask=row < rows
    )


@triton.jit
def rotated_kernel(
    v_ptr,
    w_ptr,
    cosine_ptr,
    sine_ptr,
    q_ptr,
    turned_ptr,
    features,
    rows,
    PRECISION: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    at, valid, _ = _tile(features, rows, BLOCK_FEATURES, BLOCK_ROWS)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    cosine = tl.load(cosine_ptr + feature, mask=feature < features, other=0.0)[:, None]
    sine = tl.load(sine_ptr + feature, mask=feature < features, other=0.0)[:, None]
    v = tl.load(v_ptr + at, mask=valid, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(q_ptr + at, operand(v * cosine - w * sine, PRECISION), mask=valid)
    tl.store(turned_ptr + at, operand(v * sine + w * cosine, PRECISION), mask=valid)


@triton.jit
def _tile(features, rows, BLOCK_FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Offsets of a program's tile in (features, rows), which of them there are, and its rows."""
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = feature.to(tl.int64)[:, None] * rows + row[None, :]
    return at, (feature < features)[:, None] & (row < rows)[None, :], row
