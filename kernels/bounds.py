"""How large what a decoder's products make can be: by this scaled operands are divided (`scaling`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cflow_fast.kernels.weights import FlowWeights, SoftMixing

SOFTPLUS_AT_MOST = 0.7
"""That it is above a ReLU."""
BOUND_MARGIN = 1.01
"""For what rounding adds to sums."""


@dataclass(frozen=True)
class Bounds:
    """How large what products make can be at most, float32:

        |hidden| <= hidden max |x1| + condition max |c| + offset    (K,)
        |v| + |w| <= passive max |x1| + active max |y2| + mixed     (R,) of R rotations
    A positional encoding is between -1 and 1 and part of `positional`, which takes the place of offset.
    Numbers lie 16 bytes apart: of a pointer that is aligned and one that is not Triton makes two kernels.
    """

    hidden: Tensor
    condition: Tensor
    offset: Tensor
    positional: Tensor
    passive: Tensor
    active: Tensor
    mixed: Tensor

    @classmethod
    def of(cls, weights: FlowWeights) -> Bounds:
        mixing = weights.mixing
        nothing = weights.b1.new_zeros(weights.blocks, 1, 1, dtype=torch.float32)
        condition = _largest_sums(nothing if weights.w1_condition is None else weights.w1_condition)
        offset = _largest_sums(weights.b1.unsqueeze(-1)) + SOFTPLUS_AT_MOST
        rotations = (nothing[:0],) * 4
        if isinstance(mixing, SoftMixing):
            offsets = mixing.passive_offset.unsqueeze(-1), mixing.active_offset.unsqueeze(-1)
            rotations = mixing.passive, mixing.active, *offsets
        passive, active, v, w = map(_largest_sums, rotations)
        numbers = _largest_sums(weights.w1), condition, offset, offset + condition, passive, active, v + w
        return cls(*(torch.stack([x] * 4, 1)[:, 0] for x in numbers))


def _largest_sums(matrices: Tensor) -> Tensor:
    """(K, out, in) to (K,): the largest sum of an output's magnitudes, and a little for what rounding adds."""
    return BOUND_MARGIN * matrices.float().abs().sum(-1).amax(-1) if matrices.numel() else matrices.new_zeros(0)
