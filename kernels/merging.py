"""A soft permutation and the next block's first layer as one matrix: for few rows, where launches are what takes time.

x' = P^ [x1; y2] + o^ is linear, and so is w1 x1' + b1 up to its activation. So one product gives

    [w1 P^_1; P^_1; P^_2] [x1; y2]    the hidden layer, x1' and x2'

with two fifths more to multiply than one after the other, two thirds more than with a rotation. But of a block's three
launches, or four, two are left, and their larger tiles together pull less from L2. A rotation is multiplied out, in the
basis that it leaves x1 in. The last block's x1 is left as its V1 would turn it: only ||u||^2, or u, is made of it.

In bf16 that loses on average as much as launches of their own: a product of two rounded matrices is rounded once more,
but x1' no longer on its way to the hidden layer. It is rounded otherwise, though: what one image has alone and among
many differs by as much as either does from float64.

Merged weights stand beside the others, w2 is shared: 10, 35 and 133 MB on 15, 51 and 187 at D = 512, 1024 and 2048.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.phase_weights import Operands, PhaseWeights, is_joined, pad, pad_halves
from cflow_fast.kernels.tuning import select_merging
from cflow_fast.kernels.weights import SoftMixing


class Affine(NamedTuple):
    """matrix x + offset, in float64."""

    matrix: Tensor
    offset: Tensor

    def after(self, first: Affine) -> Affine:
        return Affine(self.matrix @ first.matrix, self.matrix @ first.offset + self.offset)

    def beside(self, other: Affine) -> Affine:
        """Its outputs, then the other's."""
        return Affine(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def outputs(self, start: int, end: int | None = None) -> Affine:
        return Affine(self.matrix[start:end], self.offset[start:end])


def is_merged(prepared: PhaseWeights, rows: int, chip: Chip) -> bool:
    """Whether a call of so many rows takes `merge(prepared)` in its place."""
    if prepared.soft is None or prepared.weights.blocks < 2:
        return False
    return select_merging(rows, prepared.hidden, prepared.half, prepared.precision, chip).in_one


def merge(prepared: PhaseWeights) -> PhaseWeights:
    """The same decoder of soft permutations and at least two blocks, as `state.MergedState` takes it. Not in precisions
    that mix in another way than first layers multiply, or in parts.

    w1: of the first block alone (m, half); of every other one (m + 2 half, 2 half). soft: one matrix and its offset,
    from the last [x1; y2] to u.
    """
    weights, half, hidden = prepared.weights, prepared.half, prepared.hidden
    mixing, passive, last = weights.mixing, weights.passive, weights.blocks - 1
    assert isinstance(mixing, SoftMixing)
    assert last > 0
    assert is_joined(prepared.precision)
    assert prepared.low is None
    assert prepared.scale is None
    operands = Operands(prepared.precision)

    def padded(matrix: Tensor, rows: int) -> Tensor:
        return operands(pad_halves(matrix, passive, half), rows, 2 * half)

    w1, bias = [prepared.w1[0][:hidden]], [prepared.bias[0][:hidden]]
    turned = mixing.matrices <= last
    for block in range(1, weights.blocks):
        mixed = _mixed(mixing, block - 1)
        x1 = mixed.outputs(0, passive)
        first_layer = Affine(weights.w1[block].double(), weights.b1[block].double()).after(x1)
        if block == last and turned:
            x1 = Affine(mixing.passive[-1].double(), mixing.passive_offset[-1].double()).after(x1)
        state = x1.beside(mixed.outputs(passive))
        state_matrix = operands.halves(pad_halves(state.matrix, passive, half), passive, half, 2 * half)
        w1.append(torch.cat([padded(first_layer.matrix, hidden), state_matrix]))
        offsets = pad(first_layer.offset, hidden), pad_halves(state.offset, passive, half)
        bias.append(torch.cat(offsets).float())
    u = _turned_into_u(mixing) if turned else _mixed(mixing, last)
    soft = _one_matrix(
        mixing,
        operands.halves(pad_halves(u.matrix, passive, half), passive, half, 2 * half),
        pad_halves(u.offset, passive, half).float(),
    )
    norm = prepared.norm_passive
    if norm is None:
        norm = torch.ones_like(prepared.norm_active[0]), torch.zeros_like(prepared.norm_active[1])
    return replace(prepared, w1=w1, bias=bias, soft=soft, norm_passive=norm, merged=True)


def _mixed(mixing: SoftMixing, block: int) -> Affine:
    """A block's permutation: [x1; y2] or [q; y2] to the next one's [x1; x2] or [q; x2]."""
    rotation = block - mixing.matrices
    if rotation < 0:
        return Affine(mixing.matrix[block].double(), mixing.offset[block].double())
    v = Affine(mixing.passive[rotation].double(), mixing.passive_offset[rotation].double())
    return _rotated(mixing, rotation, v)


def _turned_into_u(mixing: SoftMixing) -> Affine:
    """The last rotation, of v: [v; y2] to u."""
    offset = torch.zeros_like(mixing.passive_offset[-1], dtype=torch.float64)
    v = Affine(torch.eye(len(offset), dtype=torch.float64, device=offset.device), offset)
    mixed = _rotated(mixing, len(mixing.passive) - 1, v)
    x1 = Affine(mixing.passive_output[0].double(), offset).after(mixed.outputs(0, len(offset)))
    return x1.beside(mixed.outputs(len(offset)))


def _rotated(mixing: SoftMixing, rotation: int, v: Affine) -> Affine:
    """q' = C v - S w beside x2' = U2 (S v + C w), of v as it is made of x1 and w of y2."""
    passive, active = len(v.offset), mixing.active.shape[1]
    cosine, sine = (angle[rotation].double() for angle in (mixing.cosine, mixing.sine))
    by_x1 = Affine(pad(v.matrix, passive, passive + active), v.offset)
    w = Affine(mixing.active[rotation].double(), mixing.active_offset[rotation].double())
    by_y2 = Affine(torch.cat([w.matrix.new_zeros(active, passive), w.matrix], 1), w.offset)
    q = _sum(pad(cosine, passive, value=1.0), by_x1, -pad(sine, passive), _padded(by_y2, passive))
    x2 = _sum(sine, by_x1.outputs(0, active), cosine, by_y2)
    output = Affine(mixing.output[rotation].double(), torch.zeros_like(w.offset))
    return q.beside(output.after(x2))


def _sum(a: Tensor, x: Affine, b: Tensor, y: Affine) -> Affine:
    """diag(a) x + diag(b) y."""
    return Affine(a[:, None] * x.matrix + b[:, None] * y.matrix, a * x.offset + b * y.offset)


def _padded(x: Affine, outputs: int) -> Affine:
    """With an odd D one passive feature has no partner."""
    return Affine(pad(x.matrix, outputs, x.matrix.shape[1]), pad(x.offset, outputs))


def _one_matrix(mixing: SoftMixing, matrix: Tensor, offset: Tensor) -> SoftMixing:
    nothing = {field.name: getattr(mixing, field.name)[:0] for field in fields(mixing)}
    return SoftMixing(**nothing | {"matrix": matrix[None], "offset": offset[None]})
