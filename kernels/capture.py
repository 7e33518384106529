"""CUDA streams and graphs: everything here that cannot run without a card, and nothing else.

`side_by_side` sends independent calls to streams of their own: one image's coarse scales fill only part of a card.
`GraphCache` records the launches of a function once per layout of its inputs and replays them: at one image the time
between launches is longer than the launches.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Key = tuple[object, ...]

WARM_UP_CALLS = 2
"""The first compiles kernels and lets libraries choose algorithms, the second sees what is then left to allocate."""
CAPTURE_ATTEMPTS = 3
"""Of a layout, before its function runs without a graph for good."""
REMEMBERED = 256
"""Layouts that came once, before a patient cache forgets them all."""


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


def finish(device: torch.device) -> None:
    """What is kept for later calls has to be there for those on other streams too."""
    if device.type == "cuda" and not in_capture(device):
        torch.cuda.current_stream(device).synchronize()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class GraphCache:
    """A function of CUDA tensors that is captured once per layout of its inputs and replayed afterwards.

    function: tensors on one device to a tuple of new tensors, with the same launches whatever the values are.
    capacity: how many layouts are kept; the one unused for longest is dropped.
    patient: for calls whose layouts may never come again. One is captured when it comes for the second time, and none
    is dropped: with `capacity` of them there, the function runs as it is for all others.

    Safe from several threads and on any stream: a replay is queued on the caller's current stream, results are copies.
    Where capturing fails the function runs as it is, which is said once; it is tried again a few times, since another
    thread may have been in its way. Inputs on a CPU just go to the function, and so does a call inside somebody else's
    capture, or while another cache warms up its own function.
    """

    def __init__(self, function: Function, capacity: int = 8, patient: bool = False) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is at least 1, got {capacity}")
        self.function = function
        self.capacity, self.patient = capacity, patient
        self._seen: set[Key] = set()
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._failures: Counter[Key] = Counter()
        self._told = False  # that a capture failed
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        device = inputs[0].device
        if device.type != "cuda" or in_capture(device) or _is_warming_up():
            return self.function(*inputs)
        key = _layout(inputs)
        with torch.cuda.device(device):  # the current stream is that of the current device
            results = self._replayed(key, inputs)
            if results is None and self._is_captured_now(key):
                with _capturing:  # before the lock, which a function that is captured may want, too
                    self._capture(key, inputs)
                results = self._replayed(key, inputs)
        return self.function(*inputs) if results is None else results

    def clear(self) -> None:
        """Drop every graph and its memory, after the card has finished with it."""
        with self._lock:
            self._failures.clear()
            self._told = False
            self._seen.clear()
            self._keep_at_most(0)

    def _replayed(self, key: Key, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """None without a graph."""
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                return None
            self._graphs.move_to_end(key)
            return graph.replay(inputs)

    def _is_captured_now(self, key: Key) -> bool:
        """Whether it is time for a layout's graph, which there is none of."""
        with self._lock:
            if self._failures[key] >= CAPTURE_ATTEMPTS:
                return False
            if not self.patient:
                return True
            again = key in self._seen
            if not again:
                if len(self._seen) >= REMEMBERED:
                    self._seen.clear()
                self._seen.add(key)
            return again and len(self._graphs) < self.capacity

    def _capture(self, key: Key, inputs: tuple[Tensor, ...]) -> None:
        if key in self._graphs or (self.patient and len(self._graphs) >= self.capacity):  # another thread was first
            return
        graph = self._captured(inputs)
        with self._lock:
            if graph is None:
                self._failures[key] += 1
                return
            self._failures.pop(key, None)  # it may be dropped and come again
            self._graphs[key] = graph
            self._keep_at_most(self.capacity)

    def _captured(self, inputs: tuple[Tensor, ...]) -> _Graph | None:
        current = torch.cuda.current_stream(inputs[0].device)
        try:
            with torch.cuda.stream(current):  # which a capture that fails does not always come back to
                return _Graph(self.function, inputs)
        except RuntimeError as error:
            if not self._told:
                self._told = True
                warnings.warn(f"no CUDA graph could be captured, running without one: {_reason(error)}", stacklevel=5)
            return None

    def _keep_at_most(self, count: int) -> None:
        while len(self._graphs) > count:
            _, graph = self._graphs.popitem(last=False)
            graph.finish()  # one that still runs must keep its memory


