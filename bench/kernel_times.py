"""Every launch of a decoder timed alone on a card, beside what was predicted of it and what bounds it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cflow_fast.bench.aot import Kernel, compile_all, compile_key
from cflow_fast.bench.compiled import Compiled
from cflow_fast.bench.headline import Headline, headlines
from cflow_fast.bench.measurement import Run, clock
from cflow_fast.bench.prediction import CARDS, Card, predict
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch

CAPABILITY = 90
"""Predictions are counted from machine code for Hopper cards."""
REPEATS, ROUNDS = 40, 7
"""Launches in one captured graph, and how often it is replayed; the median counts."""


@dataclass(frozen=True)
class Timed:
    line: Headline
    launch: Launch
    count: int  # how often the decoder makes it
    seconds: float


def time_kernels(
    device: torch.device, roofline: dict[str, Any] | None, until: float
) -> tuple[list[dict[str, Any]], str]:
    """Rows for JSON and a Markdown table. Until: time.monotonic() at which it stops with what it has."""
    card = _card(torch.cuda.get_device_name(device), roofline)
    lines = list(headlines(("wide_resnet50_2",), ("bf16", "tf32", "ieee"), (256,), (1, 32)))
    timed = list(_timed(lines, device, until))
    keys = [compile_key(each.launch, CAPABILITY) for each in timed]
    distinct = {key: Kernel(each.launch, CAPABILITY) for key, each in zip(keys, timed, strict=True)}
    compiled = dict(zip(distinct, compile_all(list(distinct.values())), strict=True))
    rows = [_row(each, compiled[key], card) for each, key in zip(timed, keys, strict=True)]
    return rows, _table(rows)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| decoder | kernel | us | times | TFLOP/s | of its floor | predicted us | bound |", "|" + " --- |" * 8]
    for row in rows:
        cells = [row["decoder"], row["kernel"], f"{row['microseconds']:.1f}", str(row["count"])]
        if "why" in row:
            cells += ["", "", "not counted", row["why"]]
        else:
            of_floor = row["floor_microseconds"] / row["microseconds"]
            cells += [f"{row['tflops']:.0f}", f"{of_floor:.0%}", f"{row['predicted_microseconds']:.1f}", row["bound"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _card(name: str, roofline: dict[str, Any] | None) -> Card:
    """The known card of that name, with the rates that were just measured in the place of stored ones."""
    known = next((card for card in CARDS if card.name in name), CARDS[0])
    if roofline is None:
        return known
    matrix = known.matrix | {"bf16": roofline["matrix"].get("bf16", known.matrix["bf16"])}
    if "tf32" in roofline["matrix"]:
        matrix |= {"tf32": roofline["matrix"]["tf32"], "tf32x3": roofline["matrix"]["tf32"] / 3}
    matrix["ieee"] = roofline["matrix"]["fp32"]
    l2 = min(roofline["l2_shared"], roofline["l2_own"])
    return Card(
        name, known.multiprocessors, known.hertz, matrix, roofline["copy"], l2, known.l2_bytes, known.launch_seconds, ()
    )


def _timed(lines: list[Headline], device: torch.device, until: float) -> Iterator[Timed]:
    for line in lines:
        counted: dict[object, list[Launch]] = {}
        for launch in line.launches(Chip.of(device)):
            counted.setdefault((compile_key(launch, CAPABILITY), launch.grid, _numbers(launch)), []).append(launch)
        for same in counted.values():
            if time.monotonic() > until:
                return
            yield Timed(line, same[0], len(same), launch_seconds(on_device(same[0], device), device))


def _numbers(launch: Launch) -> tuple[object, ...]:
    return tuple(value for value in launch.args.values() if isinstance(value, (int, float)))


def on_device(launch: Launch, device: torch.device) -> Launch:
    """The same launch with memory behind its meta tensors: small random values, permutations, counters at zero."""

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
    """Median seconds of one launch among others like it in a captured graph."""
    replay = captured(launch.run, device, REPEATS)
    seconds_of = clock(device)
    replay()
    return sorted(seconds_of(replay) for _ in range(ROUNDS))[ROUNDS // 2] / REPEATS


def captured(run: Run, device: torch.device, repeats: int = 1) -> Run:
    """The replay of a CUDA graph in which it runs so many times, after it ran once outside of it."""
    run()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            run()
    return graph.replay


def _row(timed: Timed, code: Compiled | str, card: Card) -> dict[str, Any]:
    row: dict[str, Any] = {
        "decoder": f"{timed.line.decoders}, D {timed.line.features}",
        "kernel": Kernel(timed.launch, CAPABILITY).name,
        "count": timed.count,
        "microseconds": 1e6 * timed.seconds,
    }
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
