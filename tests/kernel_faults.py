"""Faults for `test_kernel_faults` to plant into the kernels' sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One passage of a module of `cflow_fast.kernels`, and what is wrong instead."""

    name: str
    module: str
    right: str
    wrong: str
    check: str = "tail"
    """The one of `test_kernel_faults.CHECKS` that has to turn red."""


TAIL = [
    Fault(
        "tail mask dropped from a store",
        "anomaly_tail",
        "(image * height + r) * width + columns, value, mask=inside)",
        "(image * height + r) * width + columns, value)",
    ),
    Fault("strip runs past the last row", "anomaly_tail", "tl.minimum(first + ROWS, height)", "first + ROWS"),
    Fault("strips overlap", "anomaly_tail", "% row_tiles * ROWS", "% row_tiles * (ROWS - 1)"),
    Fault("rows for columns", "anomaly_tail", "(columns, scale.column_step,", "(columns, scale.row_step,"),
    Fault(
        "rows' strides for columns'",
        "anomaly_tail",
        "left.to(tl.int64) * scale.column_stride",
        "left.to(tl.int64) * scale.row_stride",
    ),
    Fault("align_corners off", "anomaly_tail", "(source - 1) / (output - 1) if", "source / output if"),
    Fault("no cap at 1", "anomaly_tail", "p = tl.minimum(p, 1.0)", "p = p + 0.0"),
    Fault(
        "infinities taken for numbers",
        "anomaly_tail",
        'tl.where(tl.abs(log_prob) < float("inf"), p, float("nan"))',
        "p",
    ),
    Fault("infinity taken for a maximum", "anomaly_tail", '& (log_prob < float("inf"))', ""),
    Fault("stale source rows", "anomaly_tail", "if row != above[k]:", "if row > above[k] + 1:"),
    Fault(
        "row below taken for any later one",
        "anomaly_tail",
        "if row != _next(above[k], scale.height, height):",
        "if row < above[k]:",
    ),
    Fault(
        "weights of two rows exchanged",
        "anomaly_tail",
        "tl.fma(upper, 1.0 - weight, tl.fma(lower, weight, total))",
        "tl.fma(lower, 1.0 - weight, tl.fma(upper, weight, total))",
    ),
    Fault(
        "scores of all images in the first one's place",
        "anomaly_tail",
        "highest_ptr += image",
        "highest_ptr += 0 * image",
    ),
    Fault(
        "last positions left out of the maxima",
        "anomaly_tail",
        "tl.int64) * BLOCK, positions,",
        "tl.int64) * BLOCK, positions - BLOCK,",
    ),
    Fault("probability's sign", "anomaly_tail", "tl.exp(log_prob - peak)", "tl.exp(peak - log_prob)"),
]

WHOLE_FLOW = [
    Fault(
        "log-determinant's sign",
        "whole_flow_kernel",
        "(log_det - 0.5 * norm), mask",
        "(-log_det - 0.5 * norm), mask",
        "whole flow, hard",
    ),
    Fault("s and t exchanged", "whole_flow_kernel", "s, t = unpair(acc", "t, s = unpair(acc", "whole flow, hard"),
    Fault(
        "features' mask dropped",
        "whole_flow_halves",
        "mask = inside[:, None] & (place < COUNT)[None, :]",
        "mask = inside[:, None] | (place < COUNT)[None, :]",
        "whole flow, hard",
    ),
    Fault(
        "rows' mask dropped from the result",
        "whole_flow_kernel",
        "(log_det - 0.5 * norm), mask=inside)",
        "(log_det - 0.5 * norm))",
        "whole flow, hard",
    ),
    Fault(
        "column for row in the tables",
        "whole_flow_kernel",
        "block_tables_ptr + line[:, None] * HIDDEN",
        "block_tables_ptr + column[:, None] * HIDDEN",
        "whole flow, hard",
    ),
    Fault(
        "last hidden units dropped",
        "whole_flow_kernel",
        "tl.range(0, HIDDEN, BLOCK_HIDDEN,",
        "tl.range(0, HIDDEN - BLOCK_HIDDEN, BLOCK_HIDDEN,",
        "whole flow, hard",
    ),
    Fault(
        "pending scale forgotten",
        "whole_flow_kernel",
        "scaled(x2, pending_ptr, ROWS, MAIN, SIDE)",
        "x2",
        "whole flow, hard",
    ),
    Fault(
        "y2 written over x1",
        "whole_flow_kernel",
        "write(slot, found, BLOCK_ROWS, everywhere, y2",
        "write(slot, found - h, BLOCK_ROWS, everywhere, y2",
        "whole flow, hard",
    ),
    Fault(
        "rotation's sine with the wrong sign",
        "whole_flow_mixing",
        "main = v[0] * cosine - w[0] * sine",
        "main = v[0] * cosine + w[0] * sine",
        "whole flow, soft",
    ),
]

