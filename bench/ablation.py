"""What each choice in CFLOW-AD brings: the paper's Table 2, one factor at a time around a base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from cflow_fast.bench.accuracy import METRICS, OnProgress, OnSkip, Scores, Setting, measure
from cflow_fast.bench.counting import decoder_bytes
from cflow_fast.bench.results import Row
from cflow_fast.datasets import MVTecCategory
from cflow_fast.encoders import Encoder
from cflow_fast.errors import EncoderError
from cflow_fast.precision import resolve_precision

SIZES = (256, 128, 512)
"""The base, and what it is compared with."""

FEWER_BLOCKS = 4
BASE = "base"


@dataclass(frozen=True)
class Variation:
    """The base with one factor changed."""

    factor: str
    value: str
    setting: Setting

    @property
    def label(self) -> str:
        return self.factor if self.factor == BASE else f"{self.factor}: {self.value}"


def variations(base: Setting, sizes: Sequence[int] = (), encoders: Sequence[str] = ()) -> list[Variation]:
    """The base; half its coupling blocks; one pooling scale fewer, the finest; other sizes; no condition; encoders.

    Another encoder has its own default taps and ImageNet weights. Raises EncoderError when the base cannot be had.
    """
    described = f"{base.encoder}, {base.coupling_blocks} coupling layers, {base.image_size} px"
    found = [Variation(BASE, described, base)]
    fewer = FEWER_BLOCKS if base.coupling_blocks != FEWER_BLOCKS else 8
    found.append(Variation("coupling layers", str(fewer), replace(base, coupling_blocks=fewer)))
    layers = Encoder(base.encoder, base.layers, pretrained=False).layers
    if len(layers) > 1:
        found.append(Variation("pooling layers", str(len(layers) - 1), replace(base, layers=layers[1:])))
    for size in sizes:
        if size != base.image_size:
            found.append(Variation("image size", f"{size} px", replace(base, image_size=size)))
    found.append(Variation("condition", "none", replace(base, condition=0)))
    for encoder in encoders:
        other = replace(base, encoder=encoder, layers=None, encoder_weights=None)
        found.append(Variation("encoder", encoder, other))
    return found


def ablation_rows(
    category: MVTecCategory,
    planned: Sequence[Variation],
    seed: int,
    on_skip: OnSkip = lambda path, reason: None,
    on_progress: OnProgress = lambda text: None,
) -> Iterator[Row]:
    """Train and test every variation, with the same seed. An encoder that cannot be had is a row that says so."""
    for variation in planned:
        try:
            scores = measure("cflow-fast", category, variation.setting, seed, on_skip, on_progress)
        except EncoderError as error:
            yield _row(category, variation, status="not available", note=str(error))
        except torch.OutOfMemoryError as error:
            yield _row(category, variation, status="out of memory", note=str(error).splitlines()[0])
        else:
            yield _measured(category, variation, scores, seed)


def _measured(category: MVTecCategory, variation: Variation, scores: Scores, seed: int) -> Row:
    setting = variation.setting
    channels = Encoder(setting.encoder, setting.layers, pretrained=False).channels
    values = {name: getattr(scores, name) for name in METRICS}
    extra = {name: None if math.isnan(value) else value for name, value in values.items()}
    row = _row(category, variation)
    return replace(
        row,
        images_per_second=1 / scores.seconds_per_image,
        model_bytes=scores.model_bytes,
        extra=extra
        | {
            "decoder_bytes": decoder_bytes(channels, setting.permute_soft, setting.condition, setting.coupling_blocks),
            "fit_seconds": scores.fit_seconds,
            "seed": seed,
        },
    )


def _row(category: MVTecCategory, variation: Variation, status: str = "ok", note: str = "") -> Row:
    setting = variation.setting
    return Row(
        "ablation",
        f"{category.name}, {variation.label}",
        {
            "category": category.name,
            "factor": variation.factor,
            "value": variation.value,
            "encoder": setting.encoder,
            "size": setting.image_size,
            "blocks": setting.coupling_blocks,
            "condition": setting.condition,
        },
        "cflow-fast",
        resolve_precision("auto", setting.device),
        setting.device.type,
        status=status,
        note=note,
    )
