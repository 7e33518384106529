"""The decoders' benchmark cases: WideResNet-50's three scales, ours against FrEIA on all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cflow_fast.decoder import FlowDecoder, gaussian_log_prob
from cflow_fast.folded import FoldedDecoder
from cflow_fast.positional import positional_encoding

CHANNELS = {512: 8, 1024: 16, 2048: 32}
"""WideResNet-50: features of each scale, and the stride of its map."""


@dataclass(frozen=True)
class DecoderCase:
    """Decoders of one permutation kind and features for a batch of square images."""

    permute_soft: bool
    batch: int
    image_size: int
    decoders: list[FlowDecoder]
    features: list[Tensor]

    @property
    def label(self) -> str:
        kind = "soft" if self.permute_soft else "hard"
        return f"{kind} permutations, {self.batch} image(s) of {self.image_size} px"

    def flop(self) -> float:
        """The work that is left after the exact folds, in FLOP: no condition, no last permutation."""
        total = 0.0
        for decoder, maps in zip(self.decoders, self.features, strict=True):
            rows = maps.shape[0] * maps.shape[2] * maps.shape[3]
            d = decoder.features
            passive, active = d - d // 2, d // 2
            blocks = decoder.coupling_blocks
            total += 2.0 * rows * blocks * (passive * decoder.hidden + decoder.hidden * 2 * active)
            total += 2.0 * rows * (blocks - 1) * d * d if self.permute_soft else 0.0
        return total


def decoder_case(permute_soft: bool, batch: int, image_size: int = 256, seed: int = 0) -> DecoderCase:
    torch.manual_seed(seed)
    decoders = [FlowDecoder(d, permute_soft=permute_soft) for d in CHANNELS]
    maps = [torch.randn(batch, d, image_size // s, image_size // s) for d, s in CHANNELS.items()]
    return DecoderCase(permute_soft, batch, image_size, decoders, maps)


def freia_run(case: DecoderCase) -> Callable[[], list[Tensor]]:
    """FrEIA's modules as the published code feeds them, but with all rows at once and the encoding made beforehand."""
    sequences: list[nn.Module] = [decoder.to_freia().eval() for decoder in case.decoders]
    encodings = []
    for decoder, maps in zip(case.decoders, case.features, strict=True):
        encoding = positional_encoding(decoder.condition, *maps.shape[2:]).float()
        encodings.append(encoding.flatten(1).t().repeat(case.batch, 1))

    @torch.no_grad()
    def run() -> list[Tensor]:
        results = []
        for sequence, maps, encoding in zip(sequences, case.features, encodings, strict=True):
            z = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
            u, log_det = sequence(z, [encoding])
            results.append((gaussian_log_prob(u.float()) + log_det.float()).view(case.batch, *maps.shape[2:]))
        return results

    return run


def folded_run(case: DecoderCase, precision: str) -> Callable[[], list[Tensor]]:
    folded: list[FoldedDecoder] = [decoder.fold(precision) for decoder in case.decoders]
    return lambda: [f.log_prob(maps) for f, maps in zip(folded, case.features, strict=True)]