def _reason(error: RuntimeError) -> str:
    """The end of a broken capture fails too, and says less than what broke it."""
    lines = (str(error.__context__ or "") or str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


class _Graph:
    """One captured layout: the inputs' fixed places, the graph, the outputs' fixed places. Made under `_capturing`."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = tuple(tensor.clone(memory_format=torch.preserve_format) for tensor in inputs)
            self.device = device = inputs[0].device
            current, stream = torch.cuda.current_stream(device), _stream(device, "capture", 0)
            stream.wait_stream(current)  # the clones above
            # Nothing can be captured on the default stream, nor warmed up for it there.
            with torch.cuda.stream(stream), _warming_up():
                for _ in range(WARM_UP_CALLS):
                    function(*self.inputs)
            _release_workspaces()
            self.graph = torch.cuda.CUDAGraph()
            with _capture(self.graph, stream):
                self.outputs = function(*self.inputs)
            _release_workspaces()
            current.wait_stream(stream)
            with _replaying:
                _wait_for_the_last(device, current)
                _is_the_last(device, current)  # a first replay on another stream comes after all this

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(self.device)
        with _replaying:
            _wait_for_the_last(self.device, current)
            _copy(self.inputs, inputs)
            self.graph.replay()
            results = tuple(torch.empty_like(output) for output in self.outputs)
            _copy(results, self.outputs)
            _is_the_last(self.device, current)
        return results

    def finish(self) -> None:
        """Wait for its last replay, which no later one of any graph has overtaken."""
        with _replaying:
            last = _last_replay[self.device]
        last.synchronize()


def _copy(places: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
    """All in one call: of one image it is calls that take time."""
    if len(places) == 1:
        places[0].copy_(tensors[0])
    else:
        torch._foreach_copy_(places, tensors)


_capturing = threading.RLock()
"""Held while a graph is made: another thread's capture would synchronize with the card in the middle of it."""
_warm_up = threading.local()
_replaying = threading.Lock()
_last_replay: dict[torch.device, torch.cuda.Event] = {}
"""Of any graph on a device: they run one after the other, and a graph's places are not used twice at once."""


@contextmanager
def _warming_up() -> Iterator[None]:
    """Within it this thread's functions run without graphs of their own, which the one being made has no use for."""
    before, _warm_up.under_way = _is_warming_up(), True
    try:
        yield
    finally:
        _warm_up.under_way = before


def _is_warming_up() -> bool:
    return getattr(_warm_up, "under_way", False)


def _wait_for_the_last(device: torch.device, current: torch.cuda.Stream) -> None:
    last = _last_replay.get(device)
    if last is not None:
        current.wait_event(last)  # it may have been queued on another stream


def _is_the_last(device: torch.device, current: torch.cuda.Stream) -> None:
    """The one event of a device is recorded again: whoever waits for an earlier recording still waits for that."""
    _last_replay[device] = current.record_event(_last_replay.get(device))


def _release_workspaces() -> None:
    """cuBLAS keeps a workspace for each stream. Released before a capture and after it, the captured one lies in the
    graph's own memory, whatever becomes of other graphs: as PyTorch has it where it makes graphs itself.
    """
    torch._C._cuda_clearCublasWorkspaces()


def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
    # thread_local: an allocation in another thread must not end this capture
    return torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")


def _layout(tensors: tuple[Tensor, ...]) -> Key:
    """Whatever a graph would do otherwise: tensors in memory, and what the caller's modes make of an operation."""
    modes = (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        *_tf32_modes(),
    )
    return (*((t.device, t.dtype, t.shape, t.stride()) for t in tensors), modes)


def _tf32_modes() -> tuple[object, ...]:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # they were set by PyTorch's other way
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


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