PHASES = [
    Fault(
        "packed features' tail mask dropped",
        "packing",
        "mask = row_valid[:, None] & valid[None, :]",
        "mask = row_valid[:, None] & (column >= 0)[None, :]",
        "phases, soft",
    ),
    Fault(
        "packed rows' tail mask dropped",
        "packing",
        "mask = row_valid[:, None] & valid[None, :]",
        "mask = (row_valid | True)[:, None] & valid[None, :]",
        "phases, soft",
    ),
    Fault(
        "one packed half for the other",
        "packing",
        "_load(x2_ptr, None, x_row",
        "_load(x1_ptr, None, x_row",
        "phases, soft",
    ),
    Fault(
        "stale first tile",
        "linear",
        "locate(unit, row_tiles, out_tiles",
        "locate(tl.program_id(0), row_tiles, out_tiles",
        "phases, hard",
    ),
    Fault(
        "stale first tile",
        "coupling",
        "locate(unit, row_tiles, out_tiles",
        "locate(tl.program_id(0), row_tiles, out_tiles",
        "phases, soft",
    ),
    Fault(
        "features' tail mask dropped", "linear", "& (k < x_features)[None, :]", "& (k >= 0)[None, :]", "phases, hard"
    ),
    Fault(
        "rows' tail mask dropped",
        "linear",
        "valid = (row < rows)[:, None] &",
        "valid = (row >= 0)[:, None] &",
        "phases, hard",
    ),
    Fault(
        "last inputs dropped",
        "linear",
        "tl.minimum((split + 1) * split_inputs, inputs), BLOCK_K)",
        "tl.minimum((split + 1) * split_inputs, inputs) - BLOCK_K, BLOCK_K)",
        "phases, hard",
    ),
    Fault(
        "bias added by every split",
        "linear",
        "biased = (column < end) & (split == 0)",
        "biased = column < end",
        "phases, hard",
    ),
    Fault(
        "row and column tables swapped",
        "linear",
        "columns_ptr + position[:, None]",
        "lines_ptr + position[:, None]",
        "phases, hard",
    ),
    Fault(
        "rotation's sine with the wrong sign",
        "linear",
        "acc = cosine * v - sine * acc",
        "acc = cosine * v + sine * acc",
        "phases, soft",
    ),
    Fault(
        "one split forgotten",
        "tiles",
        "for split in range(SPLIT_K):",
        "for split in range(SPLIT_K - 1):",
        "phases, hard",
    ),
    Fault(
        "first arriver taken for the last",
        "tiles",
        'sem="acq_rel") == SPLIT_K - 1',
        'sem="acq_rel") == 0',
        "phases, hard",
    ),
    Fault(
        "s and t exchanged",
        "coupling",
        "j = clamp * tanh(s, PRECISION)",
        "j = clamp * tanh(t, PRECISION)",
        "phases, hard",
    ),
    Fault("log-determinant's sign", "coupling", "+ row, tl.sum(j, 1))", "+ row, -tl.sum(j, 1))", "phases, hard"),
    Fault(
        "pending shift forgotten",
        "coupling",
        "x += tl.load(shift_ptr + column",
        "x += 0 * tl.load(shift_ptr + column",
        "phases, hard",
    ),
    Fault(
        "norm's sign", "reduction", "total - 0.5 * (tl.sum(norm, 0)", "total + 0.5 * (tl.sum(norm, 0)", "phases, hard"
    ),
]

PARTS = [
    Fault(
        "what rounding left of a factor forgotten",
        "lang",
        "part = dot(small, w, part, PRECISION)",
        "part = part + 0.0",
        "phases, soft, tf32x3",
    ),
    Fault(
        "what rounding left of weights forgotten",
        "lang",
        "part = dot(large, tl.load(w_low_ptr + offsets), part, PRECISION)",
        "part = part + 0.0",
        "phases, soft, tf32x3",
    ),
    Fault(
        "parts replace the sum", "lang", "        return acc + part\n", "        return part\n", "phases, soft, tf32x3"
    ),
    Fault(
        "one part of a rotation read in the other's place",
        "state",
        "rotated, v = self._active(self.other), self._passive(self.values)",
        "rotated, v = self._active(self.other), self._active(self.values)",
        "phases, soft",
    ),
]

