"""The bookkeeping of streams and graphs, on a recorded stand-in for a card: order of waits, bounds, copies, threads."""

from __future__ import annotations

import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from cflow_fast.kernels import capture
from cflow_fast.kernels.capture import GraphCache, side_by_side

CARD = torch.device("cuda", 0)


@dataclass
class Card:
    """What was queued, in order: (stream, action)."""

    log: list[tuple[str, str]] = field(default_factory=list)
    current: list[Stream] = field(default_factory=list)
    streams: int = 0
    capturing: bool = False
    refuses_capture: bool = False

    def stream(self, name: str | None = None) -> Stream:
        self.streams += 1
        return Stream(self, name or f"side {self.streams}")


@dataclass(eq=False)
class Stream:
    card: Card
    name: str

    def record_event(self, event: Event | None = None) -> Event:
        self.card.log.append((self.name, "record"))
        event = event or Event(self.card, self.name)
        event.recorded_on = self.name
        return event

    def wait_event(self, event: Event) -> None:
        self.card.log.append((self.name, f"wait for {event.recorded_on}"))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


@dataclass
class Event:
    card: Card
    recorded_on: str

    def synchronize(self) -> None:
        self.card.log.append(("host", f"synchronize with {self.recorded_on}"))


class OnCard:
    """A tensor that claims to lie on a card; its values are a CPU tensor's."""

    device = CARD

    def __init__(self, card: Card, values: torch.Tensor) -> None:
        self.card, self.values = card, values
        self.dtype, self.shape = values.dtype, values.shape
        self.used_on: list[str] = []

    def stride(self) -> tuple[int, ...]:
        return self.values.stride()

    def clone(self, memory_format: Any = None) -> OnCard:
        return OnCard(self.card, self.values.clone())

    def copy_(self, other: OnCard) -> None:
        copy_all((self,), (other,))

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream.name)


def copy_all(places: tuple[OnCard, ...], tensors: tuple[OnCard, ...]) -> None:
    card = places[0].card
    card.log.append((card.current[-1].name, "copy"))
    for place, tensor in zip(places, tensors, strict=True):
        place.values.copy_(tensor.values)


class FakeGraph:
    """Replays by calling the function again and writing into the captured outputs."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def replay(self) -> None:
        self.card.log.append((self.card.current[-1].name, "replay"))
        self.rerun()

    def rerun(self) -> None:
        raise NotImplementedError


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    card.current.append(card.stream("caller's"))
    card.streams = 0

    @contextmanager
    def on(stream: Stream) -> Any:
        before = len(card.current)
        card.current.append(stream)
        try:
            yield
        finally:
            del card.current[before:]

    @contextmanager
    def record(graph: FakeGraph, stream: Stream, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        if card.refuses_capture:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        card.capturing = True
        card.current.append(stream)
        yield
        card.current.pop()
        card.capturing = False

    @contextmanager
    def on_device(device: torch.device) -> Any:
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: card.current[-1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: card.stream())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(card))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    monkeypatch.setattr(torch, "_foreach_copy_", copy_all)
    monkeypatch.setattr(torch, "empty_like", OnCard.clone)
    monkeypatch.setattr(capture, "_release_workspaces", lambda: card.log.append(("host", "release workspaces")))
    monkeypatch.setattr(capture, "_stream_pool", {})
    monkeypatch.setattr(capture, "_last_replay", {})
    return card


def doubling(card: Card) -> Any:
    """x to 2 x, replayable: a captured graph keeps its places of input and output."""

    def double(x: OnCard) -> tuple[OnCard]:
        card.log.append((card.current[-1].name, "capture" if card.capturing else "run"))
        return (OnCard(card, 2 * x.values),)

    return double


@pytest.fixture
def cache(card: Card, monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    cache = GraphCache(doubling(card), capacity=2)
    captured = cache._captured

    def captured_replayable(inputs: Any) -> Any:
        graph: Any = captured(inputs)
        if graph is not None:
            graph.graph.rerun = lambda: graph.outputs[0].values.copy_(2 * graph.inputs[0].values)
        return graph

    monkeypatch.setattr(cache, "_captured", captured_replayable)
    return cache


def on_card(card: Card, *shape: int, value: float = 1.0) -> Any:
    return OnCard(card, torch.full(shape, value))


def test_every_side_stream_waits_for_the_caller_and_the_caller_for_every_side_stream(card: Card) -> None:
    results = [on_card(card, 1), on_card(card, 1)]

    def call(result: Any) -> Any:
        card.log.append((card.current[-1].name, "run"))
        return result

    assert side_by_side([lambda r=r: call(r) for r in results], CARD) == results
    assert card.log[0] == ("caller's", "record")
    for name in ("side 1", "side 2"):
        own = [action for stream, action in card.log if stream == name]
        assert own == ["wait for caller's", "run", "record"]
        assert ("caller's", f"wait for {name}") in card.log
    assert all(result.used_on == ["caller's"] for result in results)


def test_a_side_stream_that_is_the_current_one_holds_up_no_other(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's streams are few and handed out in turn: nothing is waited for before everything is queued."""
    current = card.current[-1]
    monkeypatch.setattr(capture, "_streams", lambda device, count: [card.stream(), current])

    def call(result: Any) -> Any:
        card.log.append((card.current[-1].name, "run"))
        return result

    side_by_side([lambda: call(on_card(card, 1)), lambda: call(on_card(card, 1))], CARD)
    assert card.log.index(("caller's", "run")) < card.log.index(("caller's", "wait for side 1"))


