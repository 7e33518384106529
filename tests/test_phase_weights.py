"""Weights in two parts, and what matrix units cut off a sum, emulated instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from flows import rough_decoder
from torch import Tensor

from cflow_fast.kernels.phase_weights import CUT_OFF, PhaseWeights, _Operands, cut_off_by
from cflow_fast.kernels.weights import round_to_tf32

PART, INSTRUCTION = 32, 8
"""Inputs that are added up before the sum is rounded, and those of one instruction."""


def cut(sums: Tensor) -> Tensor:
    """float64 to 24 bits, the rest dropped."""
    mantissa, exponent = torch.frexp(sums)
    return torch.ldexp(torch.trunc(mantissa * 2**24), exponent - 24)


def emulated(x: Tensor, large: Tensor, low: Tensor) -> Tensor:
    """x W^T as matrix units make it of factors in two parts: what is small first, a few instructions in turn."""
    x_large = round_to_tf32(x)
    x_low = round_to_tf32(x - x_large)
    acc = torch.zeros(len(x), len(large))
    for first in range(0, x.shape[1], PART):
        part = torch.zeros(acc.shape, dtype=torch.float64)
        for factor, weight in ((x_low, large), (x_large, low), (x_large, large)):
            for start in range(first, first + PART, INSTRUCTION):
                k = slice(start, start + INSTRUCTION)
                part = cut(part + factor[:, k].double() @ weight[:, k].double().T)
        acc += part.float()
    return acc.double()


def shrinkage(cut_off: float) -> float:
    """The share of a product that is missing, by weights that make up for some."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 512), torch.randn(192, 512) / 512**0.5
    large, low = (_Operands("tf32x3", **options)(w, 192, 512) for options in ({}, {"low": True, "cut_off": cut_off}))
    exact = x.double() @ w.double().T
    return -(((emulated(x, large, low) - exact) * exact).mean() / exact.square().mean()).item()


def test_weights_in_two_parts_make_up_for_what_a_sum_loses() -> None:
    lost = shrinkage(0.0)
    assert lost == pytest.approx(1.0e-7, rel=0.15)
    assert abs(shrinkage(lost)) < 0.1 * lost
    assert abs(shrinkage(CUT_OFF)) < 0.35 * lost, "a card loses a little more"


def test_two_parts_are_the_weight_but_for_what_no_float32_holds() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    large, low = (_Operands("tf32x3", low=low)(w, 64, 64) for low in (False, True))
    assert torch.equal(round_to_tf32(large), large)
    assert torch.equal(round_to_tf32(low), low)
    assert ((large + low - w).abs() <= 2.0**-22 * w.abs()).all()


def test_a_decoders_second_parts_have_it_and_its_first_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = rough_decoder(64, permute_soft=True, coupling_blocks=2).fold("fp32").weights
    exact = PhaseWeights.prepare(weights, "tf32x3")
    monkeypatch.setattr("cflow_fast.kernels.phase_weights.cut_off_by", lambda device: 2.0**-12)
    more = PhaseWeights.prepare(weights, "tf32x3")
    assert exact.low is not None
    assert more.low is not None
    assert torch.equal(exact.w2, more.w2)
    added = more.low.w2 - exact.low.w2
    torch.testing.assert_close(added, 2.0**-12 * exact.w2, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize(
    ("device", "capability", "interpreted", "expected"),
    [
        ("cpu", (9, 0), False, 0.0),
        ("meta", (9, 0), False, 0.0),
        ("cuda", (9, 0), True, 0.0),
        ("cuda", (8, 0), False, 0.0),
        ("cuda", (10, 0), False, 0.0),
        ("cuda", (9, 0), False, CUT_OFF),
    ],
)
def test_only_what_was_seen_is_made_up_for(
    device: str, capability: tuple[int, int], interpreted: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", interpreted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cut_off_by(torch.device(device)) == expected
