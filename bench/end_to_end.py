"""`bench end-to-end`: the whole model, encoder of random weights included, from images in memory to anomaly maps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cflow_fast import parity
from cflow_fast.accelerate import accelerate
from cflow_fast.bench import peers
from cflow_fast.bench.baselines import SPADE, PaDiM
from cflow_fast.bench.baselines import spade as spade_costs
from cflow_fast.bench.cases import DecoderCase, Decoders
from cflow_fast.bench.contenders import (
    ANOMALIB_ACCELERATED,
    OURS,
    Built,
    Contender,
    UnavailableError,
    eager_precision,
    module_bytes,
    registry,
)
from cflow_fast.bench.decoder import folded_log_probs
from cflow_fast.bench.maps import eager_map, lists_map
from cflow_fast.bench.measurement import HALVES, matmul_precision, matrix_rate
from cflow_fast.bench.yardstick import Judge, Judgement
from cflow_fast.encoders import Encoder, calibrate_batch_norm
from cflow_fast.model import CFlowAD

EncoderCall = Callable[[Tensor], list[Tensor]]

RESNET_TAPS = ("layer1", "layer2", "layer3")
LONGEST_CALL = 30.0
"""Seconds. A contender that is counted to take longer is left out."""


@dataclass(frozen=True)
class ModelCase(DecoderCase):
    """A whole model on a batch of square images."""

    bench: str = "end-to-end"

    def flop(self) -> float | None:
        """Encoders are not counted."""
        return None

    def work(self) -> ModelWork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = CFlowAD(self.encoder, coupling_blocks=1, pretrained=False, image_size=self.size)
            images = torch.rand(self.batch, 3, self.size, self.size)
        model.to(self.device).eval()
        images = images.to(self.device)
        _settle(model.encoder, self.size, self.device)
        model.decoders = nn.ModuleList(self.decoders())
        features = _encode(model.encoder, images)
        model.log_prob_max.zero_()  # a map needs maxima, and its time does not depend on them
        return ModelWork(self.decoders(), features, model, images)

    def yardstick(self, work: Any) -> Judge | None:
        decoders = super().yardstick(work)
        return decoders and ModelYardstick(decoders, work, self.seed)


@dataclass(frozen=True)
class ModelWork(Decoders):
    """A model, images (B, 3, H, W), and the features that its encoder makes of them."""

    model: CFlowAD
    images: Tensor

    @property
    def size(self) -> int:
        return self.images.shape[2]


JUDGED_IMAGES = 2
"""Of a batch whose scales have positions enough: in float64 an encoder and its decoders take seconds an image."""
LEAST_POSITIONS = 64
"""Of the coarsest scale: what an image of 256 px has. The RMS of fewer is chance, and so is its ratio to another's."""
MOST_IMAGES = 32
IMAGE_RMS_RATIO = 1.5
"""Of a scale's log p / D made from images, over that of FrEIA behind timm's encoder in the same precision."""


