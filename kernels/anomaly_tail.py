"""The anomaly map and the image score from per-scale log-likelihoods: the Triton twin of `anomaly_map`.

p_k   = exp(l_k - m_k), at most 1 when the maxima are given; NaN where l_k is not finite
total = sum over k of p_k, (B, H_k, W_k) upsampled to (B, H, W), bilinear, corners aligned
map   = M - total                      score = its largest finite value, NaN where there is none

A program walks down a strip of the map, ROWS by COLUMNS. For every scale it holds the two source rows that it is
between, interpolated along the columns already, and fetches one when it passes it: an output pixel costs one more
interpolation per scale, an exponential is made once for all the rows that share it, and nothing but the map is
written. A score is an atomic maximum on the bits of floats that are never negative, whose order is that of integers:
the same in whatever order the programs come. Its buffer starts at -1, which is a NaN's bits and less than them all.

With the maxima given this is one launch. Without, two more: one before it, for each scale's maximum, and one after it
for M, which is the maximum of what it wrote.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import TailConfig
from cflow_fast.kernels.launch import Launch, cdiv
from cflow_fast.kernels.tuning import select_tail

NOTHING_FINITE = -1
"""Where a maximum on bits starts; read as a float it is NaN."""


class Scale(NamedTuple):
    """One map of log-likelihoods, as the kernel takes it. A step is in source positions per output pixel."""

    log_prob_ptr: Any  # (B, height, width) float32, any strides
    height: Any
    width: Any
    batch_stride: Any
    row_stride: Any
    column_stride: Any
    row_step: Any
    column_step: Any
    maximum: Any  # m_k, where it is given


def anomaly_map(
    log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """[(B, H_k, W_k), ...] in float32, any strides, to the map (B, H, W) and the score (B,): see the plain twin."""
    for scale, log_prob in enumerate(log_probs):
        if log_prob.dtype != torch.float32:
            raise TypeError(f"the anomaly map's kernel takes float32, scale {scale} is {log_prob.dtype}")
    batch, device = len(log_probs[0]), log_probs[0].device
    result = torch.empty(batch, *size, dtype=torch.float32, device=device)
    bits = torch.full((batch + 1,), NOTHING_FINITE, dtype=torch.int32, device=device)  # scores, then M where not given
    score, highest = bits[:batch], bits[batch:]
    if not batch:
        return result, score.view(torch.float32)
    with torch.cuda.device_of(result):  # Triton launches on the current device
        config = select_tail(len(log_probs), batch, *size, Chip.of(device))
        if maxima is not None:
            plan_tail(log_probs, maxima, None, result, score, config).run()
        else:
            peaks = torch.empty(len(log_probs), config.peak_programs, dtype=torch.float32, device=device)
            plan_peaks(log_probs, peaks, config).run()
            plan_tail(log_probs, None, peaks, result, highest, config).run()
            plan_finish(result, highest, score, config).run()
    return result, score.view(torch.float32)


def plan_tail(
    log_probs: Sequence[Tensor],
    maxima: Sequence[float] | None,
    peaks: Tensor | None,
    result: Tensor,
    highest_bits: Tensor,
    config: TailConfig,
) -> Launch:
    """The one launch with `maxima` given; without, `result` gets the total and `highest_bits` one maximum for all."""
    batch, height, width = result.shape
    args = {
        "scales": _scales(log_probs, (height, width), maxima),
        "peaks_ptr": peaks,
        "result_ptr": result,
        "highest_ptr": highest_bits,
        "height": height,
        "width": width,
    }
    constexprs = {
        "HAS_MAXIMA": maxima is not None,
        "PEAKS": config.peak_programs,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
    }
    programs = batch * cdiv(height, config.rows) * cdiv(width, config.columns)
    return Launch(tail_kernel, (programs,), args, constexprs, _options(config.warps))


def plan_peaks(log_probs: Sequence[Tensor], peaks: Tensor, config: TailConfig) -> Launch:
    """Each scale's finite maximum as one partial maximum for every program, (K, programs); -inf where it found none."""
    args = {"scales": _scales(log_probs, (1, 1), None), "peaks_ptr": peaks, "batch": len(log_probs[0])}
    constexprs = {"PEAKS": config.peak_programs, "BLOCK": config.block}
    return Launch(peaks_kernel, (config.peak_programs,), args, constexprs, _options(config.block_warps))


def plan_finish(result: Tensor, highest_bits: Tensor, score_bits: Tensor, config: TailConfig) -> Launch:
    batch, height, width = result.shape
    args = {
        "result_ptr": result,
        "highest_ptr": highest_bits,
        "score_ptr": score_bits,
        "pixels": height * width,
    }
    programs = batch * cdiv(height * width, config.block)
    return Launch(finish_kernel, (programs,), args, {"BLOCK": config.block}, _options(config.block_warps))


