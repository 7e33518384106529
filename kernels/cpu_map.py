"""The anomaly map by compiled code on a CPU, `cpu/map.h`: the counterpart of `anomaly_map` where maxima are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cflow_fast.kernels.cpu_library import CPU, Library, MapScale, MapTask, check_is_here

PIXELS_A_THREAD = 16384
"""Threads wait for each other once in a map: one takes 40 us for so many, less than another may take to wake."""


def anomaly_map(
    log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float], lib: Library
) -> tuple[Tensor, Tensor]:
    """As anomaly_map.anomaly_map: [(B, H_k, W_k), ...] float32 to the map (B, H, W) and the score (B,)."""
    check_is_here(*log_probs)
    contiguous = [log_prob.contiguous().resolve_neg() for log_prob in log_probs]
    batch, (height, width) = len(contiguous[0]), size
    result, score = (
        torch.empty(shape, dtype=torch.float32, device=CPU) for shape in ((batch, height, width), (batch,))
    )
    scales = (MapScale * len(contiguous))()
    for scale, log_prob, maximum in zip(scales, contiguous, maxima, strict=True):
        scale.log_prob, scale.maximum = log_prob.data_ptr(), maximum
        scale.height, scale.width = log_prob.shape[1:]
    task = MapTask(
        scales=scales,
        count=len(scales),
        batch=batch,
        height=height,
        width=width,
        result=result.data_ptr(),
        score=score.data_ptr(),
        threads=max(1, min(torch.get_num_threads(), batch * height * width // PIXELS_A_THREAD)),
    )
    lib.run("map", task)
    return result, score
