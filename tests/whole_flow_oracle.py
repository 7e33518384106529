"""What the whole-decoder kernel rounds, said a second time: float64 everywhere else."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.weights import FlowWeights, HardMixing, SoftMixing
from cflow_fast.kernels.whole_flow_weights import as_operand


def oracle_rows(weights: FlowWeights, z: Tensor, c: Tensor, precision: str, positional: bool) -> FlowResult:
    """log p and log_det of rows z (N, D) under c (N, C).

    Operands are rounded before every product, those of a tf32 decoder's mixing to two; nothing else is but the
    positional tables, one by one.
    """

    def operand(x: Tensor) -> Tensor:
        return as_operand(x, precision).double()

    assert weights.w1_condition is not None
    h, half = weights.passive, weights.condition // 2

    def mixed(x: Tensor) -> Tensor:
        return operand(x) + operand(x - operand(x)) if precision == "tf32" else operand(x)

    x1, x2 = z[:, :h], z[:, h:]
    state = torch.cat([x1, x2], 1)
    log_det = torch.full((len(z),), weights.log_scale, dtype=torch.float64)
    norm = torch.zeros(len(z), dtype=torch.float64)
    for block in range(weights.blocks):
        mixing = weights.mixing
        if isinstance(mixing, HardMixing) and block:
            x1 = state[:, mixing.passive[block]]
            x2 = state[:, mixing.active[block]] * mixing.gain[block] + mixing.shift[block]
        w1c = weights.w1_condition[block].double()
        if positional:
            columns = operand((c[:, :half] @ w1c[:, :half].T + weights.b1[block]).float())
            bias = columns + operand((c[:, half:] @ w1c[:, half:].T).float())
        else:
            bias = operand(c) @ operand(w1c).T + weights.b1[block]
        hidden = operand(x1) @ operand(weights.w1[block]).T + bias
        hidden = F.relu(hidden) if weights.activation == "relu" else F.softplus(hidden)
        s, t = (operand(hidden) @ operand(weights.w2[block]).T + weights.b2[block]).chunk(2, 1)
        j = weights.clamp * s.tanh()
        log_det = log_det + j.sum(1)
        y2 = x2 * j.exp() + t
        if isinstance(mixing, HardMixing):
            state = state.index_copy(1, mixing.active[block].long(), y2)
        else:
            x1, x2, norm = _soft(mixing, block, x1, y2, operand, mixed)
    if isinstance(weights.mixing, HardMixing):
        norm = (state * weights.mixing.output_gain + weights.mixing.output_shift).square().sum(1)
    return FlowResult(log_det - 0.5 * (norm + weights.features * math.log(2 * math.pi)), log_det, None)


def _soft(soft: SoftMixing, block: int, x1: Tensor, y2: Tensor, operand, mixed) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    h, rotation = x1.shape[1], block - soft.matrices
    if rotation < 0:
        x = mixed(torch.cat([x1, y2], 1)) @ operand(soft.matrix[block]).T + soft.offset[block]
        return x[:, :h], x[:, h:], x.square().sum(1)
    v = mixed(x1) @ operand(soft.passive[rotation]).T + soft.passive_offset[rotation]
    w = mixed(y2) @ operand(soft.active[rotation]).T + soft.active_offset[rotation]
    d = w.shape[1]
    cosine, sine = soft.cosine[rotation], soft.sine[rotation]
    q = torch.cat([cosine * v[:, :d] - sine * w, v[:, d:]], 1)
    x2 = mixed(sine * v[:, :d] + cosine * w) @ operand(soft.output[rotation]).T
    return q, x2, v.square().sum(1) + w.square().sum(1)
