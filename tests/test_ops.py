"""The dispatcher runs what was asked for, or says why it cannot."""

from __future__ import annotations

import re
import sys
import warnings

import pytest
import torch

from cflow_fast import FlowDecoder, ops
from cflow_fast.anomaly import anomaly_map
from cflow_fast.kernels.products import MatmulProducts, OneDnnProducts

CPU = torch.device("cpu")


def test_cpu_runs_pytorch() -> None:
    assert ops.backend(CPU) == "torch"


def test_backend_that_is_forced_and_can_run_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "torch")
    assert ops.backend(CPU) == "torch"


def test_forced_backend_that_cannot_run_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "abacus")
    decoder = FlowDecoder(8, 0, 1).fold("fp32")
    for call in (lambda: decoder.log_prob(torch.zeros(1, 8)), lambda: anomaly_map([torch.zeros(1, 2, 2)], 4)):
        with pytest.raises(RuntimeError, match="CFLOW_FAST_BACKEND=abacus cannot run here; available: torch"):
            call()


def test_triton_is_forced_on_a_cpu_under_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    assert ops.backend(CPU) == "triton"
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(RuntimeError, match="on a CPU they run only interpreted, with TRITON_INTERPRET=1"):
        ops.backend(CPU)
    with pytest.raises(RuntimeError, match="CFLOW_FAST_BACKEND=triton cannot run here: they do not run on meta"):
        ops.backend(torch.device("meta"))


class Card:
    """An NVIDIA card as PyTorch describes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr("torch.version.hip", None)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"Card {capability[0]}")
        self.device = torch.device("cuda", 0)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_triton_runs_on_cards_that_it_was_written_for(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ops.backend(Card(monkeypatch, capability).device) == "triton"
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "torch")
    assert ops.backend(Card(monkeypatch, capability).device) == "torch"


OBSTACLES = {
    "Card 7 has compute capability 7.5, they need 8.0": ((7, 5), lambda patch: None),
    "triton is not installed": ((9, 0), lambda patch: patch.setitem(sys.modules, "triton", None)),
    "triton 3.5.1 is older than 3.6": ((9, 0), lambda patch: patch.setattr("triton.__version__", "3.5.1")),
    "they are written for NVIDIA's cards": ((9, 4), lambda patch: patch.setattr("torch.version.hip", "6.4")),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_card_without_triton_runs_pytorch_and_says_so_once(obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, obstruct = OBSTACLES[obstacle]
    device = Card(monkeypatch, capability).device
    obstruct(monkeypatch)
    ops._say_once.cache_clear()
    with pytest.warns(UserWarning, match=f"PyTorch computes on cuda instead.*: {re.escape(obstacle)}"):
        assert ops.backend(device) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.backend(device) == "torch"
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=f"CFLOW_FAST_BACKEND=triton cannot run here: {re.escape(obstacle)}"):
        ops.backend(device)


@pytest.mark.parametrize("wide", [False, True])
def test_products_are_chosen_by_what_the_cpu_reports(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "torch")
    monkeypatch.setattr("cflow_fast.ops.cpu_has", lambda feature: wide and feature == "avx512")
    packed = OneDnnProducts if wide and torch.backends.mkldnn.is_available() else MatmulProducts
    assert isinstance(FlowDecoder(512, 4, 1, hidden=4).fold("fp32").flow.products, packed)
    assert isinstance(FlowDecoder(511, 4, 1, hidden=4).fold("fp32").flow.products, MatmulProducts)
    assert isinstance(FlowDecoder(8, 4, 1).double().fold().flow.products, MatmulProducts)
