"""Every launch of a decoder timed alone on a card, beside what was predicted of it and what bounds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cflow_fast.bench.aot import Kernel, compile_all, compile_key
from cflow_fast.bench.compiled import Compiled
from cflow_fast.bench.contenders import IN_THREE
from cflow_fast.bench.headline import TIMED_ALONE, Headline, headlines
from cflow_fast.bench.measurement import Run, clock
from cflow_fast.bench.peers import first_line
from cflow_fast.bench.prediction import CARDS, Card, predict
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.whole_flow import ARRAYS

CAPABILITY = 90
"""Predictions are counted from machine code for Hopper cards."""
REPEATS, ROUNDS = 40, 7
"""Launches in one captured graph, and how often it is replayed; the median counts."""
COMPILING = 0.3
"""Share of the time that is left for the predictions, which need every kernel's machine code."""
WEIGHTS = {
    "linear_kernel": ("w_ptr", "w_low_ptr"),
    "coupling_kernel": ("w_ptr", "w_low_ptr"),
    "whole_flow_kernel": tuple(f"{name}_ptr" for name in ARRAYS),
}
"""What a kernel reads that belongs to one block, or to one whole decoder."""


@dataclass(frozen=True)
class Timed:
    line: Headline
    launch: Launch
    count: int  # how often the decoder makes it
    seconds: float | str  # or why there are none


Rows = list[dict[str, Any]]


def time_kernels(
    device: torch.device, roofline: dict[str, Any] | None, until: float, keep: Callable[[Rows], None]
) -> str:
    """A Markdown table, "failed" and why before it where a launch did. until: time.monotonic() at which it is done.

    keep: is given the rows for JSON, before there are predictions and with them.
    """
    card = _card(torch.cuda.get_device_name(device), roofline)
    lines = list(headlines(("wide_resnet50_2",), TIMED_ALONE, (256,), (1, 32)))
    now = time.monotonic()
    timed = list(_timed(lines, device, now + (1 - COMPILING) * (until - now)))
    if not timed:
        return "not measured: no time was left"
    keep([_row(each, "not yet", card) for each in timed])
    keys = [compile_key(each.launch, CAPABILITY) for each in timed]
    distinct = {key: Kernel(each.launch, CAPABILITY) for key, each in zip(keys, timed, strict=True)}
    compiled = dict(zip(distinct, compile_all(list(distinct.values()), until=until), strict=True))
    rows = [_row(each, compiled[key], card) for each, key in zip(timed, keys, strict=True)]
    keep(rows)
    wrong = [each.seconds for each in timed if isinstance(each.seconds, str)]
    failures = f"failed: {len(wrong)} of {len(timed)} launches, the first: {wrong[0]}\n\n" if wrong else ""
    return failures + _table(rows)


