"""How to train: every number of it, and three named ways."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOSSES = ("likelihood", "logsigmoid")


@dataclass(frozen=True)
class Recipe:
    """Every number of a way to train. `PRESETS` has the named ones; `dataclasses.replace` changes some."""

    learning_rate: float
    epochs: int
    passes: int  # through all images, in each epoch
    images: int | None  # in a group whose vectors are shuffled together; None: all
    vectors: int  # a step, of one scale
    steps: int | None  # a group and scale; None: as many as its vectors fill
    drop_remainder: bool  # leave out a last group or step that is not full
    warmup_epochs: float  # over which the learning rate rises linearly
    warmup_from: float  # the share of the learning rate that it rises from
    decay_to: float  # the share of the learning rate that a cosine falls to
    decay_every_step: bool  # or once an epoch, as published
    rotation: float  # degrees, at most, by which every image is rotated at random in every pass
    loss: str  # "likelihood": -log p / D (eq. 7); "logsigmoid": -logsigmoid(log p / D), as in the published code

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "passes", "images", "vectors", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is positive, got {value!r}")
        for name in ("warmup_epochs", "warmup_from", "decay_to", "rotation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is not negative, got {getattr(self, name)!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is one of {', '.join(LOSSES)}, got {self.loss!r}")

    def rate(self, position: float) -> float:
        """The learning rate at a position in the run, counted in epochs."""
        if position < self.warmup_epochs:
            start, end = self.warmup_from * self.learning_rate, self._cosine(self.warmup_epochs)
            return start + (end - start) * position / self.warmup_epochs
        return self._cosine(position if self.decay_every_step else math.floor(position))

    def _cosine(self, position: float) -> float:
        share = 0.5 * (1 + math.cos(math.pi * position / self.epochs))
        return self.learning_rate * (self.decay_to + (1 - self.decay_to) * share)


PRESETS = {
    # The paper, section 5. It does not say where the warm-up starts and the cosine ends: as in the published code.
    "paper": Recipe(
        learning_rate=2e-4,
        epochs=100,
        passes=1,
        images=32,
        vectors=8192,
        steps=None,
        drop_remainder=False,
        warmup_epochs=2,
        warmup_from=0.1,
        decay_to=0.001,
        decay_every_step=False,
        rotation=5.0,
        loss="likelihood",
    ),
    # The published code's defaults.
    "cflow-ad": Recipe(
        learning_rate=2e-4,
        epochs=25,
        passes=8,
        images=32,
        vectors=256,
        steps=None,
        drop_remainder=True,
        warmup_epochs=2,
        warmup_from=0.1,
        decay_to=0.001,
        decay_every_step=False,
        rotation=0.0,
        loss="logsigmoid",
    ),
    # Few large steps on features computed once.
    "fast": Recipe(
        learning_rate=2e-3,
        epochs=1,
        passes=1,
        images=None,
        vectors=1024,
        steps=400,
        drop_remainder=False,
        warmup_epochs=0.05,
        warmup_from=0.1,
        decay_to=0.01,
        decay_every_step=True,
        rotation=0.0,
        loss="likelihood",
    ),
}
SOFT_PRESETS = frozenset({"paper", "cflow-ad"})
"""Presets whose source trains with soft permutations."""
