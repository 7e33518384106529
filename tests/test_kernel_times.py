"""Launches timed one by one: what one of them fails with, or its compilation, costs no more than its own row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cflow_fast.bench import aot, kernel_times
from cflow_fast.bench.aot import Kernel, compile_all
from cflow_fast.bench.compiled import Compiled, Loop
from cflow_fast.bench.headline import Headline, tail_launches
from cflow_fast.bench.kernel_times import REPEATS, Rows, launch_seconds, on_device, time_kernels, with_weights_apart
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch

CPU = torch.device("cpu")
CODE = Compiled(128, 65536, 0, 700, (Loop(100, 0, 4, 0, 0),), False)
LINE = Headline("resnet18", 2, 512, "hard", "bf16", 256, 1)
RATES = {"matrix": {"fp32": 5e13, "tf32": 4e14, "bf16": 8e14}, "copy": 3e12, "l2_shared": 6e12, "l2_own": 5e12}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """Every set of rows that is kept, of one decoder's launches, which take 10 us each."""
    monkeypatch.setattr(kernel_times, "headlines", lambda *args: [LINE])
    monkeypatch.setattr(kernel_times, "launch_seconds", lambda launch, device: 1e-5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    return []


def every_second(kernels: Sequence[Kernel], until: float) -> list[Compiled | str]:
    return [CODE if i % 2 == 0 else "the compiler said no" for i in range(len(kernels))]


def timed(kept: list[Rows]) -> str:
    return time_kernels(CPU, RATES, time.monotonic() + 60, kept.append)


def test_launches_are_timed_beside_their_predictions(kept: list[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "compile_all", every_second)
    table = timed(kept)
    first, rows = kept
    assert sum(row["count"] for row in rows) == len(LINE.launches(Chip()))
    assert {"why" in row for row in rows} == {True, False}
    assert len(table.splitlines()) == 2 + len(rows)
    assert "the compiler said no" in table
    assert [row["microseconds"] for row in first] == [row["microseconds"] for row in rows] == [10.0] * len(rows)


def test_times_are_kept_before_anything_is_compiled_for_predictions(
    kept: list[Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_times, "compile_all", lambda kernels, until: pytest.fail("the compiler hangs"))
    with pytest.raises(pytest.fail.Exception):
        timed(kept)
    (rows,) = kept
    assert {row["microseconds"] for row in rows} == {10.0}


def test_a_launch_that_fails_is_a_row_with_the_reason(kept: list[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(launch: Launch, device: torch.device) -> float:
        if launch.kernel.__name__ == "coupling_kernel":
            raise RuntimeError("out of resource: shared memory\nhere")
        return 1e-5

    monkeypatch.setattr(kernel_times, "launch_seconds", seconds)
    monkeypatch.setattr(kernel_times, "compile_all", every_second)
    table = timed(kept)
    rows = kept[-1]
    failed = [row for row in rows if row["microseconds"] is None]
    assert 0 < len(failed) < len(rows)
    assert {row["why"] for row in failed} == {"RuntimeError: out of resource: shared memory"}
    reason = f"failed: {len(failed)} of {len(rows)} launches, the first: {failed[0]['why']}"
    assert table.splitlines()[0] == reason
    assert table.count("not measured | RuntimeError") == len(failed)


@pytest.mark.parametrize("error", [None, RuntimeError("no")], ids=["hangs", "fails"])
def test_a_compilation_that_hangs_or_fails_costs_no_other(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [Kernel(launch, 90) for launch in LINE.launches(Chip())[:3]]

    def compile_launch(launch: Launch, capability: int) -> Compiled:
        if launch is not kernels[0].launch:
            return CODE
        time.sleep(0 if error else 600)
        raise error or AssertionError

    monkeypatch.setattr(aot, "compile_launch", compile_launch)
    until = time.monotonic() + (60 if error else 3)
    why = "RuntimeError: no" if error else "it was not done in time"
    assert list(compile_all(kernels, 2, until)) == [why, CODE, CODE]


def launches() -> list[Launch]:
    narrow = Headline("resnet18", 0, 64, "hard", "bf16", 256, 1)
    scaled = replace(LINE, precision="fp16x3")
    everything = [launch for line in (LINE, scaled, narrow) for launch in line.launches(Chip())]
    return [*everything, *tail_launches(batches=(1,))]


@pytest.mark.parametrize("name", ["linear_kernel", "coupling_kernel", "whole_flow_kernel"])
def test_weights_are_in_as_many_places_as_fill_the_cache_twice(name: str) -> None:
    launch = on_device(next(each for each in launches() if each.kernel.__name__ == name), CPU)
    weights = {key: value for key, value in launch.args.items() if key in kernel_times.WEIGHTS[name]}
    size = sum(value.nbytes for value in weights.values() if value is not None)
    for l2_bytes, count in ((0, 1), (size // 2, 1), (3 * size, 6), (10**9, REPEATS)):
        apart = with_weights_apart(launch, l2_bytes)
        assert len(apart) == count
        for key, value in launch.args.items():
            if isinstance(value, torch.Tensor):
                places = {each.args[key].data_ptr() for each in apart}
                assert len(places) == (count if key in weights else 1)
                assert all(torch.equal(each.args[key], value) for each in apart)


def test_what_has_no_weights_is_launched_as_it_is() -> None:
    (tail, *_) = tail_launches(batches=(1,))
    assert with_weights_apart(tail, 50 * 2**20) == [tail]


def test_launches_take_turns_over_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of a replay, and the median replay's share is a launch's time."""
    launch = on_device(LINE.launches(Chip())[0], CPU)
    read: list[int] = []
    monkeypatch.setattr(Launch, "run", lambda each: read.append(each.args["w_ptr"].data_ptr()))
    monkeypatch.setattr(kernel_times, "_l2_bytes", lambda device: launch.args["w_ptr"].nbytes)
    monkeypatch.setattr(kernel_times, "captured", lambda run, device: run)
    seconds = iter(range(1, 100))

    def clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
        return lambda run: run() or float(next(seconds))

    monkeypatch.setattr(kernel_times, "clock", clock)
    found = launch_seconds(launch, CPU)
    assert read[:REPEATS] == [read[0], read[1]] * (REPEATS // 2)
    assert read[0] != read[1]
    assert found == pytest.approx((1 + kernel_times.ROUNDS) / 2 / REPEATS)


def test_launches_get_memory_of_their_own_and_indices_that_are_permutations() -> None:
    for launch in launches():
        real = on_device(launch, CPU)
        for name, value in real.args.items():
            for part, meta in zip(_tensors(value), _tensors(launch.args[name]), strict=True):
                assert part.device == CPU
                assert (part.shape, part.stride()) == (meta.shape, meta.stride())
                if name.endswith("scale_ptr"):
                    assert (part == 1).all(), "a power of two"
                if "index" in name and part.dim() == 1:
                    assert part.unique().numel() == part.numel()
                elif "index" in name:
                    for block in part:
                        passive, active = block[0, : real.constexprs["PASSIVE"]], block[1, : real.constexprs["ACTIVE"]]
                        assert sorted([*passive.tolist(), *active.tolist()]) == list(range(64))


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []
