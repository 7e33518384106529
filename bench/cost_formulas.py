"""Table 1: what training, testing and memory cost, as formulas of the algorithms and counted for one encoder.

The formulas are this package's reading of the three methods; those that the paper prints could not be checked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cflow_fast.bench import counting
from cflow_fast.bench.baselines import padim, spade
from cflow_fast.bench.results import Row
from cflow_fast.encoders import Encoder

SYMBOLS = (
    "E: the encoder for one image; N good images; T passes through them; scale k has P_k positions of D_k features, "
    "scale 1 the most; theta_k: products of decoder k for one position; w_k: its stored numbers; d: PaDiM's channels; "
    "K: SPADE's neighbours. Multiply-adds, and numbers stored beside the encoder."
)


@dataclass(frozen=True)
class Cost:
    """A method's costs: formulas, and counted for one encoder and image size; per good image, per image, in bytes."""

    contender: str
    name: str
    train: str
    test: str
    memory: str
    train_flop: float  # a good image
    test_flop: float  # an image
    memory_bytes: int


def costs(encoder: str, size: int = 256, images: int = 242, passes: int = 1) -> list[Cost]:
    """Table 1 for square images of `size` pixels, N good images and T passes through them.

    CFLOW-AD takes the encoder's default taps; PaDiM and SPADE layer1 to layer3, and there is no line for them where an
    encoder has no such layers.
    """
    return [_cflow(encoder, size, passes), *_baselines(encoder, size, images)]


def cost_rows(encoder: str, device: torch.device, size: int = 256, images: int = 242) -> list[Row]:
    """The table as rows to be stored; they are the same on every device."""
    return [
        Row(
            "complexity",
            f"cost, {encoder}, {size} px, {images} good images",
            {"encoder": encoder, "size": size, "images": images},
            cost.contender,
            "fp32",
            device.type,
            model_bytes=cost.memory_bytes,
            extra={
                "table": 1,
                "train": cost.train,
                "test": cost.test,
                "memory": cost.memory,
                "train_gflop": cost.train_flop / 1e9,
                "test_gflop": cost.test_flop / 1e9,
            },
        )
        for cost in costs(encoder, size, images)
    ]


def _cflow(name: str, size: int, passes: int) -> Cost:
    encoder = Encoder(name, pretrained=False)
    encoding = counting.encoder_flop(encoder, (size, size))
    decoding = counting.decoder_flop(encoder.channels, counting.positions(encoder, (size, size)))
    return Cost(
        "cflow-fast",
        "CFLOW-AD",
        "T N (E + 3 sum_k P_k theta_k)",
        "E + sum_k P_k theta_k",
        "sum_k w_k",
        passes * (encoding + 3 * decoding),
        encoding + decoding,
        counting.reference_bytes(encoder.channels),
    )


def _baselines(name: str, size: int, images: int) -> list[Cost]:
    if "resnet" not in name:
        return []
    encoder = Encoder(name, ("layer1", "layer2", "layer3"), pretrained=False)
    channels, positions = list(encoder.channels), counting.positions(encoder, (size, size))
    encoding = counting.encoder_flop(encoder, (size, size))
    d = padim.default_channels(name, sum(channels))
    inversions = positions[0] * d**3 / images
    return [
        Cost(
            "padim",
            "PaDiM",
            "N (E + P_1 d^2) + P_1 d^3",
            "E + P_1 d^2",
            "P_1 (d^2 + d)",
            encoding + 2.0 * (positions[0] * d**2 + inversions),
            encoding + padim.counted_flop(d, positions[0]),
            padim.counted_bytes(d, positions[0]),
        ),
        Cost(
            "spade",
            "SPADE",
            "N E",
            "E + K P_1^2 sum_k D_k",
            "N sum_k P_k D_k",
            encoding,
            encoding + spade.counted_flop(channels, positions),
            spade.counted_bytes(channels, positions, images),
        ),
    ]
