"""From per-scale log-likelihoods to the anomaly map and the image score, in plain PyTorch.

p_k   = exp(l_k - m_k)                         l_k: log-likelihood per dimension at scale k, m_k: its maximum
map   = M - sum_k bilinear(p_k)                corners aligned; M: what the sum can be at most
score = max map                                over what is finite
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def anomaly_map(
    log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """[(B, H_k, W_k), ...] to the map (B, H, W) and the score (B,).

    maxima given: p is capped at 1 and M is the number of scales, so an image's map depends on that image alone.
    maxima None: each scale's maximum over all that is given, and M the maximum of the resulting sum (the published
    normalisation). Positions that are not finite become NaN and are left out of every maximum; an image without any
    other has the score NaN.
    """
    total = torch.zeros(())
    for scale, log_prob in enumerate(log_probs):
        peak = _finite_max(log_prob) if maxima is None else maxima[scale]
        probability = torch.exp(log_prob - peak).masked_fill(~log_prob.isfinite(), torch.nan)
        if maxima is not None:
            probability = probability.clamp(max=1.0)
        upsampled = F.interpolate(probability.unsqueeze(1), size=size, mode="bilinear", align_corners=True).squeeze(1)
        total = upsampled if scale == 0 else total.add_(upsampled)
    highest = _finite_max(total) if maxima is None else float(len(log_probs))
    result = total.neg_().add_(highest).clamp_(min=0)  # a sum of interpolation weights may round to more than 1
    return result, _score(result)


def _score(result: Tensor) -> Tensor:
    """An image's largest finite value. Masks are made only where there may be something to mask."""
    score = result.amax(dim=(1, 2))
    if result.device.type == "cpu" and not bool(score.isnan().any()):  # on a GPU asking would wait for it
        return score
    score = _finite_max(result, dim=(1, 2))
    return score.masked_fill(score.isinf(), torch.nan)


def _finite_max(x: Tensor, dim: tuple[int, ...] = ()) -> Tensor:
    return x.masked_fill(~x.isfinite(), -torch.inf).amax(dim)
