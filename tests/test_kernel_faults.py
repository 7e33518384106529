"""Faults planted into the kernels' sources, one by one: each must turn a parity check red.

A fault replaces one passage of a module. The passage must still be there, once: a fault cannot outlive what it spoils.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flows import rough_decoder
from kernel_faults import FAULTS, Fault
from kernel_guards import guarded
from torch import Tensor
from triton.runtime.errors import InterpreterError

from cflow_fast import folding
from cflow_fast.folding import fold_weights
from cflow_fast.kernels import anomaly_map, anomaly_tail, phases, triton_flow, whole_flow
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import CouplingConfig, LinearConfig, TailConfig, WholeFlowConfig
from cflow_fast.kernels.torch_flow import TorchFlow, positional_tables
from cflow_fast.kernels.weights import FlowWeights
from cflow_fast.kernels.whole_flow_weights import WholeFlowWeights
from cflow_fast.positional import encoding_factors

PACKAGE = "cflow_fast.kernels"


def tail_is_right() -> None:
    """Upsampling and downsampling, values above the maximum, one of every kind that is not finite."""
    generator = torch.Generator().manual_seed(0)
    scales = [-1.4 + 0.3 * torch.randn(2, *shape, generator=generator) for shape in ((5, 7), (3, 4))]
    scales[0][0, 4, 6], scales[0][1, 0, 0], scales[1][1, 2, 3] = torch.inf, -torch.inf, torch.nan
    scales[0][1, 4, 6] = 0.1  # the maximum is the very last position
    for size, maxima in (((9, 37), [-1.3, -1.2]), ((9, 37), None), ((2, 5), [-1.3, -1.2])):
        with guarded() as guard:
            result, score = anomaly_tail.anomaly_map(scales, size, maxima)
        guard.written_once(result)
        expected, expected_score = anomaly_map.anomaly_map(scales, size, maxima)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(score, expected_score, rtol=0, atol=1e-6)


def folded(permute_soft: bool, features: int, matrices: int | None = None) -> tuple[FlowWeights, Tensor, Tensor]:
    """Weights, maps of 70 positions, whose tiles end inside of a line, and what the twin says about them."""
    decoder = rough_decoder(features, 8, permute_soft=permute_soft, coupling_blocks=matrices or 2)
    with pytest.MonkeyPatch.context() as patch:
        if matrices:
            patch.setattr(folding, "matrix_blocks", lambda *_: matrices)
        weights = fold_weights(decoder, torch.float32)
    maps = torch.randn(2, features, 5, 7, generator=torch.Generator().manual_seed(1))
    return weights, maps, TorchFlow(weights, torch.float32, packed=False).log_prob_map(maps, encoding_factors(8, 5, 7))


def whole_flow_is_right(permute_soft: bool) -> None:
    weights, maps, expected = folded(permute_soft, 21)
    prepared = WholeFlowWeights.prepare(weights, "ieee")
    tables = prepared.tables(positional_tables(weights, encoding_factors(8, 5, 7), torch.float32))
    with guarded() as guard:
        log_prob = whole_flow.whole_flow_map(maps, prepared, tables, WholeFlowConfig(32, 32, 4, 2))
    guard.written_once(log_prob)
    torch.testing.assert_close(log_prob, expected, rtol=3e-6, atol=3e-6 * 21)


def phases_are_right(
    permute_soft: bool, precision: str = "ieee", merged: bool = False, matrices: int | None = None
) -> None:
    """Two splits of every product."""
    weights, maps, expected = folded(permute_soft, 41, matrices)
    with guarded() as guard, pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_flow, "is_merged", lambda *_: merged)
        log_prob = triton_flow.TritonFlow(weights, precision).log_prob_map(maps, encoding_factors(8, 5, 7))
    guard.written_once(log_prob)
    torch.testing.assert_close(log_prob, expected, rtol=3e-6, atol=3e-6 * 41)


CHECKS: dict[str, Callable[[], None]] = {
    "tail": tail_is_right,
    "whole flow, soft": partial(whole_flow_is_right, True),
    "whole flow, hard": partial(whole_flow_is_right, False),
    "phases, soft": partial(phases_are_right, True),
    "phases, hard": partial(phases_are_right, False),
    "phases, merged": partial(phases_are_right, True, merged=True),
    "phases, merged matrices": partial(phases_are_right, True, merged=True, matrices=3),
    "phases, soft, tf32x3": partial(phases_are_right, True, "tf32x3"),
    "phases, soft, fp16x3": partial(phases_are_right, True, "fp16x3"),
    "phases, hard, fp16x3": partial(phases_are_right, False, "fp16x3"),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = TailConfig(rows=4, columns=32, warps=1, block=16, peak_programs=2)
    monkeypatch.setattr(anomaly_tail, "select_tail", lambda *shape: tail)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(multiprocessors=3)))  # several tiles a program
    monkeypatch.setattr(triton_flow, "select_whole_flow", lambda *shape: None)  # however few the features are
    tile = {"block_rows": 64, "block_out": 64, "block_k": 32, "warps": 4, "stages": 2, "split_k": 2}
    monkeypatch.setattr(phases, "select_linear", lambda *shape: LinearConfig(**tile))
    monkeypatch.setattr(phases, "select_coupling", lambda *shape: CouplingConfig(**tile))


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """The fault's module in place of the right one, wherever a module of the package uses what it defines."""
    name = f"{PACKAGE}.{fault.module}"
    right = importlib.import_module(name)
    wrong = _load(name, _spoilt(right, fault), folder)
    own = {defined: value for defined, value in vars(right).items() if callable(value) and _home(value) == name}
    users = [module for key, module in sys.modules.items() if key.startswith(f"{PACKAGE}.")]
    with pytest.MonkeyPatch.context() as patch:
        for user in users:
            for used, value in list(vars(user).items()):
                if used in own and value is own[used]:
                    patch.setattr(user, used, vars(wrong)[used])
        if fault.module == "anomaly_tail":
            patch.setattr(wrong, "select_tail", right.select_tail)  # type: ignore[attr-defined]
        yield


