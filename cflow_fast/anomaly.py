"""The anomaly map: per-scale log-likelihoods, normalised, upsampled to the image and added."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cflow_fast import ops


def anomaly_map(
    log_probs: Sequence[Tensor], size: int | tuple[int, int], log_prob_max: Sequence[float] | None = None
) -> Tensor:
    """Turn log-likelihoods per dimension, log p / D in nats, into an anomaly map: high where an image is unusual.

    Args:
        log_probs: one tensor (B, H_k, W_k) for each of the K scales, natural logarithm, divided by that scale's D.
        size: (H, W) of the map; a single number for a square.
        log_prob_max: a number per scale, the largest value on training data. Then p_k = min(1, exp(l_k - max_k)) and
            the map is K minus the sum of the p_k upsampled, so an image's map depends on that image alone.
            None takes the maxima over what is given, as published: an image's score then changes with its batch.

    Returns (B, H, W) of the inputs' dtype, in [0, K]; bilinear, corners aligned. An image's score is its map's maximum.
    Positions that are not finite become NaN, which reaches no further than the interpolation carries it.
    Raises ValueError for tensors that do not belong together, TypeError for integer or complex ones.
    """
    if not log_probs:
        raise ValueError("expected at least one scale of log-likelihoods, got none")
    for scale, log_prob in enumerate(log_probs):
        if not log_prob.is_floating_point():
            raise TypeError(f"log-likelihoods are floating point, scale {scale} is {log_prob.dtype}")
        if log_prob.dim() != 3 or log_prob.shape[0] != log_probs[0].shape[0]:
            raise ValueError(
                f"expected log-likelihoods of shape (B, H, W) with one B, scale {scale} has {tuple(log_prob.shape)}"
            )
        if 0 in log_prob.shape[1:]:
            raise ValueError(f"scale {scale} has no positions: {tuple(log_prob.shape)}")
    if log_prob_max is not None and len(log_prob_max) != len(log_probs):
        raise ValueError(f"expected {len(log_probs)} maxima, one per scale, got {len(log_prob_max)}")
    if log_prob_max is not None and not all(math.isfinite(maximum) for maximum in log_prob_max):
        raise ValueError(f"log_prob_max holds finite numbers, got {list(log_prob_max)}")
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"the map's size is positive, got {(height, width)}")
    if log_probs[0].shape[0] == 0:
        return torch.empty(0, height, width, dtype=log_probs[0].dtype, device=log_probs[0].device)
    return ops.anomaly_map(log_probs, (height, width), log_prob_max)