MERGED = [
    Fault(
        "x1 kept where x2 is",
        "linear",
        "valid, v_column = valid & (v_column >= operands), v_column - operands",
        "valid = valid & (v_column >= operands)",
        "phases, merged",
    ),
    Fault(
        "x1 kept beyond its half",
        "linear",
        "kept = valid & (v_column < operands)",
        "kept = valid & (v_column <= operands)",
        "phases, merged",
    ),
    Fault(
        "hidden layer made of x1 before it was mixed",
        "merging",
        "weights.b1[block].double()).after(x1)",
        "weights.b1[block].double()).after(Affine(torch.eye(*x1.matrix.shape, dtype=torch.float64), x1.offset))",
        "phases, merged",
    ),
    Fault(
        "rotation's sine with the wrong sign",
        "merging",
        "by_x1, -pad(sine, passive)",
        "by_x1, pad(sine, passive)",
        "phases, merged",
    ),
    Fault(
        "offset of the merged hidden layer forgotten",
        "merging",
        "self.matrix @ first.offset + self.offset",
        "0 * (self.matrix @ first.offset) + self.offset",
        "phases, merged",
    ),
    Fault(
        "offset of a matrix forgotten",
        "merging",
        "mixing.offset[block].double()",
        "0 * mixing.offset[block].double()",
        "phases, merged matrices",
    ),
    Fault(
        "a matrix instead of the next one",
        "merging",
        "mixed = _mixed(mixing, block - 1)",
        "mixed = _mixed(mixing, 0)",
        "phases, merged matrices",
    ),
    Fault(
        "last x1 left as it is",
        "merging",
        "if block == last and turned:",
        "if block == 0 and turned:",
        "phases, merged",
    ),
    Fault(
        "state read from the buffer that it goes to",
        "state",
        "return self._rows(self.other) if block else",
        "return self._rows(self.state) if block else",
        "phases, merged",
    ),
]

SCALED = [
    Fault(
        "a row not divided by its scale",
        "scaling",
        "    x *= power_reciprocal(scale)[:, None]\n",
        "    x *= 0.5\n",
        "phases, hard, fp16x3",
    ),
    Fault(
        "what rounding left of a row forgotten",
        "scaling",
        "(x - large.to(tl.float32)).to(tl.float16)",
        "(0.0 * x).to(tl.float16)",
        "phases, soft, fp16x3",
    ),
    Fault(
        "the largest number of a row mistaken",
        "scaling",
        "scale = _scale(tl.max(tl.abs(x), 1))",
        "scale = _scale(tl.min(tl.abs(x), 1))",
        "phases, hard, fp16x3",
    ),
    Fault(
        "bound on the hidden layer far too small",
        "scaling",
        "bound = _reach(hidden_gain_ptr, scale) + tl.load(hidden_offset_ptr)",
        "bound = 1e-4 * scale + 1e-4 * tl.load(hidden_offset_ptr)",
        "phases, hard, fp16x3",
    ),
    Fault(
        "bound on a rotation far too small",
        "scaling",
        "scale = _scale(tl.minimum(bound, LARGEST))\n",
        "scale = _scale(1e-4 * bound)\n",
        "phases, soft, fp16x3",
    ),
    Fault(
        "bias not divided by a row's scale",
        "linear",
        "            acc *= power_reciprocal(scale)[:, None]\n",
        "            acc *= 1.0\n",
        "phases, hard, fp16x3",
    ),
    Fault(
        "sums not multiplied by a row's scale",
        "coupling",
        "                s *= scale[:, None]\n",
        "                s *= 1.0\n",
        "phases, hard, fp16x3",
    ),
    Fault(
        "what a rotation leaves not divided by its scale",
        "linear",
        "            rotated *= power_reciprocal(tl.load(y_scale_ptr + row))[:, None]\n",
        "            rotated *= 1.0\n",
        "phases, soft, fp16x3",
    ),
    Fault(
        "second part of a hidden layer forgotten",
        "linear",
        "operand(y - large.to(tl.float32), PRECISION)",
        "operand(0.0 * y, PRECISION)",
        "phases, hard, fp16x3",
    ),
    Fault(
        "a rotation's new scale taken for the old one",
        "state",
        "self.q, self.turned = replace(self.q, scale=scale), replace(self.turned, scale=scale)",
        "self.turned = replace(self.turned, scale=scale)",
        "phases, soft, fp16x3",
    ),
]

FAULTS = [*TAIL, *WHOLE_FLOW, *PHASES, *PARTS, *MERGED, *SCALED]
