"""Folded decoders without values: shapes on the meta device, to compile kernels for and to count with."""

from __future__ import annotations

import torch
from torch import Tensor

from cflow_fast.folding import matrix_blocks, mixing_storage
from cflow_fast.kernels.weights import FlowWeights, HardMixing, Mixing, SoftMixing

META = torch.device("meta")


def specimen_weights(
    features: int,
    permute_soft: bool,
    storage: torch.dtype,
    condition: int = 128,
    blocks: int = 8,
    activation: str = "relu",
) -> FlowWeights:
    """What folding a decoder of that size gives, in shapes and dtypes."""
    passive, active = features - features // 2, features // 2
    hidden = 2 * (passive + condition)

    def matrix(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=storage, device=META)

    return FlowWeights(
        activation=activation,
        clamp=1.9,
        log_scale=0.0,
        w1=matrix(blocks, hidden, passive),
        w1_condition=matrix(blocks, hidden, condition) if condition else None,
        b1=_vector(blocks, hidden),
        w2=matrix(blocks, 2 * active, hidden),
        b2=_vector(blocks, 2 * active),
        mixing=_soft(features, blocks, storage) if permute_soft else _hard(features, blocks),
    )


def _soft(features: int, blocks: int, storage: torch.dtype) -> Mixing:
    passive, active = features - features // 2, features // 2
    matrices = matrix_blocks(features, blocks, storage)
    rotations = blocks - matrices

    def matrix(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=mixing_storage(features, storage), device=META)

    return SoftMixing(
        matrix=matrix(matrices, features, features),
        offset=_vector(matrices, features),
        passive=matrix(rotations, passive, passive),
        passive_offset=_vector(rotations, passive),
        active=matrix(rotations, active, active),
        active_offset=_vector(rotations, active),
        output=matrix(rotations, active, active),
        cosine=_vector(rotations, active),
        sine=_vector(rotations, active),
        passive_output=matrix(min(rotations, 1), passive, passive),
    )


def _hard(features: int, blocks: int) -> Mixing:
    passive, active = features - features // 2, features // 2

    def index(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=META)

    return HardMixing(
        passive=index(blocks, passive),
        active=index(blocks, active),
        gain=_vector(blocks, active),
        gain_rest=_vector(blocks, active),
        shift=_vector(blocks, active),
        output_gain=_vector(features),
        output_gain_rest=_vector(features),
        output_shift=_vector(features),
        order=index(features),
    )


def _vector(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=META)
