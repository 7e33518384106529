"""`bench map`: from each scale's log p / D to the anomaly map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast.anomaly import anomaly_map
from cflow_fast.bench.cases import CPU, Scales
from cflow_fast.bench.contenders import OURS, Built, Contender, registry
from cflow_fast.bench.yardstick import Judgement

MAP_ERROR = 2e-5
"""Largest error of a map against float64 that float32 explains; a map lies between 0 and the number of scales."""


@dataclass(frozen=True)
class MapCase:
    """The scales of an encoder, upsampled to a batch of square images."""

    encoder: str
    scales: Scales
    size: int
    batch: int
    seed: int = 0
    device: torch.device = CPU
    bench: str = "map"

    @property
    def label(self) -> str:
        return f"{self.encoder}, {self.batch} x {self.size} px"

    @property
    def axes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("encoder", "size", "batch")}

    @property
    def images(self) -> int:
        return self.batch

    def flop(self) -> None:
        """A map is bound by what it writes, not by arithmetic."""

    def extra(self, seconds: float) -> dict[str, Any]:
        return {}

    def work(self) -> MapWork:
        generator = torch.Generator().manual_seed(self.seed)
        sides = self.scales.sides(self.size)
        log_probs = [-torch.rand(self.batch, side, side, generator=generator) - 1 for side in sides]
        return MapWork([log_prob.to(self.device) for log_prob in log_probs], self.size)

    def yardstick(self, work: MapWork) -> MapYardstick:
        return MapYardstick(work)


@dataclass(frozen=True)
class MapWork:
    log_probs: list[Tensor]  # (B, H_k, W_k)
    size: int


class MapYardstick:
    """The map in float64, but for the constant that it is subtracted from, which each normalisation has its own of."""

    def __init__(self, work: MapWork) -> None:
        self.exact = _without_constant(eager_map([x.double() for x in work.log_probs], work.size))

    def judge(self, contender: str, precision: str, built: Built) -> Judgement:
        result: Any = built.run()
        deviation = (_without_constant(torch.as_tensor(result).to(self.exact)) - self.exact).abs()
        largest = deviation.max().item()
        failures = "" if largest <= MAP_ERROR else f"maximum is {largest:.3g}, over {MAP_ERROR:g}"
        return Judgement(largest, deviation.square().mean().sqrt().item(), not failures, failures)


def _without_constant(anomaly: Tensor) -> Tensor:
    return anomaly.double() - anomaly.double().amin()


def ours(work: MapWork, precision: str) -> Built:
    """This package's, with the maxima of a calibrated model."""
    maxima = [log_prob.max().item() for log_prob in work.log_probs]
    return Built(lambda: anomaly_map(work.log_probs, work.size, maxima))


def eager(work: MapWork, precision: str) -> Built:
    """The published normalisation in eager PyTorch, on the device."""
    return Built(lambda: eager_map(work.log_probs, work.size))


def published(work: MapWork, precision: str) -> Built:
    """As cflow-ad makes it: from Python lists, in float64, on the CPU, added up in numpy."""
    lists = [log_prob.flatten().tolist() for log_prob in work.log_probs]
    sides = [(log_prob.shape[1], log_prob.shape[2]) for log_prob in work.log_probs]
    return Built(lambda: lists_map(lists, sides, work.size), note="from Python lists, float64 on the CPU")


def anomalib_map(work: MapWork, precision: str) -> Built:
    """anomalib's AnomalyMapGenerator."""
    from anomalib.models.image.cflow.anomaly_map import AnomalyMapGenerator

    generator = AnomalyMapGenerator(pool_layers=[str(k) for k in range(len(work.log_probs))])
    arguments = {
        "distribution": [log_prob.flatten() for log_prob in work.log_probs],
        "height": [log_prob.shape[1] for log_prob in work.log_probs],
        "width": [log_prob.shape[2] for log_prob in work.log_probs],
        "image_size": (work.size, work.size),
    }
    return Built(lambda: generator(**arguments))


@torch.no_grad()
def eager_map(log_probs: Sequence[Tensor], size: int) -> Tensor:
    """[(B, H_k, W_k), ...] to (B, size, size), each scale normalised by its largest value, as published."""
    total: Tensor | None = None
    for log_prob in log_probs:
        probability = torch.exp(log_prob - log_prob.max()).unsqueeze(1)
        upsampled = F.interpolate(probability, size=(size, size), mode="bilinear", align_corners=True).squeeze(1)
        total = upsampled if total is None else total + upsampled
    assert total is not None
    return total.max() - total


def lists_map(lists: Sequence[list[float]], sides: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """The same from lists of log p / D: (B, size, size) float64."""
    total: Any = 0.0
    for values, (height, width) in zip(lists, sides, strict=True):
        log_prob = torch.tensor(values, dtype=torch.double)
        probability = torch.exp(log_prob - log_prob.max()).reshape(-1, 1, height, width)
        upsampled = F.interpolate(probability, size=(size, size), mode="bilinear", align_corners=True)
        total = total + upsampled.squeeze(1).numpy()
    return total.max() - total


CONTENDERS = registry(
    Contender(OURS, ours, reduced=False),
    Contender("eager", eager, reduced=False),
    Contender("cflow-ad-lists", published, reduced=False),
    Contender("anomalib", anomalib_map, ("anomalib",), reduced=False),
)
