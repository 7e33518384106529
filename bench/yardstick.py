"""How far a contender's log p / D may be from float64: what FrEIA itself loses on the same features."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from cflow_fast import parity
from cflow_fast.bench.contenders import OUR_OWN, Built
from cflow_fast.decoder import FlowDecoder
from cflow_fast.positional import positional_encoding

MOST_POSITIONS = 2**19
"""Of a scale, divided by D: 1024 positions at D = 512."""
LEAST_POSITIONS = 320
"""Of a scale. Where the features have fewer, more features like them are judged too: the largest of a few errors is
chance, and so is its ratio to the largest of a few others."""
MOST_DRAWS = 32

PEER_RATIO = 4.0
"""Largest error of a peer in reduced precision, over FrEIA's under bf16 autocast, that rounding explains: a peer may
add up its likelihood in bf16 too, which FrEIA leaves to its caller."""


@dataclass(frozen=True)
class Judgement:
    """What a contender's log p / D deviates from float64, and whether it passes; `extra`: what else was compared."""

    error_max: float
    error_rms: float
    parity: bool
    failures: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    def judge(self, contender: str, precision: str, built: Built) -> Judgement | None: ...


class Yardstick:
    """The exact log p / D of some decoders, at positions drawn from features, and from more of their kind if few."""

    def __init__(
        self, decoders: Sequence[FlowDecoder], features: Sequence[Tensor], reference: Sequence[Any], seed: int = 0
    ) -> None:
        self.decoders, self.reference = decoders, reference
        self._losses: dict[str, parity.Error] = {}
        generator = torch.Generator().manual_seed(seed)
        self.draws = [list(features), *_more(features, generator)]
        self.positions = [_positions(f, generator).to(f.device) for f in features]

    def judge(self, contender: str, precision: str, built: Built) -> Judgement | None:
        """None for a contender without a likelihood."""
        if built.log_probs is None:
            return None
        log_probs = [[x.flatten() for x in built.log_probs(features)] for features in self.draws]
        ours = parity.measure(torch.cat([self._chosen(values) for values in log_probs]), self.exact)
        if contender in OUR_OWN:
            kind = parity.yardstick_of(precision, self.device)
            failures = parity.failures(kind, ours, self._loss(kind))
        else:
            failures = self._peer(precision, ours)
        return Judgement(ours.maximum, ours.rms, not failures, "; ".join(failures))

    def _peer(self, precision: str, error: parity.Error) -> list[str]:
        """A peer is judged by its precision: tf32 keeps three bits more than bf16, and is held to bf16's bound."""
        if precision == "fp32":
            return parity.failures("fp32", error, self._loss("fp32"))
        limit = PEER_RATIO * self._loss("bf16").maximum
        return [] if error.maximum <= limit else [f"maximum is {error.maximum:.3g}, over {limit:.3g}"]

    @property
    def device(self) -> torch.device:
        return self.draws[0][0].device

    @cached_property
    def exact(self) -> Tensor:
        """All scales one after the other, draw by draw."""
        return self._per_dimension([copy.deepcopy(decoder).double() for decoder in self.decoders])

    def _loss(self, kind: str) -> parity.Error:
        """What FrEIA itself loses in fp32, tf32 or bf16."""
        if kind not in self._losses:
            widths = math.gcd(*(decoder.features for decoder in self.decoders))
            with parity.arithmetic_of(kind, self.device, widths):
                self._losses[kind] = parity.measure(self._per_dimension(self.reference), self.exact)
        return self._losses[kind]

    @torch.no_grad()
    def _per_dimension(self, decoders: Sequence[Any]) -> Tensor:
        return torch.cat([self._of_draw(decoders, features) for features in self.draws])

    def _of_draw(self, decoders: Sequence[Any], draw: Sequence[Tensor]) -> Tensor:
        parts = []
        for decoder, own, features, at in zip(decoders, self.decoders, draw, self.positions, strict=True):
            rows = features.permute(0, 2, 3, 1).reshape(-1, own.features)[at].float()
            encoding = None
            if own.condition:
                every = positional_encoding(own.condition, *features.shape[2:]).flatten(1).t().to(rows.device)
                encoding = every[at % len(every)]
            parts.append(parity.rows_log_prob(decoder, rows, encoding) / own.features)
        return torch.cat(parts)

    def _chosen(self, values: Sequence[Tensor]) -> Tensor:
        return torch.cat([x[at] for x, at in zip(values, self.positions, strict=True)])


def _more(features: Sequence[Tensor], generator: torch.Generator) -> list[list[Tensor]]:
    """Other features of the same shapes and size, until every scale has the least number of positions."""
    fewest = min(f.numel() // f.shape[1] for f in features)
    draws = min(MOST_DRAWS, -(-LEAST_POSITIONS // max(1, fewest)))
    scales = [f.float().square().mean().sqrt() for f in features]
    return [
        [
            (scale * torch.randn(f.shape, generator=generator).to(f.device)).to(f.dtype)
            for f, scale in zip(features, scales, strict=True)
        ]
        for _ in range(draws - 1)
    ]


def _positions(features: Tensor, generator: torch.Generator) -> Tensor:
    batch, channels, height, width = features.shape
    count = batch * height * width
    wanted = max(LEAST_POSITIONS, MOST_POSITIONS // channels)
    return torch.arange(count) if count <= wanted else torch.randperm(count, generator=generator)[:wanted]