def test_streams_are_made_once(card: Card, cache: GraphCache) -> None:
    for size in (1, 2, 3):
        cache(on_card(card, size))
        side_by_side([lambda: on_card(card, 1), lambda: on_card(card, 1)], CARD)
    assert card.streams == 3  # two beside each other, one to capture on


def test_calls_on_a_cpu_run_in_order() -> None:
    assert side_by_side([lambda: torch.tensor(1), lambda: torch.tensor(2)], torch.device("cpu")) == [1, 2]


def test_a_layout_is_captured_once_and_replayed_with_new_values(card: Card, cache: GraphCache) -> None:
    for value in (1.0, 5.0):
        (result,) = cache(on_card(card, 3, value=value))
        assert result.values.tolist() == [2 * value] * 3
    actions = [action for _, action in card.log]
    assert actions.count("run") == capture.WARM_UP_CALLS
    assert actions.count("capture") == 1
    assert actions.count("replay") == 2


def test_a_capture_shares_no_librarys_workspace_with_what_comes_before_or_after(card: Card, cache: GraphCache) -> None:
    cache(on_card(card, 3))
    order = [action for _, action in card.log if action in ("run", "capture", "replay", "release workspaces")]
    assert order == [*["run"] * capture.WARM_UP_CALLS, "release workspaces", "capture", "release workspaces", "replay"]


def test_several_inputs_and_results_are_copied_in_one_call_each(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda places, tensors: copied.append(len(places)))
    capture._copy((on_card(card, 1),), (on_card(card, 1),))
    capture._copy((on_card(card, 1),) * 3, (on_card(card, 1),) * 3)
    assert copied == [3]


def test_results_are_copies_that_the_next_replay_leaves_alone(card: Card, cache: GraphCache) -> None:
    (first,) = cache(on_card(card, 2, value=1.0))
    cache(on_card(card, 2, value=7.0))
    assert first.values.tolist() == [2.0, 2.0]


def test_nothing_is_warmed_up_or_captured_on_the_callers_stream(card: Card, cache: GraphCache) -> None:
    cache(on_card(card, 3))
    assert all(stream != "caller's" for stream, action in card.log if action in ("run", "capture"))


def test_a_replay_waits_for_the_last_one_wherever_it_was_queued(card: Card, cache: GraphCache) -> None:
    cache(on_card(card, 3))
    other = card.stream("another thread's")
    card.current.append(other)
    start = len(card.log)
    cache(on_card(card, 3))
    card.current.pop()
    assert card.log[start:] == [
        ("another thread's", "wait for caller's"),
        ("another thread's", "copy"),
        ("another thread's", "replay"),
        ("another thread's", "copy"),
        ("another thread's", "record"),
    ]


@pytest.mark.parametrize("change", ["shape", "stride", "dtype"])
def test_another_layout_gets_its_own_graph(card: Card, cache: GraphCache, change: str) -> None:
    x = torch.ones(2, 3)
    y = {"shape": torch.ones(3, 2), "stride": torch.ones(3, 2).t(), "dtype": torch.ones(2, 3, dtype=torch.float64)}
    cache(OnCard(card, x))  # type: ignore[arg-type]
    cache(OnCard(card, y[change]))  # type: ignore[arg-type]
    assert len(cache._graphs) == 2