def _table(rows: Rows) -> str:
    lines = ["| decoder | kernel | us | times | TFLOP/s | of its floor | predicted us | bound |", "|" + " --- |" * 8]
    for row in rows:
        microseconds = row["microseconds"]
        cells = [
            row["decoder"],
            row["kernel"],
            "" if microseconds is None else f"{microseconds:.1f}",
            str(row["count"]),
        ]
        if "why" in row:
            cells += ["", "", "not counted" if microseconds else "not measured", row["why"]]
        else:
            of_floor = row["floor_microseconds"] / microseconds
            cells += [f"{row['tflops']:.0f}", f"{of_floor:.0%}", f"{row['predicted_microseconds']:.1f}", row["bound"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _card(name: str, roofline: dict[str, Any] | None) -> Card:
    """The known card of that name, with the rates that were just measured in the place of stored ones."""
    known = next((card for card in CARDS if card.name in name), CARDS[0])
    if roofline is None:
        return known
    matrix = known.matrix | roofline["matrix"]
    matrix |= {in_three: matrix[product] / 3 for in_three, product in IN_THREE.items()}
    matrix["ieee"] = matrix.pop("fp32")
    l2 = min(roofline["l2_shared"], roofline["l2_own"])
    return replace(known, name=name, matrix=matrix, memory=roofline["copy"], l2=l2)


def _timed(lines: list[Headline], device: torch.device, until: float) -> Iterator[Timed]:
    for line in lines:
        counted: dict[object, list[Launch]] = {}
        for launch in line.launches(Chip.of(device)):
            counted.setdefault((compile_key(launch, CAPABILITY), launch.grid, _numbers(launch)), []).append(launch)
        for same in counted.values():
            if time.monotonic() > until:
                return
            yield Timed(line, same[0], len(same), _seconds_or_reason(same[0], device))


def _seconds_or_reason(launch: Launch, device: torch.device) -> float | str:
    try:
        return launch_seconds(on_device(launch, device), device)
    except Exception as error:  # one bad launch costs its own time alone
        return first_line(error)


def _numbers(launch: Launch) -> tuple[object, ...]:
    return tuple(value for value in launch.args.values() if isinstance(value, (int, float)))


def on_device(launch: Launch, device: torch.device) -> Launch:
    """The same launch with memory behind its meta tensors: small random values, scales of one, permutations, counters
    at zero."""

    def real(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return (
                type(value)(*(real(name, part) for part in value))
                if hasattr(value, "_fields")
                else tuple(real(name, part) for part in value)
            )
        if not isinstance(value, Tensor):
            return value
        memory = _memory(value, device)
        if name.endswith("scale_ptr"):
            memory.fill_(1.0)
        if "index" in name:
            halves = launch.constexprs.get("PASSIVE", 0), launch.constexprs.get("ACTIVE", 0)
            memory.copy_(_permutations(value, halves if value.dim() == 3 else (value.numel(), 0)).view_as(memory))
        return memory

    return Launch(
        launch.kernel,
        launch.grid,
        {name: real(name, value) for name, value in launch.args.items()},
        launch.constexprs,
        launch.options,
    )


def _permutations(index: Tensor, halves: tuple[int, int]) -> Tensor:
    """Every feature once in every block, (K, 2, padded half) as a whole decoder has it; or once in all of `index`."""
    passive, active = halves
    if not active:
        return torch.randperm(passive)
    found = torch.zeros(index.shape, dtype=torch.int64)
    for block in found:
        order = torch.randperm(passive + active)
        block[0, :passive], block[1, :active] = order[:passive], order[passive:]
    return found


def _memory(meta: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same shape, strides and dtype that has a storage of its own."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(meta.shape, meta.stride(), strict=True))
    flat = torch.zeros(max(size, 1), dtype=meta.dtype, device=device)
    if meta.dtype.is_floating_point:
        flat.normal_(0, 0.01)
    return flat.as_strided(meta.shape, meta.stride())


def launch_seconds(launch: Launch, device: torch.device) -> float:
    """Median seconds of one launch among others like it in a captured graph, its weights from memory.

    In a decoder every launch has weights of its own, and a wide one's are more than the L2 cache holds. So the launches
    take turns over as many copies of them, at most one each: a narrow decoder's stay in the cache. What else a launch
    reads was just written in a decoder, and is in the cache here, too.
    """
    launches = with_weights_apart(launch, _l2_bytes(device))

    def run() -> None:
        for i in range(REPEATS):
            launches[i % len(launches)].run()

    replay = captured(run, device)
    seconds_of = clock(device)
    replay()
    return sorted(seconds_of(replay) for _ in range(ROUNDS))[ROUNDS // 2] / REPEATS


def with_weights_apart(launch: Launch, l2_bytes: int) -> list[Launch]:
    """The same launch as often as its weights fill twice an L2 cache of so many bytes, with copies of them each."""
    weights = {
        name: value for name in WEIGHTS.get(launch.kernel.__name__, ()) if (value := launch.args[name]) is not None
    }
    size = sum(value.nbytes for value in weights.values())
    count = min(REPEATS, max(1, math.ceil(2 * l2_bytes / size))) if size else 1
    copies = [{name: value.clone() for name, value in weights.items()} for _ in range(count - 1)]
    return [launch, *(replace(launch, args=launch.args | copy) for copy in copies)]


def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def captured(run: Run, device: torch.device) -> Run:
    """The replay of a CUDA graph in which it runs, after it ran once outside of it."""
    run()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph, stream=stream):
        run()  # a capture that breaks does not always come back to the stream that was current
    return graph.replay


def _row(timed: Timed, code: Compiled | str, card: Card) -> dict[str, Any]:
    """code: a string is why there is no prediction."""
    row: dict[str, Any] = {
        "decoder": f"{timed.line.decoders}, D {timed.line.features}",
        "kernel": Kernel(timed.launch, CAPABILITY).name,
        "count": timed.count,
    }
    if isinstance(timed.seconds, str):
        return row | {"microseconds": None, "why": timed.seconds}
    row["microseconds"] = 1e6 * timed.seconds
    if isinstance(code, str):
        return row | {"why": code}
    prediction = predict(timed.launch, code, card)
    work = prediction.work
    floor = max(work.flop / card.matrix[timed.line.precision], prediction.l2_seconds, prediction.memory_seconds)
    return row | {
        "tflops": work.flop / timed.seconds / 1e12,
        "floor_microseconds": 1e6 * floor,
        "predicted_microseconds": 1e6 * prediction.seconds,
        "bound": prediction.bound,
    }