@triton.jit
def tail_kernel(
    scales,
    peaks_ptr,
    result_ptr,
    highest_ptr,
    height,
    width,
    HAS_MAXIMA: tl.constexpr,
    PEAKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    column_tiles, row_tiles = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    image = (tile // (column_tiles * row_tiles)).to(tl.int64)
    first = tile // column_tiles % row_tiles * ROWS
    columns = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width

    peaks, above, uppers, lowers = (), (), (), ()
    for k in tl.static_range(len(scales)):
        scale = scales[k]
        peak = scale.maximum if HAS_MAXIMA else tl.max(tl.load(peaks_ptr + k * PEAKS + tl.arange(0, PEAKS)), axis=0)
        row, _ = _neighbour(first, scale.row_step, scale.height)
        peaks += (peak,)
        above += (row,)
        uppers += (_source_row(scale, peak, image, row, columns, width, HAS_MAXIMA),)
        lowers += (_source_row(scale, peak, image, _next(row, scale.height, height), columns, width, HAS_MAXIMA),)

    highest = tl.full((COLUMNS,), -1.0, tl.float32)  # no map value is negative
    for r in range(first, tl.minimum(first + ROWS, height)):
        total = tl.zeros((COLUMNS,), tl.float32)
        new_above, new_uppers, new_lowers = (), (), ()
        for k in tl.static_range(len(scales)):
            scale, peak = scales[k], peaks[k]
            row, weight = _neighbour(r, scale.row_step, scale.height)
            upper, lower = uppers[k], lowers[k]
            if row != above[k]:
                upper = lower
                if row != _next(above[k], scale.height, height):
                    upper = _source_row(scale, peak, image, row, columns, width, HAS_MAXIMA)
                below = _next(row, scale.height, height)
                lower = _source_row(scale, peak, image, below, columns, width, HAS_MAXIMA)
            total = tl.fma(upper, 1.0 - weight, tl.fma(lower, weight, total))
            new_above += (row,)
            new_uppers += (upper,)
            new_lowers += (lower,)
        above, uppers, lowers = new_above, new_uppers, new_lowers
        value = total
        if HAS_MAXIMA:
            value = len(scales) - total
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)  # weights may round to more than 1
        highest = tl.maximum(highest, value)  # NaN is passed over
        tl.store(result_ptr + (image * height + r) * width + columns, value, mask=inside)
    if HAS_MAXIMA:
        highest_ptr += image
    tl.atomic_max(highest_ptr, tl.max(highest, axis=0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def peaks_kernel(scales, peaks_ptr, batch, PEAKS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    for k in tl.static_range(len(scales)):
        scale = scales[k]
        positions = tl.cast(batch, tl.int64) * scale.height * scale.width
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(program.to(tl.int64) * BLOCK, positions, PEAKS * BLOCK):
            position = start + tl.arange(0, BLOCK)
            line = position // scale.width
            offsets = line // scale.height * scale.batch_stride + line % scale.height * scale.row_stride
            offsets += position % scale.width * scale.column_stride
            log_prob = tl.load(scale.log_prob_ptr + offsets, mask=position < positions, other=float("-inf"))
            highest = tl.where((log_prob > highest) & (log_prob < float("inf")), log_prob, highest)
        tl.store(peaks_ptr + k * PEAKS + program, tl.max(highest, axis=0))


@triton.jit
def finish_kernel(result_ptr, highest_ptr, score_ptr, pixels, BLOCK: tl.constexpr):
    blocks = tl.cdiv(pixels, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    highest = tl.load(highest_ptr).to(tl.float32, bitcast=True)
    value = highest - tl.load(result_ptr + image * pixels + pixel, mask=inside, other=float("nan"))
    tl.store(result_ptr + image * pixels + pixel, value, mask=inside)
    score = tl.max(tl.where(value >= 0.0, value, -1.0), axis=0)
    tl.atomic_max(score_ptr + image, score.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _neighbour(output, step, size):
    """The source position before an output position, and the weight of the one after it; the edge beyond the edge."""
    position = tl.cast(output, tl.float32) * step  # an interpreted loop counts in plain numbers
    before = tl.minimum(position.to(tl.int32), size - 1)
    return before, tl.minimum(position - before, 1.0)


@triton.jit
def _next(position, size, output_size):
    """The one after it: itself at the end, and where the sizes are equal and nothing is interpolated."""
    return tl.where((position < size - 1) & (size != output_size), position + 1, position)


@triton.jit
def _source_row(scale, peak, image, row, columns, width, CAPPED: tl.constexpr):
    """The probabilities of a source row, interpolated at output columns."""
    left, weight = _neighbour(columns, scale.column_step, scale.width)
    right = _next(left, scale.width, width)
    row_ptr = scale.log_prob_ptr + image * scale.batch_stride + row.to(tl.int64) * scale.row_stride
    before = tl.load(row_ptr + left.to(tl.int64) * scale.column_stride)
    after = tl.load(row_ptr + right.to(tl.int64) * scale.column_stride)
    return _probability(before, peak, CAPPED) * (1.0 - weight) + _probability(after, peak, CAPPED) * weight


@triton.jit
def _probability(log_prob, peak, CAPPED: tl.constexpr):
    p = tl.exp(log_prob - peak)
    if CAPPED:
        p = tl.minimum(p, 1.0)
    return tl.where(tl.abs(log_prob) < float("inf"), p, float("nan"))


def _scales(log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float] | None) -> tuple[Scale, ...]:
    return tuple(
        Scale(
            log_prob,
            height=log_prob.shape[1],
            width=log_prob.shape[2],
            batch_stride=log_prob.stride(0),
            row_stride=log_prob.stride(1),
            column_stride=log_prob.stride(2),
            row_step=_step(log_prob.shape[1], size[0]),
            column_step=_step(log_prob.shape[2], size[1]),
            maximum=0.0 if maxima is None else float(maxima[k]),
        )
        for k, log_prob in enumerate(log_probs)
    )


def _step(source: int, output: int) -> float:
    return (source - 1) / (output - 1) if output > 1 else 0.0


def _options(warps: int) -> dict[str, Any]:
    """Multiplication and addition are not fused, so that interpolation weights are the twin's."""
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
