"""The operations as torch ops, namespace `cflow_fast`: torch.compile, torch.export and CUDA graphs see through them.

    anomaly_map(Tensor[] log_probs, SymInt[] size, float[]? maxima, str backend) -> (map, score)
    flow_log_prob(Tensor features, Tensor? condition, Tensor[] weights, ..., str precision) -> log_prob
    flow_rows(Tensor z, Tensor? condition, Tensor[] weights, ..., str precision) -> (u, log_det)

A folded decoder goes in as its tensors in the order of `FlowWeights.tensors` and the numbers beside them, no handle:
an exported program carries all it needs. What an implementation makes of them (packed or padded copies, positional
tables) is made on the first call and found again by where the tensors lie; it lives as long as the first of them.
Where nobody traces or transforms operations, the functions below call the implementations themselves.
On a GPU a decoder's calls of many launches become CUDA graphs when they come again, large ones part by part: launches
take the host longer than the card.

None of the ops has gradients. Results never share memory with inputs.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cflow_fast.kernels import anomaly_map as torch_anomaly_map
from cflow_fast.kernels.capture import GraphCache
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.weights import MIXINGS, FlowWeights

LIBRARY = torch.library.Library("cflow_fast", "DEF")
LIBRARY.define("anomaly_map(Tensor[] log_probs, SymInt[] size, float[]? maxima, str backend) -> (Tensor, Tensor)")
_FOLDED = "Tensor[] weights, str mixing, str activation, float clamp, float log_scale, str precision"
_NO_GRAPH_OF_OTHERS = (torch.Tag.cudagraph_unsafe,)
"""What a decoder makes on its first call outlives it, which the graphs that torch.compile makes do not allow."""
LIBRARY.define(f"flow_log_prob(Tensor features, Tensor? condition, {_FOLDED}) -> Tensor", tags=_NO_GRAPH_OF_OTHERS)
LIBRARY.define(f"flow_rows(Tensor z, Tensor? condition, {_FOLDED}) -> (Tensor, Tensor)", tags=_NO_GRAPH_OF_OTHERS)


class Flow(Protocol):
    """A folded decoder made ready to run: `TorchFlow`, `TritonFlow`, or `TunedFlow`, which has both."""

    weights: FlowWeights

    def log_prob_map(self, features: Tensor, encoding: tuple[Tensor, Tensor] | None) -> Tensor: ...

    def rows(self, z: Tensor, condition: Tensor | None, want_u: bool) -> FlowResult: ...

    def launches_often(self, rows: int, own_condition: bool) -> bool:
        """Whether so many rows are many launches of this package's own kernels, which a CUDA graph makes one."""


class FlowDescription(NamedTuple):
    """What describes a folded decoder beside its tensors, in the op's order."""

    mixing: str  # a key of weights.MIXINGS
    activation: str
    clamp: float
    log_scale: float
    precision: str  # the library's word for what is multiplied in


@dataclass
class FlowDispatch:
    """What the library hands in: a way from weights and a precision to a flow, and the positional encoding.

    encoding: condition channels, height, width to the factors over rows (H, C/2) and over columns (W, C/2).
    """

    prepare: Callable[[FlowWeights, str], Flow]
    encoding: Callable[[int, int, int], tuple[Tensor, Tensor]]


_MIXING = "mixing_"

_dispatch: list[FlowDispatch] = []
"""The one in use."""


def use(dispatch: FlowDispatch) -> None:
    _dispatch[:] = [dispatch]


def anomaly_map(
    log_probs: Sequence[Tensor], size: Sequence[int], maxima: Sequence[float] | None, backend: str
) -> tuple[Tensor, Tensor]:
    """[(B, H_k, W_k), ...] to the map (B, H, W) and the score (B,), by "torch" or "triton": see `anomaly_map`."""
    if _nobody_listens(*log_probs):
        return _anomaly_map(log_probs, [int(side) for side in size], maxima, backend)
    return torch.ops.cflow_fast.anomaly_map(log_probs, size, maxima, backend)


def flow_log_prob(
    features: Tensor, condition: Tensor | None, weights: Sequence[Tensor], description: FlowDescription
) -> Tensor:
    """Maps (B, D, H, W) under the positional encoding to (B, H, W), or rows (N, D) under a condition (N, C) to (N,)."""
    if _nobody_listens(features, condition, *weights):
        return _flows.get(weights, description).log_prob(features, condition)
    return torch.ops.cflow_fast.flow_log_prob(features, condition, weights, *description)


def flow_rows(
    z: Tensor, condition: Tensor | None, weights: Sequence[Tensor], description: FlowDescription
) -> tuple[Tensor, Tensor]:
    """Rows (N, D) under a condition (N, C) to u (N, D) and log|det du/dz| (N,)."""
    if _nobody_listens(z, condition, *weights):
        return _flows.get(weights, description).rows(z, condition)
    return torch.ops.cflow_fast.flow_rows(z, condition, weights, *description)


def _nobody_listens(*inputs: Tensor | None) -> bool:
    """Whether nothing would come of asking PyTorch's dispatcher: it takes as long as the launch of a small kernel.

    There is nobody who traces, transforms or profiles operations, and there are no gradients to refuse.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.autograd._profiler_enabled()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(x is None or (type(x) is Tensor and not x.requires_grad) for x in inputs)
    )


def prepared_flow(tensors: Sequence[Tensor], description: FlowDescription) -> Flow:
    """The flow of these weights, made on first use: the one that the ops run."""
    return _flows.get(tensors, description).flow


def _log_prob(flow: Flow, features: Tensor, condition: Tensor | None = None) -> Tensor:
    """What `flow_log_prob` computes, whatever autocast says around it: a folded decoder has its own precision."""
    with without_autocast(features.device):
        if features.dim() == 2:
            return flow.rows(features, condition, want_u=False).log_prob
        channels = flow.weights.condition
        encoding = _dispatch[0].encoding(channels, *features.shape[2:]) if channels else None
        return flow.log_prob_map(features, encoding)


def _rows(flow: Flow, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `flow_rows` computes."""
    with without_autocast(z.device):
        result = flow.rows(z, condition, want_u=True)
    assert result.u is not None
    return result.u.to(result.log_det.dtype).contiguous(), result.log_det


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def as_weights(tensors: Sequence[Tensor], description: FlowDescription) -> FlowWeights:
    """The tensors of `FlowWeights.tensors`, in its order, as what they were."""
    named = dict(zip(_names(len(tensors), description.mixing), tensors, strict=True))
    mixing = {name.removeprefix(_MIXING): named.pop(name) for name in list(named) if name.startswith(_MIXING)}
    return FlowWeights(
        activation=description.activation,
        clamp=description.clamp,
        log_scale=description.log_scale,
        mixing=MIXINGS[description.mixing](**mixing),
        **({"w1_condition": None} | named),  # type: ignore[arg-type]
    )


def _anomaly_map(
    log_probs: Sequence[Tensor], size: Sequence[int], maxima: Sequence[float] | None, backend: str
) -> tuple[Tensor, Tensor]:
    height, width = size
    if not len(log_probs[0]):
        return _fake_anomaly_map(log_probs, size, maxima, backend)
    if backend == "torch":
        return torch_anomaly_map.anomaly_map(log_probs, (height, width), maxima)
    from cflow_fast.kernels import anomaly_tail  # Triton may be missing where it is not used

    return anomaly_tail.anomaly_map(log_probs, (height, width), maxima)


def _fake_anomaly_map(
    log_probs: Sequence[Tensor], size: Sequence[int], maxima: Sequence[float] | None, backend: str
) -> tuple[Tensor, Tensor]:
    batch = log_probs[0].shape[0]
    return log_probs[0].new_empty(batch, *size), log_probs[0].new_empty(batch)


def _flow_log_prob(features: Tensor, condition: Tensor | None, weights: list[Tensor], *described: Any) -> Tensor:
    return _flows.get(weights, FlowDescription(*described)).log_prob(features, condition)


def _fake_flow_log_prob(features: Tensor, condition: Tensor | None, weights: list[Tensor], *described: Any) -> Tensor:
    b1 = weights[_names(len(weights), described[0]).index("b1")]
    positions = (features.shape[0], *features.shape[2:])
    return features.new_empty(positions, dtype=b1.dtype)


def _flow_rows(z: Tensor, condition: Tensor | None, weights: list[Tensor], *described: Any) -> tuple[Tensor, Tensor]:
    return _flows.get(weights, FlowDescription(*described)).rows(z, condition)


def _fake_flow_rows(
    z: Tensor, condition: Tensor | None, weights: list[Tensor], *described: Any
) -> tuple[Tensor, Tensor]:
    log_det = _fake_flow_log_prob(z, condition, weights, *described)
    return log_det.new_empty(z.shape), log_det


def _names(count: int, mixing: str) -> list[str]:
    """The weights' names, in the order of FlowWeights.tensors; `count` tells whether there is a condition."""
    own = ["w1", "w1_condition", "b1", "w2", "b2"]
    others = [f"{_MIXING}{field.name}" for field in fields(MIXINGS[mixing])]
    if count < len(own) + len(others):
        own.remove("w1_condition")
    return own + others


