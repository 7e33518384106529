"""PaDiM (Defard, Setkov, Loesch and Audigier, ICPR workshops 2020, arXiv 2011.08785).

A position's embedding x is what the encoder's maps hold there, all at the first map's resolution, reduced to d channels
that are drawn at random once. Good images give every position its Gaussian:

    mu = mean(x)      Sigma = sum((x - mu)(x - mu)^T) / (N - 1) + 0.01 I
    distance(x) = sqrt((x - mu)^T Sigma^-1 (x - mu))

The map of distances is upsampled and smoothed; an image's score is its map's maximum.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cflow_fast.bench.baselines.maps import (
    anomaly_maps,
    encode,
    encoder_bytes,
    pyramid,
    require_memory,
    tensor_bytes,
)
from cflow_fast.encoders import Encoder
from cflow_fast.errors import DataError

CHANNELS = {"resnet18": 100, "wide_resnet50_2": 550}
"""d, as the paper chose it. Other encoders get as large a share of their channels as WideResNet-50: 550 of 1792."""

REGULARISATION = 0.01
CHUNK_BYTES = 256 * 2**20
"""Working memory of a step over a chunk of positions."""


class PaDiM:
    """A Gaussian for every position.

    Args:
        encoder: its taps, finest first; the paper's are layer1, layer2 and layer3 of a ResNet.
        channels: d; None takes CHANNELS.
        seed: of the draw of channels.
    """

    def __init__(self, encoder: Encoder, channels: int | None = None, seed: int = 0) -> None:
        total = sum(encoder.channels)
        channels = default_channels(encoder.name, total) if channels is None else channels
        if not 0 < channels <= total:
            raise ValueError(f"channels is from 1 to {total}, which the encoder's taps have together, got {channels}")
        self.encoder = encoder
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        self.selected = order[:channels].to(self.device)
        self.mean = torch.empty(0, device=self.device)  # (P, d)
        self.whitening = torch.empty(0, device=self.device)  # (P, d, d): the inverse of Sigma's Cholesky factor

    @property
    def device(self) -> torch.device:
        return self.encoder.mean.device

    @property
    def memory_bytes(self) -> int:
        """Of all that is kept between images, without the encoder."""
        return tensor_bytes([self.selected, self.mean, self.whitening])

    @property
    def model_bytes(self) -> int:
        return self.memory_bytes + encoder_bytes(self.encoder)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in [0, 1], to embeddings (B, d, h, w)."""
        return pyramid(encode(self.encoder, images)).index_select(1, self.selected)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> PaDiM:
        """Learn from batches (B, 3, H, W) of at least two good images of one size.

        Embeddings are kept until all are seen, then positions are taken in chunks, in float64.
        """
        embeddings: list[Tensor] = []
        for images in batches:
            embedding = self.embed(images).flatten(2).permute(2, 0, 1).contiguous()  # (P, B, d)
            if not embeddings:
                positions, _, d = embedding.shape
                require_memory("PaDiM", 4 * positions * d * (d + 1), self.device)
            embeddings.append(embedding)
        count = sum(embedding.shape[1] for embedding in embeddings)
        if count < 2:
            raise DataError(f"PaDiM learns from at least 2 images, got {count}: add good images")
        self.mean = torch.empty(positions, d, device=self.device)
        self.whitening = torch.empty(positions, d, d, device=self.device)
        for chunk in _chunks(positions, 8 * (3 * d * d + count * d)):
            mean, whitening = gaussians(torch.cat([embedding[chunk] for embedding in embeddings], 1).double())
            self.mean[chunk], self.whitening[chunk] = mean, whitening
        return self

    @torch.no_grad()
    def distances(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), of the size fitted, to Mahalanobis distances (B, h, w)."""
        embedding = self.embed(images)
        batch, d, height, width = embedding.shape
        if height * width != len(self.mean):
            raise ValueError(f"PaDiM was fitted at {len(self.mean)} positions, these images have {height * width}")
        centred = embedding.flatten(2).permute(2, 1, 0) - self.mean.unsqueeze(2)  # (P, d, B)
        result = torch.empty(len(self.mean), batch, device=self.device)
        for chunk in _chunks(len(self.mean), 4 * d * batch):
            result[chunk] = torch.bmm(self.whitening[chunk], centred[chunk]).norm(dim=1)
        return result.t().reshape(batch, height, width)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, H, W): distances upsampled and smoothed."""
        return anomaly_maps(self.distances(images), (images.shape[2], images.shape[3]))


def gaussians(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (P, N, d) to each position's mean (P, d) and the W with ||W (x - mu)|| the Mahalanobis distance."""
    mean = embeddings.mean(1)
    centred = embeddings - mean.unsqueeze(1)
    covariance = centred.transpose(1, 2) @ centred / (embeddings.shape[1] - 1)
    covariance.diagonal(dim1=1, dim2=2).add_(REGULARISATION)
    factor = torch.linalg.cholesky(covariance)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    return mean, torch.linalg.solve_triangular(factor, identity, upper=False)


def default_channels(encoder: str, total: int) -> int:
    """d for a timm encoder whose taps have `total` channels together."""
    return min(total, CHANNELS.get(encoder.partition(".")[0], max(1, round(total * 550 / 1792))))


def counted_bytes(channels: int, positions: int) -> int:
    """Of means and inverse covariances in float32, the encoder not among them."""
    return 4 * positions * channels * (channels + 1)


def counted_flop(channels: int, positions: int) -> float:
    """Of one image's Mahalanobis distances, the encoder not among them."""
    return 2.0 * positions * channels * channels


def _chunks(count: int, bytes_each: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // bytes_each)
    return [slice(start, start + step) for start in range(0, count, step)]