class ModelYardstick:
    """The decoders' yardstick; of contenders that say it, also what encoder and decoders make of images, by float64.

    The images are the case's own, and more of their kind where the coarsest scale has few positions.
    """

    def __init__(self, decoders: Judge, work: ModelWork, seed: int = 0) -> None:
        self.decoders, self.work = decoders, work
        self._losses: dict[str, list[float]] = {}
        needed = images_needed(min(f.shape[2] * f.shape[3] for f in work.features))
        batch = len(work.images)
        self.judged = min(batch, max(JUDGED_IMAGES, needed))  # of each draw
        generator = torch.Generator().manual_seed(seed + 2)  # 0 and 1 make other images
        more = range(-(-needed // self.judged) - 1)
        self.draws = [work.images, *(torch.rand(work.images.shape, generator=generator).to(work.device) for _ in more)]

    def judge(self, contender: str, precision: str, built: Built) -> Judgement | None:
        """The decoders' judgement, turned red where the images' log p / D are farther from float64 than they may be."""
        found = self.decoders.judge(contender, precision, built)
        if found is None or built.from_images is None:
            return found
        ours, theirs = self._rms(built.from_images), self._loss(precision)
        extra = {"image_rms": list(map(_finite, ours)), "image_rms_freia": list(map(_finite, theirs))}
        found = replace(found, extra=found.extra | extra | {"judged_images": len(self.draws) * self.judged})
        wrong = [
            f"scale {scale}: RMS from images is {a:.3g}, over {IMAGE_RMS_RATIO} times FrEIA's {b:.3g}"
            for scale, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)
            if not a <= IMAGE_RMS_RATIO * b
        ]
        failures = "; ".join(filter(None, [found.failures, *wrong]))
        return replace(found, parity=False, failures=failures) if wrong else found

    def _loss(self, precision: str) -> list[float]:
        """Of FrEIA behind timm's encoder, scale by scale."""
        kind = parity.yardstick_of(precision, self.work.device)
        if kind not in self._losses:
            theirs = _with_encoder(self.work, kind, Built(lambda: None), self.work.reference, self.work.model.encoder)
            assert theirs.from_images is not None
            self._losses[kind] = self._rms(theirs.from_images)
        return self._losses[kind]

    def _rms(self, from_images: Callable[[Tensor], list[Tensor]]) -> list[float]:
        draws = [[x[: self.judged].double() for x in from_images(images)] for images in self.draws]
        found = zip(map(torch.cat, zip(*draws, strict=True)), self.exact, strict=True)
        return [(x - exact).square().mean().sqrt().item() for x, exact in found]

    @cached_property
    @torch.no_grad()
    def exact(self) -> list[Tensor]:
        """All draws' judged images one after the other."""
        encoder = copy.deepcopy(self.work.model.encoder).double()
        features = _encode(encoder, torch.cat([images[: self.judged] for images in self.draws]).double())
        decoders = [copy.deepcopy(decoder).double() for decoder in self.work.decoders]
        return [d.log_prob(f) / d.features for d, f in zip(decoders, features, strict=True)]


def _finite(value: float) -> float | None:
    """A file of results has no other numbers."""
    return value if math.isfinite(value) else None


def images_needed(positions: int) -> int:
    """So many images that a scale of so many positions an image has the least number of them, within bounds."""
    return min(MOST_IMAGES, -(-LEAST_POSITIONS // positions))


def ours(work: ModelWork, precision: str) -> Built:
    """This package's model; beside bf16 or fp16 decoders its encoder is in it too, as the peers' is by autocast."""
    model = copy.copy(work.model)
    model.precision, model.encoder_precision = precision, precision if precision in HALVES else "fp32"

    @torch.no_grad()
    def run() -> Tensor:
        with matmul_precision(precision):
            return model(work.images)

    def from_images(images: Tensor) -> list[Tensor]:
        with matmul_precision(precision):
            return model.log_probs(images)

    decoders = model.folded()
    size = module_bytes([model.encoder, *decoders])
    return Built(run, folded_log_probs(decoders), size, from_images=from_images)


def freia(work: ModelWork, precision: str) -> Built:
    """The same encoder, FrEIA on all rows at once, the map in eager PyTorch."""
    return _with_encoder(work, precision, peers.freia(work, precision), work.reference, work.model.encoder)


def freia_compile(work: ModelWork, precision: str) -> Built:
    """The same, encoder and FrEIA's modules under torch.compile."""
    encoder, *sequences = peers.compiled([work.model.encoder, *work.reference])
    built = _with_encoder(work, precision, peers.freia(work, precision), sequences, encoder)
    peers.compile_now(built.run)
    return built


def _with_encoder(
    work: ModelWork, precision: str, decoders: Built, sequences: peers.Sequences, encoder: EncoderCall
) -> Built:
    encodings = [peers.rows_encoding(d.condition, f) for d, f in zip(work.decoders, work.features, strict=True)]

    def log_probs(images: Tensor) -> list[Tensor]:
        maps = zip(sequences, _encode(encoder, images), encodings, strict=True)
        return [peers.row_log_prob(s, f, c) / f.shape[1] for s, f, c in maps]

    def run() -> Tensor:
        with eager_precision(precision, work.device):
            return eager_map(log_probs(work.images), work.size)

    def from_images(images: Tensor) -> list[Tensor]:
        with eager_precision(precision, work.device):
            return log_probs(images)

    size = module_bytes([work.model.encoder, *work.reference])
    return Built(run, decoders.log_probs, size, from_images=from_images)


@torch.no_grad()
def _encode(encoder: EncoderCall, images: Tensor) -> list[Tensor]:
    """By the timm model as it is: what this package's model does to it is its own."""
    return encoder(images.contiguous(memory_format=torch.channels_last))


def cflow_ad_loop(work: ModelWork, precision: str) -> Built:
    """The published speed run: encoder and decoders, no likelihood and no map."""

    def run() -> None:
        with eager_precision(precision, work.device):
            for sequence, features in zip(work.reference, _encode(work.model.encoder, work.images), strict=True):
                for _ in peers.fibers(sequence, features, work.decoders[0].condition):
                    pass

    built = peers.cflow_ad_loop(work, precision)
    size = module_bytes([work.model.encoder, *work.reference])
    return Built(run, built.log_probs, size, "its speed run: neither likelihood nor map is computed")


def cflow_ad_loop_lists(work: ModelWork, precision: str) -> Built:
    """The published accuracy run, its map in float64 from Python lists."""
    sides = [(f.shape[2], f.shape[3]) for f in work.features]

    def run() -> Any:
        with eager_precision(precision, work.device):
            features = _encode(work.model.encoder, work.images)
            lists = peers.loop_lists(work.reference, features, work.decoders[0].condition)
        return lists_map(lists, sides, work.size)

    built = peers.cflow_ad_loop_lists(work, precision)
    return Built(run, built.log_probs, module_bytes([work.model.encoder, *work.reference]), built.note)


def anomalib(work: ModelWork, precision: str) -> Built:
    """anomalib's CflowModel as it ships, in fibers of 64, on images that are normalised already."""
    return _anomalib(work, precision, _anomalib_model(work))


def anomalib_accelerated(work: ModelWork, precision: str) -> Built:
    """The same after `cflow_fast.accelerate`, this package's one line: encoder, fibers and map are still anomalib's."""
    return _anomalib(work, precision, accelerate(_anomalib_model(work), precision))


def _anomalib(work: ModelWork, precision: str, model: Any) -> Built:
    normalised = (work.images - work.model.encoder.mean) / work.model.encoder.std
    decoders = peers.anomalib_decoders(work, precision, model.decoders)

    def run() -> Any:
        with eager_precision(precision, work.device):
            return model(normalised)

    note = "its forward in fibers of 64, on normalised images"
    return Built(run, decoders.log_probs, module_bytes([model]), note)


def _anomalib_model(work: ModelWork) -> nn.Module:
    from anomalib.models.image.cflow.torch_model import CflowModel

    first = work.decoders[0]
    model = CflowModel(
        work.model.encoder.name,
        list(work.model.encoder.layers),
        pre_trained=False,
        condition_vector=first.condition,
        coupling_blocks=first.coupling_blocks,
        clamp_alpha=first.affine_clamping,
    )
    model.encoder.feature_extractor.load_state_dict(work.model.encoder.network.state_dict(), strict=False)
    for theirs, sequence in zip(model.decoders, work.reference, strict=True):
        theirs.load_state_dict(sequence.state_dict())
    model.to(work.device).eval()
    return model


def padim(work: ModelWork, precision: str) -> Built:
    """PaDiM, fitted to random images: another method, for its speed."""
    method = PaDiM(_baseline_encoder(work, RESNET_TAPS))
    method.fit(_random_images(work, 4))
    return _method(work, precision, method)


def spade(work: ModelWork, precision: str) -> Built:
    """SPADE with a gallery of as many random images as it compares with."""
    encoder = _baseline_encoder(work, (*RESNET_TAPS, "layer4"))
    channels, strides = encoder.channels[: spade_costs.PYRAMID_SCALES], encoder.strides
    positions = [(-(-work.size // stride)) ** 2 for stride in strides[: len(channels)]]
    flop = len(work.images) * spade_costs.counted_flop(list(channels), positions)
    expected = flop / matrix_rate("fp32", work.device)
    if expected > LONGEST_CALL:
        raise UnavailableError("not available", f"a call is counted to take {expected:.0f} s: {flop / 1e12:.1f} TFLOP")
    method = SPADE(encoder)
    method.fit(_random_images(work, spade_costs.NEIGHBOURS))
    return _method(work, precision, method)


def _method(work: ModelWork, precision: str, method: PaDiM | SPADE) -> Built:
    def run() -> Tensor:
        with eager_precision(precision, work.device):
            return method.anomaly_map(work.images)

    return Built(run, None, method.model_bytes, "another method: no likelihood to compare")


def _baseline_encoder(work: ModelWork, resnet_taps: Sequence[str]) -> Encoder:
    """The case's encoder with the taps of the method's paper, where it is a ResNet."""
    own = work.model.encoder
    layers = resnet_taps if "resnet" in own.name else own.layers
    encoder = Encoder(own.name, layers, pretrained=False).to(work.device)
    _settle(encoder, work.size, work.device)
    return encoder.to(memory_format=torch.channels_last)


def _settle(encoder: Encoder, size: int, device: torch.device) -> None:
    """Batch norms that let something through, from random images: two, or of small ones as many as fill the coarsest
    scale. Of a few values a deep network's batch norms learn so little that other images' features grow without bound.
    """
    side, stride = max(size, 2 * max(encoder.strides)), max(encoder.strides)
    count = max(2, images_needed((side // stride) ** 2))
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    calibrate_batch_norm(encoder, [images.contiguous(memory_format=torch.channels_last)])


def _random_images(work: ModelWork, count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(1, 3, work.size, work.size, generator=generator).to(work.device)


CONTENDERS = registry(
    Contender(OURS, ours),
    Contender("freia", freia, ("FrEIA",)),
    Contender("freia-compile", freia_compile, ("FrEIA",)),
    Contender("cflow-ad-loop", cflow_ad_loop, ("FrEIA",)),
    Contender("cflow-ad-loop-lists", cflow_ad_loop_lists, ("FrEIA",)),
    Contender("anomalib", anomalib, ("anomalib", "FrEIA")),
    Contender(ANOMALIB_ACCELERATED, anomalib_accelerated, ("anomalib", "FrEIA")),
    Contender("padim", padim, reduced=False),
    Contender("spade", spade, reduced=False),
)
