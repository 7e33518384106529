"""CFLOW-AD as one module: frozen encoder, one flow decoder per pooling scale, calibration, prediction."""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cflow_fast.anomaly import anomaly_map
from cflow_fast.calibration import conformal_threshold
from cflow_fast.changes import Unchanged
from cflow_fast.decoder import FlowDecoder
from cflow_fast.encoder_fusion import FusedEncoder
from cflow_fast.encoders import Encoder
from cflow_fast.errors import CFlowFastError, DataError
from cflow_fast.folded import FoldedDecoder
from cflow_fast.images import as_rgb, read_image, resize, to_tensor
from cflow_fast.kernels.capture import GraphCache, side_by_side
from cflow_fast.precision import PRECISIONS, resolve_encoder_precision, resolve_precision
from cflow_fast.prediction import Prediction, make_prediction

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


class CFlowAD(nn.Module):
    """The whole model of the CFLOW-AD paper.

    Args:
        encoder, layers, pretrained, encoder_weights, reflect_padding: see `Encoder`.
        coupling_blocks, condition, permute_soft, activation, affine_clamping: see `FlowDecoder`.
        image_size: (H, W) or a number; every image is resized to it, whatever its shape, before it is encoded.
        precision: of the folded decoders that predictions are made with; "auto" is settled when the model is
            calibrated, so that its thresholds and its scores belong together.
        encoder_precision: "fp32", "bf16", "fp16" (on a GPU; features over 65,504 become infinite) or "auto" (bf16 on a
            GPU, fp32 on a CPU), settled at the same time.

    `model(images)` gives anomaly maps, `predict` everything about an image. Before a prediction a model is trained
    and calibrated (`cflow_fast.Fit` does both); `save` stores it all.
    Raises EncoderError for an encoder, layers or weights that cannot be had, ValueError for options out of range.
    """

    log_prob_max: Tensor  # (K,) largest log p / D on good images at each scale, NaN until calibrated
    thresholds: Tensor  # (2,) of image and pixel scores, NaN until calibrated
    false_alarm_rate: Tensor  # () that the thresholds promise on good images, NaN without a promise

    def __init__(
        self,
        encoder: str = "wide_resnet50_2",
        layers: Sequence[str] | None = None,
        coupling_blocks: int = 8,
        condition: int = 128,
        permute_soft: bool = False,
        pretrained: bool = True,
        encoder_weights: str | os.PathLike[str] | None = None,
        reflect_padding: bool = False,
        activation: str = "relu",
        affine_clamping: float = 1.9,
        image_size: int | tuple[int, int] = 256,
        precision: str = "auto",
        encoder_precision: str = "auto",
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
        if condition % 4:
            raise ValueError(f"condition is a multiple of 4 (0: none), got {condition}")
        self.image_size = (height, width)
        self.precision = precision
        self.encoder_precision = encoder_precision
        resolve_encoder_precision(encoder_precision, torch.device("cpu"))  # or it is no precision
        self.encoder = Encoder(encoder, layers, pretrained, encoder_weights, reflect_padding)
        self.encoder.to(memory_format=torch.channels_last)  # as the images come, or every call would reorder weights
        if min(self.image_size) < max(self.encoder.strides):
            raise ValueError(
                f"image_size is at least {max(self.encoder.strides)}, the encoder's largest stride, got {image_size}"
            )
        self.decoders = nn.ModuleList(
            FlowDecoder(
                channels,
                condition,
                coupling_blocks,
                affine_clamping=affine_clamping,
                permute_soft=permute_soft,
                activation=activation,
            )
            for channels in self.encoder.channels
        )
        scales = len(self.decoders)
        self.register_buffer("log_prob_max", torch.full((scales,), torch.nan))
        self.register_buffer("thresholds", torch.full((2,), torch.nan))
        self.register_buffer("false_alarm_rate", torch.tensor(torch.nan))
        self._folded: list[FoldedDecoder] = []
        self._folded_from: tuple[object, Unchanged] | None = None
        self._fused_encoder: FusedEncoder | None = None
        self._fused_from: tuple[object, Unchanged] | None = None
        self._graphs: dict[str, tuple[object, GraphCache]] = {}
        self._fetched: list[list[float]] = []
        self._fetched_from: object = None

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments that rebuild this model without its weights' source."""
        first: FlowDecoder = self.decoders[0]  # type: ignore[assignment]
        return {
            "encoder": self.encoder.name,
            "layers": list(self.encoder.layers),
            "reflect_padding": self.encoder.reflect_padding,
            "coupling_blocks": first.coupling_blocks,
            "condition": first.condition,
            "permute_soft": first.permute_soft,
            "activation": first.activation,
            "affine_clamping": first.affine_clamping,
            "image_size": list(self.image_size),
            "precision": self.precision,
            "encoder_precision": self.encoder_precision,
        }

    @property
    def device(self) -> torch.device:
        return self.log_prob_max.device

    @property
    def is_calibrated(self) -> bool:
        return all(map(math.isfinite, self._calibration[0]))

    @property
    def image_threshold(self) -> float | None:
        """Score above which an image is defective; None until there is one."""
        return _number(self._calibration[1][0])

    @property
    def pixel_threshold(self) -> float | None:
        """Anomaly above which a pixel is in the mask; None until there is one."""
        return _number(self._calibration[1][1])

    @property
    def _calibration(self) -> list[list[float]]:
        """The maxima and the thresholds as numbers, fetched when they have changed: a fetch waits for the card."""
        buffers = (self.log_prob_max, self.thresholds)
        state = [_version(buffer) for buffer in buffers]
        if state != self._fetched_from:
            self._fetched = [buffer.tolist() for buffer in buffers]
            self._fetched_from = state
        return self._fetched

    def set_thresholds(self, image: float, pixel: float, false_alarm_rate: float | None = None) -> None:
        """Store thresholds of image and pixel scores, and the rate of false alarms that they promise or None."""
        self._fetched_from = None
        self.thresholds.copy_(torch.tensor([image, pixel]))
        self.false_alarm_rate.fill_(torch.nan if false_alarm_rate is None else false_alarm_rate)

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), RGB in [0, 1], of any size, to the encoder's maps (B, D_k, H_k, W_k) at image_size."""
        resized = resize(images.to(self.device), self.image_size)
        return self.fused_encoder()(resized.contiguous(memory_format=torch.channels_last))

    def log_probs(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to each scale's log p / D in nats, (B, H_k, W_k), by the folded decoders.

        On a GPU the whole of it is a CUDA graph for every layout of images, the scales side by side in it.
        """
        return list(self._replayed("_log_probs", images))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in [0, 1], to anomaly maps (B, H, W) at the images' own size; by a graph as well."""
        return self._replayed("_maps", images)[0]

    def predict(self, images: Tensor | ImageLike | Iterable[ImageLike], batch_size: int = 8) -> list[Prediction]:
        """Inspect images: a tensor (B, 3, H, W) in [0, 1], or one or several paths, PIL images or arrays (H, W[, 3]).

        All but tensors are converted to 8-bit RGB; each gets its anomaly map at its size. Raises DataError naming an
        image that cannot be read, CFlowFastError when the model is not calibrated.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        if isinstance(images, Tensor):
            self._check_images(images)
            tensors: Iterable[Tensor] = images
        else:
            tensors = _read(images)
        predictions, waiting = [], iter(tensors)
        while batch := list(itertools.islice(waiting, batch_size)):
            resized = torch.cat([resize(tensor.unsqueeze(0), self.image_size) for tensor in batch])
            predictions += self.predict_resized(resized, [(tensor.shape[1], tensor.shape[2]) for tensor in batch])
        return predictions

    def predict_resized(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Images (B, 3, *image_size) that had the original sizes (H, W) given, to predictions at those sizes."""
        log_probs = self.log_probs(images)
        predictions = []
        for i, size in enumerate(sizes):
            one = self._anomaly_map([log_prob[i : i + 1] for log_prob in log_probs], size)[0].float().cpu().numpy()
            predictions.append(make_prediction(one, self.image_threshold, self.pixel_threshold))
        damaged = sum(prediction.non_finite > 0 for prediction in predictions)
        if damaged:
            warnings.warn(
                f"{damaged} of {len(predictions)} images have features that are not finite; "
                "the pixels concerned are not scored, and these images are reported as defective",
                stacklevel=2,
            )
        return predictions

    def folded(self) -> list[FoldedDecoder]:
        """The decoders folded in the model's precision, made anew whenever a parameter has changed."""
        wanted, found = (self.precision, self.device), self._folded_from
        if found is None or found[0] != wanted or not found[1].still(self.decoders):
            found = (wanted, Unchanged(self.decoders))
            precision = resolve_precision(self.precision, self.device)
            self._folded = [decoder.fold(precision) for decoder in self.decoders]  # type: ignore[operator]
            self._folded_from = found
        return self._folded

    def fused_encoder(self) -> FusedEncoder:
        """The encoder as features are made with it, made anew whenever one of its tensors has changed."""
        wanted, found = self.encoder_precision, self._fused_from
        if self._fused_encoder is None or found is None or found[0] != wanted or not found[1].still(self.encoder):
            found = (wanted, Unchanged(self.encoder))
            precision = resolve_encoder_precision(self.encoder_precision, self.device)
            self._fused_encoder, self._fused_from = FusedEncoder(self.encoder, precision), found
        return self._fused_encoder

    def calibrate_maxima(self, batches: Iterable[Tensor]) -> None:
        """Find each scale's largest log p / D (nats) over batches (B, 3, H, W) of good images; settles both precisions.

        Raises DataError when there is no image, or none with finite features.
        """
        self.precision = resolve_precision(self.precision, self.device)
        self.encoder_precision = resolve_encoder_precision(self.encoder_precision, self.device)
        maxima = torch.full_like(self.log_prob_max, -torch.inf)
        for batch in batches:
            peaks = torch.stack([log_prob.amax() for log_prob in self.log_probs(batch)])
            maxima = torch.maximum(maxima, peaks.to(maxima))
        if not maxima.isfinite().all():
            raise DataError("calibration needs good images with finite features, and found none: check the images")
        self._fetched_from = None
        self.log_prob_max.copy_(maxima)

    def calibrate_thresholds(self, scores: Sequence[float], false_alarm_rate: float) -> None:
        """Set both thresholds from the scores of good images that played no part in fitting or in the maxima.

        An image's score is its map's maximum, so one conformal quantile serves both: an image has a pixel above the
        threshold exactly when its score is. Warns where so few scores cannot promise that rate; raises ValueError for
        a rate that is none, DataError without scores.
        """
        conformal = conformal_threshold(scores, false_alarm_rate)
        if conformal.limited:
            warnings.warn(
                f"{conformal.samples} held-out images cannot promise a false alarm rate of {false_alarm_rate:g}: "
                f"the thresholds promise {conformal.rate:.3g}; hold out at least "
                f"{int(np.ceil(1 / false_alarm_rate)) - 1} for the wanted rate",
                stacklevel=2,
            )
        self.set_thresholds(conformal.threshold, conformal.threshold, conformal.rate)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole model to one safetensors file, atomically: see `model_file`."""
        from cflow_fast.model_file import save_model

        save_model(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> CFlowAD:
        """Read a model that `save` wrote; no network, no pickle. Raises ModelFileError naming the file."""
        from cflow_fast.model_file import load_model

        return load_model(path, device)

    @torch.no_grad()
    def _replayed(self, method: str, images: Tensor) -> tuple[Tensor, ...]:
        """What a method of this model makes of images, by a graph where there are any."""
        maxima = self._calibration[0] if method == "_maps" else None  # numbers in a graph
        derived = (self.folded(), self.fused_encoder(), maxima)
        found = self._graphs.get(method)
        if found is None or found[0] != derived:
            if found is not None:
                found[1].clear()
            made = weakref.WeakMethod(getattr(self, method))  # or a model would live, on the card, until a collection
            found = self._graphs[method] = derived, GraphCache(lambda images: made()(images))  # type: ignore[misc]
        return found[1](images.to(self.device))

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self._anomaly_map(self._log_probs(images), (images.shape[2], images.shape[3])),)

    def _log_probs(self, images: Tensor) -> tuple[Tensor, ...]:
        decoded = [
            functools.partial(_log_prob_per_dimension, folded, features)
            for folded, features in zip(self.folded(), self.features(images), strict=True)
        ]
        return tuple(side_by_side(decoded, self.device))

    def _anomaly_map(self, log_probs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        if not self.is_calibrated:
            raise CFlowFastError("this model is not calibrated: train it, or run calibrate on good images first")
        return anomaly_map(log_probs, size, self._calibration[0])

    def _check_images(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"image tensors are floating point in [0, 1], got {images.dtype}")
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise DataError("image tensors are in [0, 1]: scale them, and look for NaN")

    def __getstate__(self) -> dict[str, Any]:
        """What was made from the parameters is neither copied nor pickled."""
        derived: dict[str, Any] = {"_folded": [], "_folded_from": None, "_fused_encoder": None, "_fused_from": None}
        derived |= {"_graphs": {}, "_fetched": [], "_fetched_from": None}
        return self.__dict__ | derived


def _read(images: ImageLike | Iterable[ImageLike]) -> Iterator[Tensor]:
    """Images of any kind, one by one, as tensors (3, H, W)."""
    if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
        images = [images]
    for i, image in enumerate(images):
        is_path = isinstance(image, (str, os.PathLike))
        yield to_tensor(read_image(image) if is_path else as_rgb(image, f"image {i}"))  # type: ignore[arg-type]


def _log_prob_per_dimension(folded: FoldedDecoder, features: Tensor) -> Tensor:
    return folded.log_prob(features) / folded.features


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _version(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
