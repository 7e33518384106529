"""What is worked on: the decoders of an encoder, and feature maps of an image size and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from cflow_fast.bench.yardstick import Judge, Yardstick
from cflow_fast.decoder import FlowDecoder, inverse_global_affine, random_rotation
from cflow_fast.encoders import Encoder
from cflow_fast.parity import reference_decoder, roughen

PERMUTATIONS = ("soft", "hard")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scales:
    """Features D and stride of an encoder's pooling scales."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def sides(self, size: int) -> tuple[int, ...]:
        """Height and width of each scale's feature map for square images of `size` pixels."""
        return tuple(-(-size // stride) for stride in self.strides)

    def rows(self, size: int, batch: int) -> tuple[int, ...]:
        """Feature vectors of each scale."""
        return tuple(batch * side * side for side in self.sides(size))


ENCODERS = {
    "wide_resnet50_2": Scales((512, 1024, 2048), (8, 16, 32)),
    "resnet18": Scales((128, 256, 512), (8, 16, 32)),
    "mobilenetv3_large_100": Scales((40, 112, 160), (8, 16, 32)),
    "tf_efficientnet_lite0": Scales((40, 112, 320), (8, 16, 32)),
}
"""Known without building the encoder; any other timm model is built to ask it."""

HEADLINE_ENCODERS = ("wide_resnet50_2", "resnet18", "mobilenetv3_large_100")
SIZES = (256, 512)
BATCHES = (1, 8, 32)
"""What people run: tuned, compiled ahead and predicted."""


def scales_of(encoder: str) -> Scales:
    """Raises EncoderError for a name that timm does not know."""
    if encoder in ENCODERS:
        return ENCODERS[encoder]
    built = Encoder(encoder, pretrained=False)
    return Scales(built.channels, built.strides)


class Case(Protocol):
    """A named amount of work. `work()` makes its tensors on its device, the same ones for the same seed."""

    @property
    def bench(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def axes(self) -> dict[str, Any]: ...
    @property
    def images(self) -> int | None: ...
    @property
    def device(self) -> torch.device: ...
    def flop(self) -> float | None: ...
    def work(self) -> Any: ...
    def yardstick(self, work: Any) -> Judge | None: ...
    def extra(self, seconds: float) -> dict[str, Any]:
        """More figures that follow from the seconds of a call."""


@dataclass(frozen=True)
class DecoderCase:
    """The decoders of an encoder on the features of a batch of square images."""

    encoder: str
    scales: Scales
    size: int
    batch: int
    permutations: str  # "soft" or "hard"
    coupling_blocks: int = 8
    condition: int = 128
    seed: int = 0
    device: torch.device = CPU
    bench: str = "decoder"

    @property
    def label(self) -> str:
        return f"{self.encoder}, {self.permutations} permutations, {self.batch} x {self.size} px"

    @property
    def axes(self) -> dict[str, Any]:
        axes = {name: getattr(self, name) for name in ("encoder", "permutations", "size", "batch")}
        return axes if self.coupling_blocks == 8 else axes | {"blocks": self.coupling_blocks}

    @property
    def images(self) -> int:
        return self.batch

    def flop(self) -> float | None:
        """The work that is left after the exact folds, in FLOP: no condition, no last permutation.

        One count for every contender and precision, so that shares of a device's rate compare times. What the
        cosine-sine fold saves of a soft permutation is not taken off: it shows as a share that may pass 100%.
        """
        rows = self.scales.rows(self.size, self.batch)
        kind = (self.coupling_blocks, self.condition, self.permutations == "soft")
        return sum(decoder_flop(d, n, *kind) for d, n in zip(self.scales.channels, rows, strict=True))

    def decoders(self) -> list[FlowDecoder]:
        """With parameters far from initial ones; cached, since cases differ in size and batch only."""
        return _decoders(
            self.scales.channels,
            self.condition,
            self.coupling_blocks,
            self.permutations == "soft",
            self.seed,
            str(self.device),
        )

    def extra(self, seconds: float) -> dict[str, Any]:
        return {}

    def yardstick(self, work: Decoders) -> Judge | None:
        return Yardstick(work.decoders, work.features, work.reference, self.seed)

    def work(self) -> Decoders:
        generator = torch.Generator().manual_seed(self.seed)
        maps = zip(self.scales.channels, self.scales.sides(self.size), strict=True)
        features = [1.3 * torch.randn(self.batch, d, side, side, generator=generator) for d, side in maps]
        return Decoders(self.decoders(), [maps.to(self.device) for maps in features])


def grid(
    kind: type[DecoderCase],
    encoders: Sequence[str],
    permutations: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    seed: int = 0,
) -> list[DecoderCase]:
    """Every combination, those that share their decoders after each other. Raises EncoderError for an unknown name."""
    scales = {encoder: scales_of(encoder) for encoder in encoders}
    return [
        kind(encoder, scales[encoder], size, batch, permutation, seed=seed, device=device)
        for encoder in encoders
        for permutation in permutations
        for size in sizes
        for batch in batches
    ]


@dataclass(frozen=True)
class Decoders:
    """The tensors of a DecoderCase: decoders, and feature maps (B, D, H, W) of each."""

    decoders: list[FlowDecoder]
    features: list[Tensor]

    @property
    def device(self) -> torch.device:
        return self.features[0].device

    @cached_property
    def reference(self) -> list[Any]:
        """FrEIA's modules with the same parameters, for all contenders that use them; without FrEIA the decoders."""
        return [reference_decoder(decoder)[1] for decoder in self.decoders]


def decoder_flop(features: int, rows: int, blocks: int, condition: int, permute_soft: bool) -> float:
    """FLOP of one folded decoder for a number of feature vectors."""
    passive, active = features - features // 2, features // 2
    hidden = 2 * (passive + condition)
    total = 2.0 * rows * blocks * (passive * hidden + hidden * 2 * active)
    return total + (2.0 * rows * (blocks - 1) * features**2 if permute_soft else 0.0)


@lru_cache(maxsize=4)
def _decoders(
    channels: Sequence[int], condition: int, blocks: int, permute_soft: bool, seed: int, device: str
) -> list[FlowDecoder]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [rough_decoder(d, condition, blocks, permute_soft).to(device) for d in channels]


@torch.no_grad()
def rough_decoder(features: int, condition: int, blocks: int, permute_soft: bool) -> FlowDecoder:
    """A decoder with parameters as long training may leave them, drawn from the global generator, in evaluation mode.

    One rotation is drawn; the other blocks have its rows in another order: drawing many large ones takes long, and
    neither time nor rounding depends on which they are.
    """
    with torch.device("meta"):
        decoder = FlowDecoder(features, condition, blocks, permute_soft=permute_soft)
    decoder.to_empty(device="cpu")
    rotation = random_rotation(features) if permute_soft else None
    all_blocks: Any = decoder.blocks
    for block in all_blocks:
        block.global_scale.fill_(inverse_global_affine(decoder.global_affine_type, decoder.global_affine_init))
        order = torch.randperm(features)
        if rotation is None:
            block.permutation.copy_(order)
        else:
            block.rotation.copy_(rotation[order])
    roughen(decoder)
    return decoder.eval()
