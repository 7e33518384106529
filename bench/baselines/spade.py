"""SPADE (Cohen and Hoshen 2020, arXiv 2005.02357): sub-image anomaly detection with deep pyramid correspondences.

An image is compared with the K = 50 good images whose last features, averaged over the image, lie nearest to its own
(their mean squared distance is the paper's image score). A position's distance is that from its pyramid of features to
the nearest position in any of these K images, wherever in them. The map of distances is upsampled and smoothed.
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

NEIGHBOURS = 50
PYRAMID_SCALES = 3
BLOCK_BYTES = 64 * 2**20
"""Memory of a block of distances between positions."""


class SPADE:
    """A gallery of good images' features.

    Args:
        encoder: its taps, finest first. The first three make the pyramid (the paper's: layer1, layer2 and layer3 of a
            ResNet), the last one is averaged to find the neighbours (the paper's: layer4).
        neighbours: K; all good images where there are fewer.

    The gallery keeps every map at its own resolution: positions are repeated only when they are compared.
    """

    def __init__(self, encoder: Encoder, neighbours: int = NEIGHBOURS) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours is at least 1, got {neighbours}")
        self.encoder, self.neighbours = encoder, neighbours
        self.pooled = torch.empty(0, device=self.device)  # (N, D_last)
        self.gallery: list[list[Tensor]] = []  # of each image, its maps (D_k, H_k, W_k)

    @property
    def device(self) -> torch.device:
        return self.encoder.mean.device

    @property
    def memory_bytes(self) -> int:
        """Of all that is kept between images, without the encoder."""
        return tensor_bytes([self.pooled, *(scale for maps in self.gallery for scale in maps)])

    @property
    def model_bytes(self) -> int:
        return self.memory_bytes + encoder_bytes(self.encoder)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> SPADE:
        """Keep the features of batches (B, 3, H, W) of good images of one size."""
        pooled: list[Tensor] = []
        self.gallery = []
        for images in batches:
            features = encode(self.encoder, images)
            pooled.append(_pool(features[-1]))
            scales = features[:PYRAMID_SCALES]
            require_memory("SPADE's gallery", tensor_bytes(scales), self.device)
            self.gallery += [[scale[i].clone() for scale in scales] for i in range(len(images))]
        if not pooled:
            raise DataError("SPADE learns from at least 1 image, got 0: add good images")
        self.pooled = torch.cat(pooled)
        return self

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), of the size fitted, to anomaly maps (B, H, W) and the paper's image scores (B,)."""
        features = encode(self.encoder, images)
        distances, nearest = self._neighbours(_pool(features[-1]))
        rows = pyramid(features[:PYRAMID_SCALES]).permute(0, 2, 3, 1)
        if rows.shape[1:3] != self.gallery[0][0].shape[1:]:
            raise ValueError(
                f"SPADE was fitted at {tuple(self.gallery[0][0].shape[1:])} positions, "
                f"these images have {tuple(rows.shape[1:3])}"
            )
        one_by_one = [self._distances(row, indices) for row, indices in zip(rows, nearest.tolist(), strict=True)]
        size = (images.shape[2], images.shape[3])
        return anomaly_maps(torch.stack(one_by_one), size), distances.square().mean(1)

    def anomaly_map(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, H, W): distances upsampled and smoothed."""
        return self.predict(images)[0]

    def _neighbours(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Distances and indices of each image's nearest good images, (B, K) each."""
        if not self.gallery:
            raise DataError("SPADE has no gallery: fit it first")
        distances = torch.cdist(pooled, self.pooled, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(min(self.neighbours, len(self.pooled)), largest=False)
        return nearest.values, nearest.indices

    def _distances(self, queries: Tensor, indices: list[int]) -> Tensor:
        """Positions' features (h, w, D) to their distances from the nearest position of these images, (h, w)."""
        rows = queries.flatten(0, 1)
        squares = rows.square().sum(1, keepdim=True)
        least = torch.full((len(rows),), torch.inf, device=self.device)
        step = max(1, BLOCK_BYTES // (4 * len(rows)))
        for index in indices:
            keys = pyramid([scale.unsqueeze(0) for scale in self.gallery[index]])[0].flatten(1)  # (D, positions)
            key_squares = keys.square().sum(0)
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                block = torch.addmm(key_squares, rows[part], keys, alpha=-2)
                torch.minimum(least[part], block.amin(1), out=least[part])
        return (squares[:, 0] + least).clamp_(min=0).sqrt_().view(queries.shape[:2])


def counted_bytes(channels: list[int], positions: list[int], images: int) -> int:
    """Of the pyramids of so many good images in float32, the encoder not among them; positions of each scale."""
    return 4 * images * sum(d * p for d, p in zip(channels, positions, strict=True))


def counted_flop(channels: list[int], positions: list[int], neighbours: int = NEIGHBOURS) -> float:
    """Of one image's distances to every position of its neighbours, the encoder not among them."""
    return 2.0 * neighbours * positions[0] ** 2 * sum(channels)


def _pool(features: Tensor) -> Tensor:
    return features.mean((2, 3))
