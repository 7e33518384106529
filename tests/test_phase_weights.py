"""Weights in two parts, and what matrix units cut off a sum, emulated instruction by instruction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flows import rough_decoder
from torch import Tensor

from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import Problem, ProductConfig, candidates
from cflow_fast.kernels.phase_weights import CUT_OFF, Operands, PhaseWeights, cut_off_by
from cflow_fast.kernels.weights import SoftMixing, round_to_tf32

PART = 32
"""Inputs that are added up before the sum is rounded."""
INSTRUCTION = {"tf32x3": 8, "fp16x3": 16}
SCALE = torch.tensor(2.0**-12)
each_precision = pytest.mark.parametrize("precision", INSTRUCTION)


def cut(sums: Tensor) -> Tensor:
    """float64 to 24 bits, the rest dropped."""
    mantissa, exponent = torch.frexp(sums)
    return torch.ldexp(torch.trunc(mantissa * 2**24), exponent - 24)


def in_two(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """float32 as two operands."""
    if precision == "fp16x3":
        large = x.half().float()
        return large, (x - large).half().float()
    large = round_to_tf32(x)
    return large, round_to_tf32(x - large)


def emulated(x: Tensor, large: Tensor, low: Tensor, precision: str) -> Tensor:
    """x W^T as matrix units make it of factors in two parts: what is small first, a few instructions in turn."""
    x_large, x_low = in_two(x, precision)
    acc = torch.zeros(len(x), len(large))
    for first in range(0, x.shape[1], PART):
        part = torch.zeros(acc.shape, dtype=torch.float64)
        for factor, weight in ((x_low, large), (x_large, low), (x_large, large)):
            for start in range(first, first + PART, INSTRUCTION[precision]):
                k = slice(start, start + INSTRUCTION[precision])
                part = cut(part + factor[:, k].double() @ weight[:, k].double().T)
        acc += part.float()
    return acc.double()


def operands(precision: str, w: Tensor, **options: Any) -> Tensor:
    """One part of the weights, as they would be without a scale."""
    scale = SCALE if precision == "fp16x3" else None
    part = Operands(precision, scale=scale, **options)(w, *w.shape).float()
    return part if scale is None else part * scale


def shrinkage(precision: str, cut_off: float) -> float:
    """The share of a product that is missing, by weights that make up for some."""
    torch.manual_seed(0)
    x, w = 256 * torch.randn(256, 512), torch.randn(192, 512) / 512**0.5
    large, low = (operands(precision, w, **options) for options in ({}, {"low": True, "cut_off": cut_off}))
    exact = x.double() @ w.double().T
    return -(((emulated(x, large, low, precision) - exact) * exact).mean() / exact.square().mean()).item()


@pytest.mark.parametrize(("precision", "counted"), [("tf32x3", 1.0e-7), ("fp16x3", 6.3e-8)])
def test_weights_in_two_parts_make_up_for_what_a_sum_loses(precision: str, counted: float) -> None:
    lost = shrinkage(precision, 0.0)
    assert lost == pytest.approx(counted, rel=0.15)
    assert abs(shrinkage(precision, lost)) < 0.1 * lost
    assert abs(shrinkage(precision, CUT_OFF[precision])) < 0.35 * lost, "a card loses a little more"


@pytest.mark.parametrize("rows", [1, 64, 1024, 32768])
@each_precision
def test_a_part_is_never_of_more_inputs_than_what_is_made_up_for(precision: str, rows: int) -> None:
    for problem in (
        Problem("linear", precision, rows, (512, 1280, 1)),
        Problem("coupling", precision, rows, (1280, 512)),
    ):
        assert {config.block_k for config in candidates(problem, Chip()) if isinstance(config, ProductConfig)} == {PART}


@each_precision
def test_two_parts_are_the_weight_but_for_what_no_float32_holds(precision: str) -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    large, low = (operands(precision, w, low=low) for low in (False, True))
    for part in (large, low):
        assert torch.equal(round_to_tf32(part), part), "no more than eleven digits"
    least = 2.0**-25 * SCALE if precision == "fp16x3" else 0.0
    assert ((large + low - w).abs() <= 2.0**-22 * w.abs() + least).all()


@pytest.mark.parametrize("largest", [1e-20, 1e-3, 1.0, 1e4])
def test_scaled_weights_fill_the_range_of_fp16(largest: float) -> None:
    weights = rough_decoder(64, permute_soft=True, coupling_blocks=2).fold("fp32").weights
    assert isinstance(weights.mixing, SoftMixing)
    mixing = replace(weights.mixing, active=torch.zeros_like(weights.mixing.active))
    mixing.active[1, 3, 5] = largest
    prepared = PhaseWeights.prepare(replace(weights, mixing=mixing), "fp16x3")
    assert prepared.scale is not None
    assert prepared.soft is not None
    assert torch.frexp(prepared.scale).mantissa == 0.5, "a power of two"
    matrices = (*prepared.w1, prepared.w2, prepared.soft.active, prepared.soft.output)
    top = max(float(matrix.abs().max()) for matrix in matrices)
    assert 2.0**14 <= top <= 2.0**15
    assert prepared.soft.active[1, 3, 5] * prepared.scale == pytest.approx(largest, rel=2.0**-11, abs=2.0**-40)


def test_a_decoders_second_parts_have_it_and_its_first_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = rough_decoder(64, permute_soft=True, coupling_blocks=2).fold("fp32").weights
    exact = PhaseWeights.prepare(weights, "tf32x3")
    monkeypatch.setattr("cflow_fast.kernels.phase_weights.cut_off_by", lambda device, precision: 2.0**-12)
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
        ("cuda", (9, 0), False, CUT_OFF["tf32x3"]),
    ],
)
def test_only_what_was_seen_is_made_up_for(
    device: str, capability: tuple[int, int], interpreted: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", interpreted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cut_off_by(torch.device(device), "tf32x3") == expected
