"""A product's factor as operands of 16 bits: every row divided by a power of two of its own.

fp16 has the eleven digits of tf32 in half the bytes and is multiplied at twice its rate, but its numbers end at 65,504,
which a trained decoder's state passes in defects, and below 2^-14 it loses digits. Divided so that its largest number
lies between 2^14 and 2^15, a row keeps the digits of whatever is more than 2^-29 of that; dividing loses none. With
"fp16x3" what rounding left is a second operand, and both together have twenty-two digits.

A power of two is taken out of a sum as exactly as it went in: `y = scale (x' W'^T) weight_scale`. A hidden layer is
written as operands by the product that makes it, before its largest number is known: by a bound on it, of which fp16
can spare a few powers of two.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cflow_fast.kernels.configs import ScalingConfig
from cflow_fast.kernels.lang import power_reciprocal
from cflow_fast.kernels.launch import Launch, cdiv, early_option
from cflow_fast.kernels.rows import Rows
from cflow_fast.kernels.tiles import row_offsets, wait_for_earlier

LARGEST = tl.constexpr(3e38)
"""As much as a bound is: what does not fit float32 makes infinities of its own."""


@dataclass(frozen=True)
class Bound:
    """Of what a product makes of a factor x, row by row: |y| <= gain max |x| + other_gain max |other| + offset.

    scale: (padded N,) float32, where the power of two goes that y is divided by. The numbers are () float32.
    other: what else there is, as scaled operands.
    """

    scale: Tensor
    gain: Tensor
    offset: Tensor
    other: Rows | None = None
    other_gain: Tensor | None = None


class Factors:
    """Memory for factors of a chunk of rows, most of them one after another in the same place."""

    def __init__(self, count: int, padded_rows: int, width: int, in_two: bool, device: torch.device) -> None:
        """in_two: whether any of them is taken as two operands."""
        self.count, self.padded_rows, self.device = count, padded_rows, device
        self._parts = self._memory(width), self._memory(width if in_two else 0)
        self._scale = self.scales()
        self.hidden_scale, self.condition_scale = self.scales(), self.scales()

    def place(self, width: int, in_two: bool, scale: Tensor | None = None) -> Rows:
        """The common one. scale: where another scale is kept than that of the last factor here."""
        return self._rows(self._parts, width, in_two, self._scale if scale is None else scale)

    def own_place(self, width: int, in_two: bool) -> Rows:
        return self._rows((self._memory(width), self._memory(width if in_two else 0)), width, in_two, self.scales())

    def scales(self) -> Tensor:
        return torch.empty(self.padded_rows, dtype=torch.float32, device=self.device)

    def _memory(self, width: int) -> Tensor:
        return torch.empty(self.padded_rows * width, dtype=torch.float16, device=self.device)

    def _rows(self, parts: tuple[Tensor, Tensor], width: int, in_two: bool, scale: Tensor) -> Rows:
        shape = self.padded_rows, width
        large, low = (part[: self.padded_rows * width].view(shape) if part.numel() else None for part in parts)
        assert large is not None
        assert low is not None or not in_two
        return Rows(large, self.count, width, width, 1, low=low if in_two else None, scale=scale)


def scaling_launch(
    x: Rows,
    y: Rows,
    config: ScalingConfig,
    *,
    mixed: Bound | None = None,
    hidden: Bound | None = None,
    early: bool = False,
) -> Launch:
    """y = x / scale in fp16, zeros in what pads it; and its scale, of which it is made.

    y: row-major in a workspace, with a scale, and with a second part or without.
    mixed: of what a rotation makes of y and of `other`, whose largest number is measured here.
    hidden: of the hidden layer made of that, or of y where nothing is mixed; `other` is a condition.
    early: see `tiles`.
    """
    assert y.scale is not None
    other = mixed.other if mixed else None
    condition = hidden.other if hidden else None
    assert other is None or other.row_stride == y.row_stride == y.features
    args = {
        "x_ptr": x.tensor,
        "index_ptr": x.index,
        "large_ptr": y.tensor,
        "small_ptr": y.low,
        "scale_ptr": y.scale,
        "mixed_ptr": mixed.scale if mixed else None,
        "gain_ptr": mixed.gain if mixed else None,
        "offset_ptr": mixed.offset if mixed else None,
        "other_ptr": other.tensor if other else None,
        "other_scale_ptr": other.scale if other else None,
        "other_gain_ptr": mixed.other_gain if mixed else None,
        "hidden_ptr": hidden.scale if hidden else None,
        "hidden_gain_ptr": hidden.gain if hidden else None,
        "hidden_offset_ptr": hidden.offset if hidden else None,
        "condition_scale_ptr": condition.scale if condition else None,
        "condition_gain_ptr": hidden.other_gain if hidden else None,
        "rows": x.count,
        "x_features": x.features,
        "y_features": y.features,
        **x.addresses("x"),
    }
    constexprs = {
        "MAPS": x.maps is not None,
        "AT_ONCE": y.features <= config.block_features,
        "EARLY": early,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_FEATURES": config.block_features,
    }
    options = {"num_warps": config.warps, "enable_fp_fusion": True} | early_option(early)
    return Launch(scaling_kernel, (cdiv(x.count, config.block_rows),), args, constexprs, options)


@triton.jit
def scaling_kernel(
    x_ptr,
    index_ptr,
    large_ptr,
    small_ptr,
    scale_ptr,
    mixed_ptr,
    gain_ptr,
    offset_ptr,
    other_ptr,
    other_scale_ptr,
    other_gain_ptr,
    hidden_ptr,
    hidden_gain_ptr,
    hidden_offset_ptr,
    condition_scale_ptr,
    condition_gain_ptr,
    rows,
    x_features,
    y_features,
    x_row_stride,
    x_feature_stride,
    x_line_stride,
    x_image_stride,
    x_height,
    x_width,
    MAPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    x_row = row_offsets(row, x_row_stride, x_line_stride, x_image_stride, x_height, x_width, MAPS, True)
    y_row = row * y_features
    step = tl.arange(0, BLOCK_FEATURES)
    wait_for_earlier(EARLY)
    if AT_ONCE:
        x = _load(x_ptr, index_ptr, x_row, row < rows, step, x_features, x_feature_stride)
        scale = _scale(tl.max(tl.abs(x), 1))
        _store(x, scale, large_ptr, small_ptr, y_row, step, y_features)
    else:
        largest = tl.zeros((BLOCK_ROWS,), tl.float32)
        for start in range(0, x_features, BLOCK_FEATURES):
            x = _load(x_ptr, index_ptr, x_row, row < rows, start + step, x_features, x_feature_stride)
            largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        scale = _scale(largest)
        for start in range(0, y_features, BLOCK_FEATURES):
            x = _load(x_ptr, index_ptr, x_row, row < rows, start + step, x_features, x_feature_stride)
            _store(x, scale, large_ptr, small_ptr, y_row, start + step, y_features)
    tl.store(scale_ptr + row, scale)
    if mixed_ptr is not None:
        largest = tl.zeros((BLOCK_ROWS,), tl.float32)
        for start in range(0, y_features, BLOCK_FEATURES):
            other = _load(other_ptr, None, y_row, row < rows, start + step, y_features, 1)
            largest = tl.maximum(largest, tl.max(tl.abs(other), 1))
        bound = _reach(gain_ptr, scale) + tl.load(offset_ptr)
        bound += tl.load(other_gain_ptr) * tl.load(other_scale_ptr + row) * largest
        scale = _scale(tl.minimum(bound, LARGEST))
        tl.store(mixed_ptr + row, scale)
    if hidden_ptr is not None:
        bound = _reach(hidden_gain_ptr, scale) + tl.load(hidden_offset_ptr)
        if condition_scale_ptr is not None:
            bound += _reach(condition_gain_ptr, tl.load(condition_scale_ptr + row))
        tl.store(hidden_ptr + row, _scale(tl.minimum(bound, LARGEST)))


@triton.jit
def _reach(gain_ptr, scale):
    """What is made of a row with that scale is at most; infinite beyond float32."""
    return tl.load(gain_ptr) * scale * 32768.0


@triton.jit
def _load(x_ptr, index_ptr, x_row, row_valid, column, features, feature_stride):
    valid = column < features
    feature = column if index_ptr is None else tl.load(index_ptr + column, mask=valid, other=0)
    mask = row_valid[:, None] & valid[None, :]
    x = tl.load(x_ptr + x_row[:, None] + feature[None, :] * feature_stride, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _scale(largest):
    """The power of two by which a row of such a largest number comes to lie under 2^15; 1 where it is not finite.

    None under 2^-74: what is that small is as good as 0, and a scale times that of usual weights is no subnormal.
    """
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where(exponent == 255, 127, tl.maximum(exponent, 67) - 14)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store(x, scale, large_ptr, small_ptr, y_row, column, y_features):
    x *= power_reciprocal(scale)[:, None]
    at, valid = y_row[:, None] + column[None, :], (column < y_features)[None, :]
    large = x.to(tl.float16)
    tl.store(large_ptr + at, large, mask=valid)
    if small_ptr is not None:
        tl.store(small_ptr + at, (x - large.to(tl.float32)).to(tl.float16), mask=valid)