def test_the_graph_unused_for_longest_is_dropped_after_the_card_has_finished_with_it(
    card: Card, cache: GraphCache
) -> None:
    for size in (1, 2, 1, 3):
        cache(on_card(card, size))
    kept = [key[0][2] for key in cache._graphs]  # type: ignore[index]
    assert kept == [(1,), (3,)]
    assert ("host", "synchronize with caller's") in card.log


def count(card: Card, action: str) -> int:
    return [done for _, done in card.log].count(action)


def test_a_patient_cache_captures_what_comes_again_and_drops_nothing(card: Card, cache: GraphCache) -> None:
    cache.patient = True
    for size in (1, 2, 3):
        (result,) = cache(on_card(card, size, value=3.0))
        assert result.values.tolist() == [6.0] * size
    assert (count(card, "run"), count(card, "capture")) == (3, 0)
    for size in (1, 2, 3, 3):  # two find room
        cache(on_card(card, size))
    assert (count(card, "capture"), count(card, "replay")) == (2, 2)
    cache(on_card(card, 1))
    assert (count(card, "capture"), count(card, "replay")) == (2, 3)
    cache.clear()
    cache(on_card(card, 3))
    cache(on_card(card, 3))
    assert count(card, "capture") == 3


def test_a_patient_cache_remembers_no_more_than_it_may(
    card: Card, cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "REMEMBERED", 2)
    cache.patient = True
    for size in (1, 2, 3, 1, 2, 3):
        cache(on_card(card, size))
    assert count(card, "capture") == 0
    assert len(cache._seen) <= 2


def test_while_a_function_warms_up_what_it_calls_makes_no_graphs(card: Card, cache: GraphCache) -> None:
    outer = GraphCache(lambda x: cache(x))
    with pytest.raises(NotImplementedError):  # the outer one's graph cannot be replayed here
        outer(on_card(card, 3))
    assert not cache._graphs
    assert (count(card, "run"), count(card, "capture")) == (capture.WARM_UP_CALLS, 1)
    cache(on_card(card, 3))
    assert len(cache._graphs) == 1


