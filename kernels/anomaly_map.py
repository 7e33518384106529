"""From per-scale log-likelihoods to the anomaly map, in plain PyTorch.

p_k  = exp(l_k - m_k)                          l_k: log-likelihood per dimension at scale k, m_k: its maximum
map  = M - sum_k bilinear(p_k)                 corners aligned; M: what the sum can be at most
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def anomaly_map(log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float] | None) -> Tensor:
    """[(B, H_k, W_k), ...] to (B, H, W).

    maxima given: p is capped at 1 and M is the number of scales, so an image's map depends on that image alone.
    maxima None: each scale's maximum over all that is given, and M the maximum of the resulting sum (the published
    normalisation). Positions that are not finite become NaN and are left out of every maximum.
    """
    total = torch.zeros(())
    for scale, log_prob in enumerate(log_probs):
        peak = _finite_max(log_prob) if maxima is None else maxima[scale]
        probability = torch.exp(log_prob - peak).masked_fill_(~log_prob.isfinite(), torch.nan)
        if maxima is not None:
            probability = probability.clamp(max=1.0)
        upsampled = F.interpolate(probability.unsqueeze(1), size=size, mode="bilinear", align_corners=True).squeeze(1)
        total = upsampled if scale == 0 else total.add_(upsampled)
    return (_finite_max(total) if maxima is None else float(len(log_probs))) - total


def _finite_max(x: Tensor) -> Tensor:
    return x.masked_fill(~x.isfinite(), -torch.inf).amax()
