"""What models weigh and what they compute, by formula: FrEIA need not be installed to be counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from cflow_fast.decoder import FlowDecoder
from cflow_fast.encoders import Encoder

FLOAT = 4  # bytes
MEGABYTE = 10**6
"""The paper's sizes are in units of 10^6 bytes."""

HEADS = ("conv_head.", "norm_head.")
"""Modules behind the last feature map that timm keeps with the classifier removed; torchvision's encoders, and so the
paper's sizes, do not have them."""


def reference_floats(features: int, condition: int = 128, blocks: int = 8) -> int:
    """Numbers that FrEIA stores for one decoder as cflow-ad builds it.

    Per block, with n = D - D//2 + C inputs of the subnet: its two layers (2n, n) and (2(D//2), 2n) with their biases,
    a scale and an offset per feature, and w_perm and w_perm_inv, two D x D matrices, hard permutations or soft.
    """
    active = features // 2
    inputs = features - active + condition
    subnet = 2 * inputs * (inputs + 1) + 2 * active * (2 * inputs + 1)
    return blocks * (subnet + 2 * features + 2 * features**2)


def reference_bytes(channels: Sequence[int], condition: int = 128, blocks: int = 8) -> int:
    """Of FrEIA's decoders of all scales in float32."""
    return FLOAT * sum(reference_floats(features, condition, blocks) for features in channels)


def decoder_bytes(channels: Sequence[int], permute_soft: bool, condition: int = 128, blocks: int = 8) -> int:
    """Of this package's decoders of all scales in float32, as a model file holds them."""
    total = 0
    for features in channels:
        with torch.device("meta"):
            state = FlowDecoder(features, condition, blocks).state_dict()
        total += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if permute_soft:  # a rotation in place of an index, counted here because drawing it takes long
            total += blocks * (FLOAT * features**2 - 8 * features)
    return total


def encoder_bytes(name: str) -> int:
    """Of a timm encoder without its classifier, in float32, batch norms' statistics among them."""
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    return sum(t.numel() * t.element_size() for key, t in state.items() if not key.startswith(HEADS))


def decoder_flop(channels: Sequence[int], positions: Sequence[int], condition: int = 128, blocks: int = 8) -> float:
    """Of the reference's decoders for one image: the subnets' and permutations' products, with the condition."""
    total = 0.0
    for features, count in zip(channels, positions, strict=True):
        active = features // 2
        inputs = features - active + condition
        total += 2.0 * count * blocks * (2 * inputs**2 + 4 * inputs * active + features**2)
    return total


def encoder_flop(encoder: Encoder, size: tuple[int, int]) -> float:
    """Of an encoder up to its last tap for one image of (height, width), as PyTorch counts products."""
    on_meta = _on_meta(encoder)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.empty(1, 3, *size, device="meta"))
    return float(counter.get_total_flops())


def positions(encoder: Encoder, size: tuple[int, int]) -> list[int]:
    """Of each tap's feature map."""
    with torch.no_grad():
        maps = _on_meta(encoder)(torch.empty(1, 3, *size, device="meta"))
    return [m.shape[2] * m.shape[3] for m in maps]


def _on_meta(encoder: Encoder) -> Encoder:
    return copy.deepcopy(encoder).to("meta")