def test_where_capturing_fails_the_function_runs_as_it_is_and_says_so_once(card: Card, cache: GraphCache) -> None:
    card.refuses_capture = True
    with pytest.warns(UserWarning, match="running without one: operation not permitted when stream is capturing$"):
        (result,) = cache(on_card(card, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = cache(on_card(card, 2))
    assert result.values.tolist() == again.values.tolist() == [2.0, 2.0]
    assert [stream for stream, action in card.log if action == "run"].count("caller's") == 2


def test_a_capture_that_failed_is_tried_again_but_not_for_ever(card: Card, cache: GraphCache) -> None:
    card.refuses_capture = True
    with pytest.warns(UserWarning, match="running without one"):
        cache(on_card(card, 2))
    card.refuses_capture = False
    cache(on_card(card, 2))
    assert [action for _, action in card.log].count("replay") == 1
    card.refuses_capture = True
    for _ in range(capture.CAPTURE_ATTEMPTS + 2):
        cache(on_card(card, 3))
    card.refuses_capture = False
    cache(on_card(card, 3))
    assert [action for _, action in card.log].count("replay") == 1


def test_failures_before_a_capture_do_not_count_against_the_next_one(card: Card, cache: GraphCache) -> None:
    """Of a layout whose graph was dropped for others, and that comes again."""

    def fail_and_succeed() -> None:
        for size, refused in ((2, capture.CAPTURE_ATTEMPTS - 1), (2, 0), (3, 0), (4, 0), (2, 1)):
            card.refuses_capture = refused > 0
            for _ in range(max(1, refused)):
                cache(on_card(card, size))
        card.refuses_capture = False

    with pytest.warns(UserWarning, match="running without one") as said:
        fail_and_succeed()
    assert len(said) == 1
    before = count(card, "replay")
    cache(on_card(card, 2))
    assert count(card, "replay") == before + 1


def test_a_failed_capture_leaves_the_callers_stream_and_tells_its_cause(
    card: Card, cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.cuda.graph does when the end of a broken capture fails, too."""

    @contextmanager
    def broken(graph: FakeGraph, stream: Stream, capture_error_mode: str) -> Any:
        card.current.append(stream)
        try:
            yield
        finally:
            raise RuntimeError("the capture was broken by a previous error")

    def refused(x: OnCard) -> tuple[OnCard]:
        if card.current[-1].name != "caller's" and len(calls) == capture.WARM_UP_CALLS:
            raise RuntimeError("a copy from pageable memory cannot be captured")
        calls.append(x)
        return (x,)

    calls: list[OnCard] = []
    cache.function = refused  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "graph", broken)
    with pytest.warns(UserWarning, match="running without one: a copy from pageable memory cannot be captured"):
        cache(on_card(card, 2))
    assert card.current[-1].name == "caller's"


def test_a_graph_made_in_inference_mode_can_be_written_to_outside_of_it(card: Card) -> None:
    with torch.inference_mode():
        graph = capture._Graph(lambda x: (2 * x,), (torch.ones(2),))
    graph.inputs[0].copy_(torch.zeros(2))
    assert not graph.outputs[0].is_inference()


@pytest.mark.parametrize(
    ("mode", "value"),
    [("torch.is_autocast_enabled", True), ("torch.get_float32_matmul_precision", "high")],
    ids=["autocast", "tf32"],
)
def test_modes_that_change_what_an_operation_does_have_graphs_of_their_own(
    mode: str, value: object, card: Card, cache: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(on_card(card, 2))
    monkeypatch.setattr(mode, lambda *device: value)
    cache(on_card(card, 2))
    assert len(cache._graphs) == 2


def test_precisions_set_by_pytorchs_other_way_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    before = torch.backends.cuda.matmul.fp32_precision
    seen = set()
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            seen.add(capture._layout((torch.ones(1),)))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(seen) == 2


def test_captures_of_several_threads_take_turns(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture begins by waiting for the whole card, which breaks one that is under way."""
    under_way, most = 0, 0

    def slow(x: OnCard) -> tuple[OnCard]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.01)
        under_way -= 1
        return (x,)

    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: nullcontext())
    monkeypatch.setattr(capture._Graph, "replay", lambda self, inputs: self.outputs)
    threads = [threading.Thread(target=lambda: made.append(GraphCache(slow)(on_card(card, 2)))) for _ in range(4)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), most) == (4, 1)


def test_replays_of_different_caches_wait_for_each_other(card: Card, cache: GraphCache) -> None:
    """Their graphs may share a library's workspace."""
    cache(on_card(card, 3))
    card.log.clear()
    other = card.stream("another thread's")
    card.current.append(other)
    with pytest.raises(NotImplementedError):  # its graph cannot be replayed here
        GraphCache(doubling(card))(on_card(card, 3))
    card.current.pop()
    own = [action for stream, action in card.log if stream == "another thread's"]
    assert own[-5:] == ["wait for caller's", "record", "wait for another thread's", "copy", "replay"]


def test_a_captured_function_may_use_another_cache_that_other_threads_use(card: Card, cache: GraphCache) -> None:
    """Each takes the locks in the same order, whichever comes first."""
    outer = GraphCache(lambda x: cache(x))

    def work(which: GraphCache) -> None:
        for size in range(1, 12):
            with suppress(NotImplementedError):  # the outer one's graphs cannot be replayed here
                which(on_card(card, size))

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in (outer, cache)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


def test_inside_somebody_elses_capture_the_function_is_recorded_there(card: Card, cache: GraphCache) -> None:
    card.capturing = True
    cache(on_card(card, 2))
    assert card.log == [("caller's", "capture")]
    assert not cache._graphs


def test_threads_get_each_their_own_results(card: Card, cache: GraphCache) -> None:
    results: dict[int, list[float]] = {}

    def work(i: int) -> None:
        for _ in range(50):
            (result,) = cache(on_card(card, 2, value=float(i)))
            results.setdefault(i, []).append(result.values[0].item())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(set(values) == {2.0 * i} for i, values in results.items())


def test_clear_drops_every_graph(card: Card, cache: GraphCache) -> None:
    cache(on_card(card, 2))
    cache.clear()
    assert not cache._graphs


def test_inputs_on_a_cpu_go_to_the_function() -> None:
    cache = GraphCache(lambda x: (x + 1,))
    assert cache(torch.zeros(2))[0].tolist() == [1.0, 1.0]


def test_a_capacity_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is at least 1, got 0"):
        GraphCache(lambda x: (x,), capacity=0)
