"""Training the decoders by a recipe.

An epoch is some passes through the good images in random order, a group of them at a time. A group's feature vectors,
each with its position's encoding, are shuffled and taken in steps, one step of every scale in turn. Features are
computed once when nothing about the images changes, and that is always but with random rotations.

Every random choice is drawn from a generator seeded by where in the run it is made: a run that is continued ends as an
uninterrupted one would, and a scale's result does not depend on the others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from cflow_fast.decoder import FlowDecoder
from cflow_fast.errors import CFlowFastError, DataError
from cflow_fast.model import CFlowAD
from cflow_fast.positional import positional_encoding
from cflow_fast.recipes import Recipe

FEATURE_BYTES = 4 * 2**30
"""Memory for features that are computed once. Beyond it, an equal random share of every image's positions is kept."""


@dataclass(frozen=True)
class Progress:
    """Where a run is after a step of every scale."""

    done: float  # share of the run, 0 to 1
    loss: float  # mean over the scales of this step's loss, nats per dimension
    learning_rate: float


@dataclass
class Position:
    """The next step of a run."""

    epoch: int = 0
    passed: int = 0  # passes done in this epoch
    group: int = 0
    step: int = 0


class Trainer:
    """Fits a model's decoders to good images.

    Args:
        model: its decoders are trained in place.
        load: gives the images (B, 3, *model.image_size) with the indices asked for, in that order, in batches.
        count: how many images there are.
        recipe: see `recipes`.
        seed: of the order of images and vectors, and of rotations.
    """

    def __init__(
        self,
        model: CFlowAD,
        load: Callable[[list[int]], Iterable[Tensor]],
        count: int,
        recipe: Recipe,
        seed: int = 0,
    ) -> None:
        if count == 0:
            raise DataError("there is no image to train on")
        self.model, self.load, self.count, self.recipe, self.seed = model, load, count, recipe, seed
        self.position = Position()
        self.optimizers = [torch.optim.Adam(decoder.parameters(), recipe.learning_rate) for decoder in self.decoders]
        self._cache: list[_Vectors] | None = None
        self._orders: dict[int, tuple[object, Tensor]] = {}

    @property
    def decoders(self) -> list[FlowDecoder]:
        return list(self.model.decoders)  # type: ignore[arg-type]

    def run(
        self,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train from `position` to the end: True; or until `should_stop` between two steps: False."""
        self.model.decoders.train()
        finished = self._run(on_progress, should_stop)
        self.model.decoders.eval()
        return finished

    def _run(self, on_progress: Callable[[Progress], None], should_stop: Callable[[], bool]) -> bool:
        recipe, at = self.recipe, self.position
        while at.epoch < recipe.epochs:
            groups = self._groups(at.epoch, at.passed)
            while at.group < len(groups):
                vectors = self._vectors(groups[at.group])
                steps = [self._steps(v) for v in vectors]
                while at.step < max(steps):
                    if should_stop():
                        return False
                    through = (at.passed + (at.group + at.step / max(steps)) / len(groups)) / recipe.passes
                    on_progress(self._step(vectors, steps, at.epoch + through))
                    at.step += 1
                at.group, at.step = at.group + 1, 0
            at.passed, at.group = at.passed + 1, 0
            if at.passed == recipe.passes:
                at.epoch, at.passed = at.epoch + 1, 0
        return True

    def _step(self, vectors: list[_Vectors], steps: list[int], position: float) -> Progress:
        rate = self.recipe.rate(position)
        losses = []
        for scale, decoder in enumerate(self.decoders):
            if self.position.step >= steps[scale]:
                continue
            rows = self._draw(scale, vectors[scale].count)
            z, c = vectors[scale].rows(rows, decoder.condition)
            log_prob = decoder.log_prob(z, c) / decoder.features
            loss = -(log_prob if self.recipe.loss == "likelihood" else F.logsigmoid(log_prob)).mean()
            if not loss.isfinite():
                raise CFlowFastError(
                    f"training diverged: the loss of scale {scale + 1} is {loss.item()}; "
                    f"lower the learning rate (now {rate:.2g}) or look for images that are not finite"
                )
            optimizer = self.optimizers[scale]
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return Progress(position / self.recipe.epochs, torch.stack(losses).mean().item(), rate)

    def _groups(self, epoch: int, passed: int) -> list[list[int]]:
        """The images of a pass, in random order, by groups."""
        order = torch.randperm(self.count, generator=self._random("images", epoch, passed)).tolist()
        size = self.recipe.images or self.count
        groups = [order[start : start + size] for start in range(0, self.count, size)]
        full = [group for group in groups if len(group) == size]
        return full if self.recipe.drop_remainder and full else groups

    def _steps(self, vectors: _Vectors) -> int:
        if self.recipe.steps is not None:
            return self.recipe.steps
        whole = vectors.count // self.recipe.vectors
        return max(1, whole if self.recipe.drop_remainder else math.ceil(vectors.count / self.recipe.vectors))

    def _draw(self, scale: int, count: int) -> Tensor:
        """Rows of the current step: a slice of a random order of all, a new order whenever one is used up."""
        at, size = self.position, min(self.recipe.vectors, count)
        if self.recipe.steps is None:
            round_, start = 0, at.step * size
        else:
            per_round = count // size
            round_, start = at.step // per_round, at.step % per_round * size
        key = (at.epoch, at.passed, at.group, scale, round_)
        if self._orders.get(scale, (None,))[0] != key:
            self._orders[scale] = (key, torch.randperm(count, generator=self._random("vectors", *key)))
        return self._orders[scale][1][start : start + size]

    def _vectors(self, group: list[int]) -> list[_Vectors]:
        """The feature vectors of a group of images at every scale."""
        if self.recipe.rotation:
            return self._encode(group, 1.0)
        if self._cache is None:
            self._cache = self._encode(list(range(self.count)), self._share_kept())
        return self._cache if len(group) == self.count else [vectors.of_images(group) for vectors in self._cache]

    def _share_kept(self) -> float:
        height, width = self.model.image_size
        encoder = self.model.encoder
        floats = sum(d * (height // s) * (width // s) for d, s in zip(encoder.channels, encoder.strides, strict=True))
        return min(1.0, FEATURE_BYTES / (4 * floats * self.count))

    @torch.no_grad()
    def _encode(self, indices: list[int], share: float) -> list[_Vectors]:
        parts: list[list[Tensor]] = [[] for _ in self.decoders]
        kept: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        at = self.position
        angles = self._random("rotations", at.epoch, at.passed, at.group)
        for images in self.load(indices):
            features = self.model.features(self._rotated(images, angles))
            if not kept:
                sizes = [(f.shape[2], f.shape[3]) for f in features]
                kept = [self._positions(scale, h * w, share) for scale, (h, w) in enumerate(sizes)]
            for part, feature, positions in zip(parts, features, kept, strict=True):
                part.append(feature.flatten(2)[:, :, positions].transpose(1, 2).contiguous())
        return [
            _Vectors(torch.cat(part), *rest) for part, rest in zip(parts, zip(kept, sizes, strict=True), strict=True)
        ]

    def _positions(self, scale: int, count: int, share: float) -> Tensor:
        if share == 1.0:
            return torch.arange(count)
        return torch.randperm(count, generator=self._random("positions", scale))[: max(1, int(share * count))]

    def _rotated(self, images: Tensor, generator: torch.Generator) -> Tensor:
        limit = self.recipe.rotation
        if not limit:
            return images
        angles = (2 * torch.rand(len(images), generator=generator) - 1) * limit
        return torch.stack(
            [
                transforms.rotate(image, angle, interpolation=transforms.InterpolationMode.BILINEAR)
                for image, angle in zip(images, angles.tolist(), strict=True)
            ]
        )

    def _random(self, *key: object) -> torch.Generator:
        """A generator for one purpose at one place of the run."""
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class _Vectors:
    """Feature vectors of some images at one scale: the same positions of each image."""

    def __init__(self, values: Tensor, positions: Tensor, size: tuple[int, int]) -> None:
        self.values = values  # (images, positions, D)
        self.positions = positions  # (positions,) row-major index into the map
        self.size = size
        self._conditions: Tensor | None = None

    @property
    def count(self) -> int:
        return self.values.shape[0] * self.values.shape[1]

    def of_images(self, indices: list[int]) -> _Vectors:
        return _Vectors(self.values[indices], self.positions, self.size)

    def rows(self, rows: Tensor, condition: int) -> tuple[Tensor, Tensor | None]:
        """Vectors (N, D) and their positional encodings (N, C)."""
        device = self.values.device
        z = self.values.flatten(0, 1)[rows.to(device)]
        if not condition:
            return z, None
        if self._conditions is None:
            encoding = positional_encoding(condition, *self.size).flatten(1).t()
            self._conditions = encoding[self.positions].to(device, self.values.dtype)
        return z, self._conditions[(rows % len(self.positions)).to(device)]


def training_state(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything but the model that a run needs in order to go on: tensors and JSON strings."""
    tensors: dict[str, Tensor] = {}
    for scale, optimizer in enumerate(trainer.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{scale}.{index}.{name}": torch.as_tensor(value).cpu() for name, value in values.items()}
    facts = {"recipe": asdict(trainer.recipe), "seed": trainer.seed, "count": trainer.count}
    return tensors, {"run": json.dumps(facts), "position": json.dumps(asdict(trainer.position))}


def restore_training(trainer: Trainer, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Set a trainer to a stored state. Raises CFlowFastError when that is of another run."""
    facts = {"recipe": asdict(trainer.recipe), "seed": trainer.seed, "count": trainer.count}
    stored = json.loads(metadata.get("run", "{}"))
    differing = [name for name, value in facts.items() if stored.get(name) != value]
    if differing:
        raise CFlowFastError(
            f"the interrupted run had another {' and '.join(differing)}: resume with the same options and images"
        )
    trainer.position = Position(**json.loads(metadata["position"]))
    for scale, optimizer in enumerate(trainer.optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, index, name = key.split(".")
            if int(owner) == scale:
                state.setdefault(int(index), {})[name] = tensor.clone()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
