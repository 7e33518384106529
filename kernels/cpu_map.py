"""The anomaly map by compiled code on a CPU, `cpu/map.h`: the counterpart of `anomaly_map` where maxima are given."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cflow_fast.kernels.cpu_library import Address, Library, fields


class _Scale(ctypes.Structure):
    """`map_scale` of map.h."""

    _fields_ = (("log_prob", Address), *fields(ctypes.c_int64, "height width"), ("maximum", ctypes.c_float))


class _Map(ctypes.Structure):
    """`map_task` of map.h."""

    _fields_ = (
        ("scales", ctypes.POINTER(_Scale)),
        *fields(ctypes.c_int64, "count batch height width"),
        *fields(Address, "result score memory"),
        ("threads", ctypes.c_int64),
    )


def anomaly_map(
    log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float], lib: Library
) -> tuple[Tensor, Tensor]:
    """As anomaly_map.anomaly_map: [(B, H_k, W_k), ...] float32 to the map (B, H, W) and the score (B,)."""
    contiguous = [log_prob.contiguous() for log_prob in log_probs]
    batch, (height, width) = len(contiguous[0]), size
    result, score = torch.empty(batch, height, width), torch.empty(batch)
    scales = (_Scale * len(contiguous))()
    for scale, log_prob, maximum in zip(scales, contiguous, maxima, strict=True):
        scale.log_prob, scale.maximum = log_prob.data_ptr(), maximum
        scale.height, scale.width = log_prob.shape[1:]
    task = _Map(
        scales=scales,
        count=len(scales),
        batch=batch,
        height=height,
        width=width,
        result=result.data_ptr(),
        score=score.data_ptr(),
        threads=torch.get_num_threads(),
    )
    lib.run("map", task)
    return result, score
