"""What the tests of decoders share: flows with parameters far from initial ones, and rows to send through them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from FrEIA import modules
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from cflow_fast import FlowDecoder
from cflow_fast.parity import roughen


def rough_decoder(features: int = 7, condition: int = 8, seed: int = 3, **options: Any) -> FlowDecoder:
    """Three blocks unless told."""
    torch.manual_seed(seed)
    decoder = FlowDecoder(features, condition, **({"coupling_blocks": 3} | options))
    roughen(decoder)
    return decoder


def rows_for(decoder: FlowDecoder, count: int, requires_grad: bool = False) -> tuple[Tensor, list[Tensor] | None]:
    """Feature vectors and their condition in the decoder's precision, as its call takes them."""
    z, c = (
        torch.randn(count, channels, dtype=decoder.dtype, requires_grad=requires_grad)
        for channels in (decoder.features, decoder.condition)
    )
    return z, [c] if decoder.condition else None


def subnet(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))


def freia_sequence(block: type[nn.Module] = modules.AllInOneBlock, **options: Any) -> SequenceINN:
    """Three blocks of D = 9, C = 4 unless told, with random parameters where FrEIA's are constant."""
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002  FrEIA draws its permutations from it
    sequence = SequenceINN(9)
    options = {"subnet_constructor": subnet, "affine_clamping": 1.9, "cond": 0, "cond_shape": (4,)} | options
    for _ in range(3):
        sequence.append(block, **options)
        roughen_freia(sequence.module_list[-1])
    return sequence


@torch.no_grad()
def roughen_freia(block: Any) -> None:
    block.global_scale.add_(0.5 * torch.randn_like(block.global_scale))
    block.global_offset.normal_(0, 0.3)


def named_as_freia_names_it(block: type[nn.Module]) -> type[nn.Module]:
    block.__name__ = "AllInOneBlock"
    return block


@named_as_freia_names_it
class IndexBlock(modules.AllInOneBlock):
    """FrEIA's later, unreleased dialect: a hard permutation is an index vector."""

    w_perm: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not kwargs.get("permute_soft"):
            index = self.w_perm.argmax(1)
            self.w_perm = nn.Parameter(index, requires_grad=False)
            self.w_perm_inv = nn.Parameter(index.argsort(), requires_grad=False)
            self.permute_function = lambda x, index: x[:, index]


@named_as_freia_names_it
class SecondClampBlock(IndexBlock):
    """FrEIA's latest dialect: j = alpha tanh(s / alpha) with [s; t] = 0.1 a."""

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        s, t = (0.1 * a).split(x.shape[1], dim=1)
        j = self.clamp * torch.tanh(s / self.clamp)
        return ((x - t) * torch.exp(-j), -j.sum(1)) if rev else (x * torch.exp(j) + t, j.sum(1))
