"""`bench training`: the feature vectors of a batch of images once through training, features made beforehand.

Everyone takes the same vectors, in steps of the size that its own recipe has.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cflow_fast.bench import peers
from cflow_fast.bench.contenders import OURS, Built, Contender, module_bytes, registry
from cflow_fast.bench.end_to_end import ModelCase, ModelWork
from cflow_fast.decoder import gaussian_log_prob
from cflow_fast.recipes import PRESETS
from cflow_fast.training import Position, Trainer

LEARNING_RATE = 1e-7
"""So small that the rounds of a measurement, thousands of steps, leave the decoders where they are."""
EPOCH_IMAGES = 100

RECIPE = replace(
    PRESETS["fast"], learning_rate=LEARNING_RATE, epochs=1, passes=1, images=None, steps=None, drop_remainder=False
)


@dataclass(frozen=True)
class TrainingCase(ModelCase):
    """One pass through the vectors of a batch of images at every scale."""

    bench: str = "training"

    def flop(self) -> float | None:
        """Forward and backward of the decoders as they are trained, condition included; rotations get no gradient."""
        total = 0.0
        for d, rows in zip(self.scales.channels, self.scales.rows(self.size, self.batch), strict=True):
            inputs, active = d - d // 2 + self.condition, d // 2
            subnet = inputs * 2 * inputs + 2 * inputs * 2 * active
            mixing = d * d if self.permutations == "soft" else 0
            total += 2.0 * rows * self.coupling_blocks * (3 * subnet + 2 * mixing)
        return total

    def extra(self, seconds: float) -> dict[str, Any]:
        vectors = sum(self.scales.rows(self.size, self.batch))
        return {
            "vectors_per_second": vectors / seconds,
            "epoch_images": EPOCH_IMAGES,
            "epoch_seconds": EPOCH_IMAGES * seconds / self.batch,
        }


def ours(work: ModelWork, precision: str) -> Built:
    """This package's Trainer, with the steps of its `fast` recipe."""
    model = copy.copy(work.model)
    model._modules = dict(work.model._modules)
    model.decoders = nn.ModuleList(copy.deepcopy(decoder) for decoder in work.decoders)
    trainer = Trainer(model, lambda indices: [work.images[indices]], len(work.images), RECIPE)

    def run() -> None:
        trainer.position = Position()
        trainer.run()

    untrained = [copy.deepcopy(decoder) for decoder in work.decoders]

    @torch.no_grad()
    def log_probs(features: Sequence[Tensor]) -> list[Tensor]:
        return [d.log_prob(f) / d.features for d, f in zip(untrained, features, strict=True)]

    return Built(run, log_probs, module_bytes([model.decoders]), f"steps of {RECIPE.vectors} vectors")


def freia(work: ModelWork, precision: str) -> Built:
    """FrEIA's modules in steps as large as ours."""
    return _published_steps(work, RECIPE.vectors)


def cflow_ad_loop(work: ModelWork, precision: str) -> Built:
    """FrEIA's modules in the published steps of 256 vectors."""
    return _published_steps(work, peers.FIBER)


def _published_steps(work: ModelWork, vectors: int) -> Built:
    """As the published code trains: one Adam over all decoders, a step for every fiber, its loss read back."""
    sequences = [copy.deepcopy(sequence).train() for sequence in work.reference]
    optimizer = torch.optim.Adam([p for sequence in sequences for p in sequence.parameters()], LEARNING_RATE)
    condition = work.decoders[0].condition

    def run() -> float:
        total = 0.0
        for sequence, maps in zip(sequences, work.features, strict=True):
            rows, encoding = peers.rows_of(maps), peers.rows_encoding(condition, maps)
            order = torch.randperm(len(rows)).to(maps.device)
            for start in range(0, len(rows), vectors):
                index = order[start : start + vectors]
                loss = _loss(sequence, rows[index], encoding[index])
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
                total += float(loss.detach().sum().cpu().numpy())
        return total

    log_probs = peers.freia(work, "fp32").log_probs
    return Built(run, log_probs, module_bytes(sequences), f"steps of {vectors} vectors")


def _loss(sequence: nn.Module, rows: Tensor, encoding: Tensor) -> Tensor:
    u, log_det = sequence(rows, [encoding])
    return -F.logsigmoid((gaussian_log_prob(u) + log_det) / rows.shape[1])


CONTENDERS = registry(
    Contender(OURS, ours, reduced=False),
    Contender("freia", freia, ("FrEIA",), reduced=False),
    Contender("cflow-ad-loop", cflow_ad_loop, ("FrEIA",), reduced=False),
)