def _spoilt(module: ModuleType, fault: Fault) -> str:
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    count = source.count(fault.right)
    assert count == 1, f"{fault.module}.py has {count} times what the fault {fault.name!r} replaces: {fault.right}"
    return source.replace(fault.right, fault.wrong)


def _load(name: str, source: str, folder: Path) -> ModuleType:
    path = folder / f"{name.rpartition('.')[2]}.py"  # a file: Triton reads the source of its functions
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _home(value: object) -> str:
    """The module that defines a function, class or kernel."""
    return getattr(getattr(value, "fn", value), "__module__", "")


@pytest.mark.parametrize("name", CHECKS)
def test_check_is_green_without_a_fault(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("fault", {fault.module: fault for fault in FAULTS}.values(), ids=lambda fault: fault.module)
def test_a_module_planted_without_a_fault_stays_green(fault: Fault, tmp_path: Path) -> None:
    with planted(replace(fault, wrong=fault.right), tmp_path):
        CHECKS[fault.check]()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.module}: {fault.name}")
def test_fault_turns_its_check_red(fault: Fault, tmp_path: Path) -> None:
    with planted(fault, tmp_path), pytest.raises((AssertionError, InterpreterError)) as raised:
        CHECKS[fault.check]()
    found_by_guard = "KernelError" in str(raised.value)
    assert found_by_guard or isinstance(raised.value, AssertionError), f"the fault does not run: {raised.value}"


def test_fault_that_outlived_its_source_is_an_error(tmp_path: Path) -> None:
    fault = Fault("gone", "anomaly_tail", "no such passage", "")
    with pytest.raises(AssertionError, match="0 times what the fault 'gone' replaces"), planted(fault, tmp_path):
        pass