GRAPH_ELEMENTS = 1 << 24
"""Elements of features and conditions that a graph takes at most: 32 images of WideResNet-50's largest scale at 256 px.
Calls of more take one part after another. Launched one by one three decoders took an H200's host 5 to 17 ms, where a
graph of 32 images took 2.4 ms (bench/results). A graph has a workspace of its own, which grows with its part."""
WHOLE_TILES = 128
"""Rows that a part of loose ones is a multiple of."""
GRAPHS = 4
"""Of a decoder's calls of either kind, at most."""
GRAPHS_SWITCH = "CFLOW_FAST_GRAPHS"
"""Environment variable: 0 leaves decoders' calls without graphs of their own. Capturing one waits for the whole card,
which ends a capture that another thread of the process has under way."""


class _Prepared:
    """A flow made ready to run, and what it was made of: a description, and the versions of the weights."""

    def __init__(self, flow: Flow, made_of: tuple[FlowDescription, list[int]]) -> None:
        self.flow, self.made_of = flow, made_of
        self._log_probs = GraphCache(lambda *inputs: (_log_prob(flow, *inputs),), GRAPHS, patient=True)
        self._rows = GraphCache(lambda *inputs: _rows(flow, *inputs), GRAPHS, patient=True)

    def log_prob(self, features: Tensor, condition: Tensor | None) -> Tensor:
        parts = self._parts(features, condition)
        if not parts:
            return _log_prob(self.flow, features, condition)
        return _one_after_another(self._log_probs, parts)[0]

    def rows(self, z: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = self._parts(z, condition)
        if not parts:
            return _rows(self.flow, z, condition)
        u, log_det = _one_after_another(self._rows, parts)
        return u, log_det

    def _parts(self, features: Tensor, condition: Tensor | None) -> list[tuple[Tensor, ...]]:
        """A call's tensors as graphs take them: as many at once as a graph takes, whatever the call, and what is left,
        so that large calls share a layout. None where no graph is taken, or one image is too much for it.
        """
        if features.device.type != "cuda" or not features.numel() or os.environ.get(GRAPHS_SWITCH) == "0":
            return []
        given = [tensor for tensor in (features, condition) if tensor is not None]
        most = most_at_once(sum(tensor.numel() for tensor in given) // len(features), features.dim() == 2)
        if not most:
            return []
        parts = list(zip(*(tensor.split(most) for tensor in given), strict=True))
        rows = parts[0][0].numel() // features.shape[1]
        return parts if self.flow.launches_often(rows, condition is not None) else []


def most_at_once(elements: int, loose: bool) -> int:
    """How many images, or loose rows, of so many elements each a graph takes."""
    most = GRAPH_ELEMENTS // elements
    return most - most % WHOLE_TILES if loose and most > WHOLE_TILES else most


def _one_after_another(function: GraphCache, parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """A function's results for all parts of a call. More than one are written to their place as they come."""
    first = function(*parts[0])
    if len(parts) == 1:
        return first
    count, start = sum(len(part[0]) for part in parts), 0
    results = tuple(result.new_empty(count, *result.shape[1:]) for result in first)
    for part in parts:
        for result, place in zip(function(*part) if start else first, results, strict=True):
            place[start : start + len(result)] = result
        start += len(part[0])
    return results


class _PreparedFlows:
    """Flows by the memory of their weights.

    A flow holds aliases of the tensors, which keep that memory from being used for anything else; it is dropped with
    the caller's own first tensor. Weights that were changed in place since are prepared anew.
    """

    def __init__(self) -> None:
        self._flows: dict[tuple[Any, ...], _Prepared] = {}
        self._lock = threading.Lock()

    def get(self, tensors: Sequence[Tensor], description: FlowDescription) -> _Prepared:
        key = (description.precision, *((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors))
        made_of = (description, [0 if t.is_inference() else t._version for t in tensors])
        found = self._flows.get(key)
        if found is not None and found.made_of == made_of:
            return found
        with self._lock:
            found = self._flows.get(key)
            if found is None or found.made_of != made_of:
                if found is None:
                    weakref.finalize(tensors[0], self._flows.pop, key, None).atexit = False
                weights = as_weights([t.detach() for t in tensors], description)
                found = _Prepared(_dispatch[0].prepare(weights, description.precision), made_of)
                self._flows[key] = found
            return found


_flows = _PreparedFlows()


def _refuse_gradients(name: str, reason: str) -> None:
    def backward(*_: Any) -> Any:
        raise RuntimeError(reason)

    torch.library.register_autograd(f"cflow_fast::{name}", backward, lib=LIBRARY)


for _name, _implementation, _fake, _reason in (
    ("anomaly_map", _anomaly_map, _fake_anomaly_map, "the anomaly map's op has no gradients"),
    ("flow_log_prob", _flow_log_prob, _fake_flow_log_prob, "a folded decoder has no gradients"),
    ("flow_rows", _flow_rows, _fake_flow_rows, "a folded decoder has no gradients"),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cflow_fast::{_name}", _fake, lib=LIBRARY)
    _refuse_gradients(_name, _reason)
