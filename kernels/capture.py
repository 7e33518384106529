"""CUDA streams and graphs: everything here that cannot run without a card, and nothing else.

`side_by_side` sends independent calls to streams of their own: one image's coarse scales fill only part of a card.
`GraphCache` records the launches of a function once per layout of its inputs and replays them: at one image the time
between launches is longer than the launches.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Key = tuple[object, ...]

WARM_UP_CALLS = 2
"""The first compiles kernels and lets libraries choose algorithms, the second sees what is then left to allocate."""
CAPTURE_ATTEMPTS = 3
"""Of a layout, before its function runs without a graph for good."""


def side_by_side(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> list[Tensor]:
    """The results of independent calls, in order, each computed on its own stream where the device has streams.

    The caller's current stream waits for all of them, so that the results are used as if it had made them.
    """
    if device.type != "cuda" or len(calls) < 2:
        return [call() for call in calls]
    current = torch.cuda.current_stream(device)
    ready = current.record_event()  # what the calls read was queued before this
    streams, results = _streams(device, len(calls)), []
    for stream, call in zip(streams, calls, strict=True):
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            result = call()
        result.record_stream(current)  # its memory belongs to `stream`: not to be reused there before `current` is done
        results.append(result)
    for stream in streams:  # after all calls: a side stream that happens to be the current one must not wait in between
        current.wait_event(stream.record_event())
    return results


def in_capture(device: torch.device) -> bool:
    """Whether launches on this device are being recorded by the current stream: nothing may be waited for then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class GraphCache:
    """A function of CUDA tensors that is captured once per layout of its inputs and replayed afterwards.

    function: tensors on one device to a tuple of new tensors, with the same launches whatever the values are.
    capacity: how many layouts are kept; the one unused for longest is dropped.

    Safe from several threads and on any stream: a replay is queued on the caller's current stream, results are copies.
    Where capturing fails the function runs as it is, which is said once; it is tried again a few times, since another
    thread may have been in its way. Inputs on a CPU just go to the function, and so does a call inside somebody else's
    capture.
    """

    def __init__(self, function: Function, capacity: int = 8) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is at least 1, got {capacity}")
        self.function = function
        self.capacity = capacity
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._failures: Counter[Key] = Counter()
        self._done: torch.cuda.Event | None = None  # the last replay: graphs share libraries' workspaces
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        device = inputs[0].device
        if device.type != "cuda" or in_capture(device):
            return self.function(*inputs)
        with self._lock, torch.cuda.device(device):  # the current stream is that of the current device
            graph = self._graph(inputs)
            if graph is not None:
                return self._replayed(graph, inputs)
        return self.function(*inputs)

    def clear(self) -> None:
        """Drop every graph and its memory, after the card has finished with it."""
        with self._lock:
            while self._graphs:
                self._drop_oldest()

    def _graph(self, inputs: tuple[Tensor, ...]) -> _Graph | None:
        key = _layout(inputs)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if self._failures[key] >= CAPTURE_ATTEMPTS:
            return None
        while len(self._graphs) >= self.capacity:
            self._drop_oldest()
        graph = self._captured(inputs)
        if graph is None:
            self._failures[key] += 1
        else:
            self._graphs[key] = graph
        return graph

    def _captured(self, inputs: tuple[Tensor, ...]) -> _Graph | None:
        current = torch.cuda.current_stream(inputs[0].device)
        try:
            with torch.cuda.stream(current):  # which a capture that fails does not always come back to
                return _Graph(self.function, inputs)
        except RuntimeError as error:
            if not self._failures:
                cause = error.__context__ or error  # the end of a broken capture fails too, and says less
                reason = str(cause).splitlines()[0]
                warnings.warn(f"no CUDA graph could be captured, running without one: {reason}", stacklevel=5)
            return None

    def _replayed(self, graph: _Graph, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(inputs[0].device)
        for earlier in (self._done, graph.captured):  # they may have been queued on another stream
            if earlier is not None:
                current.wait_event(earlier)
        results = graph.replay(inputs)
        self._done, graph.captured = current.record_event(), None
        return results

    def _drop_oldest(self) -> None:
        _, graph = self._graphs.popitem(last=False)
        for event in (self._done, graph.captured):
            if event is not None:
                event.synchronize()  # a graph that still runs must keep its memory


class _Graph:
    """One captured layout: the inputs' fixed places, the graph, the outputs' fixed places."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        # Tensors made in inference mode could not be written to outside of it.
        with _capturing, torch.inference_mode(False), torch.no_grad():
            self.inputs = tuple(tensor.clone(memory_format=torch.preserve_format) for tensor in inputs)
            device = inputs[0].device
            current, stream = torch.cuda.current_stream(device), _stream(device, "capture", 0)
            stream.wait_stream(current)  # the clones above
            with torch.cuda.stream(stream):  # nothing can be captured on the default stream, nor warmed up for it there
                for _ in range(WARM_UP_CALLS):
                    function(*self.inputs)
            self.graph = torch.cuda.CUDAGraph()
            with _capture(self.graph, stream):
                self.outputs = function(*self.inputs)
            current.wait_stream(stream)
            self.captured: torch.cuda.Event | None = current.record_event()

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for fixed, tensor in zip(self.inputs, inputs, strict=True):
            fixed.copy_(tensor)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


_capturing = threading.RLock()
"""Held while a graph is made: another thread's capture would synchronize with the card in the middle of it."""


def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
    # thread_local: an allocation in another thread must not end this capture
    return torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")


def _layout(tensors: tuple[Tensor, ...]) -> Key:
    """Whatever a graph would do otherwise: tensors in memory, and what the caller's modes make of an operation."""
    modes = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), *_tf32_modes())
    return (*((t.device, t.dtype, t.shape, t.stride()) for t in tensors), modes)


def _tf32_modes() -> tuple[object, ...]:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # which of PyTorch's two ways of asking applies is not told
        return ()


_stream_pool: dict[tuple[torch.device, object, int], torch.cuda.Stream] = {}


def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """The same few streams for all calls of a thread; one thread's capture must not record another's work."""
    return [_stream(device, threading.get_ident(), i) for i in range(count)]


def _stream(device: torch.device, owner: object, number: int) -> torch.cuda.Stream:
    """Made once: PyTorch hands out a few dozen streams in turn, and a fresh one may be one that is in use."""
    key = (device, owner, number)
    if key not in _stream_pool:
        _stream_pool[key] = torch.cuda.Stream(device)
    return _stream_pool[key]
