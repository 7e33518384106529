"""The dispatcher: picks the implementation of an operation by the tensors' device. Nothing else in the library does.

Triton's kernels run on NVIDIA cards of compute capability 8.0 and newer, compiled code for decoders on x86 CPUs with
AVX2, PyTorch everywhere else. `CFLOW_FAST_BACKEND=torch` or `triton` forces one; a forced backend that cannot run here
is an error, never a silent fallback.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from cflow_fast.kernels import cpu_map, registration
from cflow_fast.kernels.anomaly_map import anomaly_map as _torch_anomaly_map
from cflow_fast.kernels.cpu_flow import CpuFlow
from cflow_fast.kernels.cpu_library import Library, library
from cflow_fast.kernels.registration import Flow
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.weights import NARROW, FlowWeights
from cflow_fast.precision import Arithmetic, cpu_has

BACKENDS = ("torch", "triton")

OLDEST_CAPABILITY = (8, 0)
OLDEST_TRITON = (3, 6)

KERNEL_PRECISIONS = {"fp32": "ieee"} | {name: name for name in ("tf32x3", "fp16x3", "tf32", "fp16", "bf16")}
"""The library's words for what is multiplied in, and the kernels'."""


def backend(device: torch.device) -> str:
    """The backend that operations on this device run on.

    Raises RuntimeError when one is forced that cannot run here. A card that Triton's kernels cannot run on is said
    once, by a warning.
    """
    forced = os.environ.get("CFLOW_FAST_BACKEND", "")
    if forced == "torch" or (not forced and device.type != "cuda"):
        return "torch"
    if forced not in ("", *BACKENDS):
        available = [name for name in BACKENDS if name == "torch" or _triton_obstacle(device) is None]
        raise RuntimeError(f"CFLOW_FAST_BACKEND={forced} cannot run here; available: {', '.join(available)}")
    obstacle = _triton_obstacle(device)
    if obstacle is None:
        return "triton"
    if forced:
        raise RuntimeError(f"CFLOW_FAST_BACKEND=triton cannot run here: {obstacle}")
    _say_once(f"PyTorch computes on {device.type} instead of cflow_fast's Triton kernels: {obstacle}")
    return "torch"


def prepare_flow(weights: FlowWeights, arithmetic: Arithmetic) -> Flow:
    """Make a folded decoder ready to run on its device; the result has `log_prob_map` and `rows`.

    Where Triton can run and is not forced, the tuning table has the last word (`tuned_flow`).
    """
    if backend(weights.device) == "triton" and weights.state_dtype == torch.float32:
        precision = KERNEL_PRECISIONS[arithmetic.precision]
        if os.environ.get("CFLOW_FAST_BACKEND"):
            from cflow_fast.kernels.triton_flow import TritonFlow

            return TritonFlow(weights, precision)
        from cflow_fast.kernels.tuned_flow import TunedFlow

        return TunedFlow(weights, precision, arithmetic.operands)
    compiled = _compiled_for_cpu(weights, arithmetic)
    if compiled is not None:
        return CpuFlow(weights, compiled)
    return torch_flow(weights, arithmetic)


def torch_flow(weights: FlowWeights, arithmetic: Arithmetic) -> TorchFlow:
    """By PyTorch's operations alone, the fastest that it has for the weights' device."""
    return TorchFlow(weights, arithmetic.operands, packed=_takes_onednn(weights, arithmetic))


def implementation(flow: Flow, rows: int = 1) -> str:
    """What a flow that `prepare_flow` made runs maps of so many positions on: "torch", "triton" or "compiled" code."""
    if isinstance(flow, (TorchFlow, CpuFlow)):
        return "torch" if isinstance(flow, TorchFlow) else "compiled"
    from cflow_fast.kernels.tuned_flow import TunedFlow

    return "torch" if isinstance(flow, TunedFlow) and flow.backend(rows) == "plain" else "triton"


def other_way(flow: Flow, arithmetic: Arithmetic, rows: int = 1) -> tuple[str, Flow] | None:
    """What else could do the work of such a flow, by `implementation`'s names: to be compared with it."""
    if isinstance(flow, CpuFlow):
        return "torch", torch_flow(flow.weights, arithmetic)
    if isinstance(flow, TorchFlow):
        return None
    from cflow_fast.kernels.tuned_flow import TunedFlow

    if not isinstance(flow, TunedFlow):
        return None
    return ("triton", flow.triton) if flow.backend(rows) == "plain" else ("torch", flow.plain())


def anomaly_map(log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float] | None) -> Tensor:
    """See cflow_fast.anomaly_map. Only PyTorch has gradients and precisions other than float32."""
    chosen = backend(log_probs[0].device)
    if any(log_prob.dtype != torch.float32 for log_prob in log_probs):
        chosen = "torch"
    wants_gradients = torch.is_grad_enabled() and any(log_prob.requires_grad for log_prob in log_probs)
    if wants_gradients or (chosen == "torch" and not torch.compiler.is_compiling()):
        return _eager_anomaly_map(log_probs, size, maxima, compiled=not wants_gradients)
    return registration.anomaly_map(log_probs, size, maxima, chosen)[0]


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device; None where they can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "they are written for NVIDIA's cards"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            name, needed = torch.cuda.get_device_name(device), ".".join(map(str, OLDEST_CAPABILITY))
            return f"{name} has compute capability {'.'.join(map(str, capability))}, they need {needed}"
        return None
    if device.type == "cpu":
        return None if triton.knobs.runtime.interpret else "on a CPU they run only interpreted, with TRITON_INTERPRET=1"
    return f"they do not run on {device.type}"


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _eager_anomaly_map(
    log_probs: Sequence[Tensor], size: tuple[int, int], maxima: Sequence[float] | None, compiled: bool
) -> Tensor:
    first = log_probs[0]
    usable = compiled and maxima is not None and first.device.type == "cpu" and not _is_forced()
    if usable and all(log_prob.dtype == torch.float32 for log_prob in log_probs):
        code = library(torch.float32)
        if code is not None:
            assert maxima is not None
            return cpu_map.anomaly_map(log_probs, size, maxima, code)[0]
    return _torch_anomaly_map(log_probs, size, maxima)[0]


def _is_forced() -> bool:
    return bool(os.environ.get("CFLOW_FAST_BACKEND"))


def _compiled_for_cpu(weights: FlowWeights, arithmetic: Arithmetic) -> Library | None:
    """None where there is none, or PyTorch was asked for."""
    on_cpu = weights.device.type == "cpu" and weights.state_dtype == torch.float32
    return library(arithmetic.operands) if on_cpu and not _is_forced() else None


def _takes_onednn(weights: FlowWeights, arithmetic: Arithmetic) -> bool:
    """Whether packed oneDNN products are taken: where they are faster, but not for a narrow decoder in float32.

    oneDNN adds up each of its sums in one go, and far from what such a decoder was trained on that costs digits which
    the 5 to 15% that it gains there are not worth.
    """
    narrow = arithmetic.operands == torch.float32 and weights.features < NARROW
    return onednn_is_faster(weights.device, arithmetic.operands) and not narrow


def onednn_is_faster(device: torch.device, operands: torch.dtype) -> bool:
    """Packed oneDNN products against plain ones: by what the CPU reports (measured by `cflow_fast.bench`)."""
    return (
        device.type == "cpu"
        and operands in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and cpu_has("avx512")
    )
