"""The dispatcher: picks the implementation of an operation by the tensors' device. Nothing else in the library does.

`CFLOW_FAST_BACKEND=torch` or `triton` forces one; a forced backend that cannot run here is an error, never a silent
fallback.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from cflow_fast.kernels.anomaly_map import anomaly_map as _torch_anomaly_map
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.weights import FlowWeights
from cflow_fast.precision import Arithmetic, cpu_has

BACKENDS = ("torch",)
"""Implementations there are. Triton's kernels will add theirs."""


def backend(device: torch.device) -> str:
    """The backend that operations on this device run on."""
    forced = os.environ.get("CFLOW_FAST_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise RuntimeError(f"CFLOW_FAST_BACKEND={forced} cannot run here; available: {', '.join(BACKENDS)}")
    return forced or "torch"


def prepare_flow(weights: FlowWeights, arithmetic: Arithmetic) -> TorchFlow:
    """Make a folded decoder ready to run on its device; the result has `log_prob_map` and `rows`."""
    backend(weights.device)
    return TorchFlow(weights, arithmetic.operands, packed=_onednn_is_faster(weights, arithmetic))


def anomaly_map(log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float] | None) -> Tensor:
    """See cflow_fast.anomaly_map."""
    backend(log_probs[0].device)
    return _torch_anomaly_map(log_probs, size, maxima)


def _onednn_is_faster(weights: FlowWeights, arithmetic: Arithmetic) -> bool:
    """Packed oneDNN products against plain ones: by what the CPU reports (measured by `cflow_fast.bench`)."""
    return (
        weights.device.type == "cpu"
        and arithmetic.operands in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and cpu_has("avx512")
    )
