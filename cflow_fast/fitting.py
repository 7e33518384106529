"""From a folder of good images to a calibrated model, and back to one that an interruption left half way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cflow_fast.datasets import load_images
from cflow_fast.errors import DataError
from cflow_fast.model import CFlowAD
from cflow_fast.model_file import read_tensors, write_tensors
from cflow_fast.recipes import Recipe
from cflow_fast.training import Progress, Trainer, restore_training, training_state

OnSkip = Callable[[Path, str], None]


@dataclass(frozen=True)
class Split:
    """Images to fit, and images held out for the thresholds."""

    fit: list[Path]
    held_out: list[Path]


def split_images(paths: Sequence[Path], holdout: float, seed: int) -> Split:
    """Hold out a random share of the images, at least one when any is wanted.

    Raises DataError when nothing would be left to fit, ValueError for a share outside of [0, 1).
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is at least 0 and under 1, got {holdout}")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(holdout * len(paths))) if holdout else 0
    if count >= len(paths):
        raise DataError(f"{len(paths)} good image(s) are too few to hold {count} out: add some, or use --holdout 0")
    held_out, fit = set(order[:count]), order[count:]
    return Split([paths[i] for i in sorted(fit)], [paths[i] for i in sorted(held_out)])


class Fit:
    """One training run: split, train, calibrate; can stop and go on.

    Args:
        model: fresh; trained in place.
        paths: good images. Unreadable ones are left out and reported by on_skip(path, reason).
        recipe: see `recipes`.
        holdout: share of the images that play no part in fitting or in the maxima.
        false_alarm_rate: of good images, that the thresholds promise; unused with holdout 0.

    Raises DataError when too few images can be read for the split, ValueError for shares and rates that are none.
    """

    def __init__(
        self,
        model: CFlowAD,
        paths: Sequence[Path],
        recipe: Recipe,
        holdout: float = 0.2,
        false_alarm_rate: float = 0.05,
        seed: int = 0,
        batch_size: int = 32,
        workers: int = 0,
        on_skip: OnSkip = lambda path, reason: None,
    ) -> None:
        self.model, self.false_alarm_rate = model, false_alarm_rate
        self.batch_size, self.workers = batch_size, workers
        readable = _readable(paths, on_skip)
        self.split = split_images(readable, holdout, seed)
        self.trainer = Trainer(model, self._load, len(self.split.fit), recipe, seed)

    def run(
        self,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train and calibrate; False when it was stopped before its end. The model is usable either way."""
        finished = self.trainer.run(on_progress, should_stop)
        self.calibrate()
        return finished

    def images(self) -> Iterator[Tensor]:
        """The images to fit, (B, 3, *image_size), in order."""
        return self._load(list(range(len(self.split.fit))))

    def calibrate(self) -> None:
        """Maxima from the images that were fitted to, thresholds from those held out; as `calibrate` of this module."""
        calibrate(self.model, self.split, self.false_alarm_rate, self.batch_size, self.workers)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write what `restore` needs beside the model itself."""
        tensors, metadata = training_state(self.trainer)
        write_tensors(path, tensors, metadata)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on where `save_state` was called; the model must be the one saved then."""
        restore_training(self.trainer, *read_tensors(path))

    def _load(self, indices: list[int]) -> Iterator[Tensor]:
        paths = [self.split.fit[i] for i in indices]
        for batch in load_images(paths, self.model.image_size, self.batch_size, self.workers, on_skip=_refuse):
            yield batch.images


def calibrate(
    model: CFlowAD,
    split: Split,
    false_alarm_rate: float,
    batch_size: int = 32,
    workers: int = 0,
    on_skip: OnSkip = lambda path, reason: None,
) -> None:
    """Set a model's maxima from the images to fit and its thresholds from those held out, if there are any.

    Raises DataError when no image of either kind can be read.
    """
    batches = load_images(split.fit, model.image_size, batch_size, workers, on_skip=on_skip)
    model.calibrate_maxima(batch.images for batch in batches)
    model.thresholds.fill_(torch.nan)
    model.false_alarm_rate.fill_(torch.nan)
    if not split.held_out:
        return
    scores = []
    for batch in load_images(split.held_out, model.image_size, batch_size, workers, on_skip=on_skip):
        scores += [prediction.score for prediction in model.predict_resized(batch.images, batch.original_sizes)]
    model.calibrate_thresholds(scores, false_alarm_rate)


def _readable(paths: Sequence[Path], on_skip: OnSkip) -> list[Path]:
    """Those that decode: a training run should not find out in its last minute that an image is cut short."""
    bad: set[Path] = set()

    def skip(path: Path, reason: str) -> None:
        bad.add(path)
        on_skip(path, reason)

    for _ in load_images(paths, (8, 8), on_skip=skip):
        pass
    if len(bad) == len(paths):
        raise DataError(f"none of the {len(paths)} images can be read: see the reasons above")
    return [path for path in paths if path not in bad]


def _refuse(path: Path, reason: str) -> None:
    raise DataError(reason)
