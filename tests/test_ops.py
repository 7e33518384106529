"""The dispatcher runs what was asked for, or says why it cannot."""

from __future__ import annotations

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


@pytest.mark.parametrize("wide", [False, True])
def test_products_are_chosen_by_what_the_cpu_reports(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.ops.cpu_has", lambda feature: wide and feature == "avx512")
    flow = FlowDecoder(8, 4, 1).fold("fp32").flow
    packed = wide and torch.backends.mkldnn.is_available()
    assert isinstance(flow.products, OneDnnProducts if packed else MatmulProducts)
    assert isinstance(FlowDecoder(8, 4, 1).double().fold().flow.products, MatmulProducts)
