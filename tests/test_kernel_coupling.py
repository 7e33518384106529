"""The kernel of a coupling layer, kernels/coupling.py, is its formula, wherever the state lies; and the reduction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_guards import Guard, guarded
from torch import Tensor

from cflow_fast.kernels.configs import CouplingConfig, ReductionConfig, select_reduction
from cflow_fast.kernels.coupling import Halves, Norm, Pending, Target, coupling_launch
from cflow_fast.kernels.launch import Scratch
from cflow_fast.kernels.phase_weights import operand_dtype
from cflow_fast.kernels.reduction import reduction_launch
from cflow_fast.kernels.rows import Rows, map_rows
from cflow_fast.kernels.weights import round_to_tf32

CPU = torch.device("cpu")
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16")
TOLERANCES: dict[str, dict[str, float]] = {
    "ieee": {"rtol": 1e-5, "atol": 2e-5},
    "tf32x3": {"rtol": 1e-5, "atol": 2e-5},
    "tf32": {"rtol": 2**-10, "atol": 1e-4},
    "bf16": {"rtol": 2**-7, "atol": 1e-3},
}
CLAMP = 1.9
ROWS, PADDED, HIDDEN, HALF = 37, 64, 128, 96
CONFIG = CouplingConfig(32, 64, 64, warps=4, stages=2, group=2)
"""Two row tiles and two output tiles, both ragged, and two steps."""


def operands(precision: str, *shape: int) -> Tensor:
    x = torch.randn(shape)
    return round_to_tf32(x) if precision == "tf32" else x.to(operand_dtype(precision))


class Layer:
    """A coupling layer of `active` features, padded to HALF, and what it makes of x2 in float64."""

    def __init__(self, precision: str, active: int = HALF) -> None:
        torch.manual_seed(0)
        self.precision, self.active = precision, active
        self.hidden = operands(precision, PADDED, HIDDEN)
        self.hidden[ROWS:] = torch.nan
        self.weight, self.bias = operands(precision, 2 * HALF, HIDDEN) / 16, torch.randn(2 * HALF)
        for padding in (slice(active, HALF), slice(HALF + active, 2 * HALF)):
            self.weight[padding], self.bias[padding] = 0, 0
        s, t = (self.hidden[:ROWS].double() @ self.weight.double().T + self.bias).chunk(2, 1)
        self.j, self.t = CLAMP * s.tanh(), t
        self.log_det = torch.full((2, PADDED), torch.nan)

    def run(self, source: Halves, target: Target | None, config: CouplingConfig = CONFIG, **options: Any) -> Guard:
        weight = self.weight
        if self.precision == "tf32x3":
            weight = round_to_tf32(weight)
            options["low"] = round_to_tf32(self.weight - weight)
        launch = coupling_launch(
            Rows(self.hidden, ROWS, HIDDEN, HIDDEN, 1),
            weight,
            self.bias,
            source,
            target,
            self.log_det,
            CLAMP,
            config,
            self.precision,
            Scratch(CPU),
            multiprocessors=3,
            **options,
        )
        with guarded() as guard:
            launch.run()
        guard.written_once(self.log_det)
        return guard

    def expected(self, x2: Tensor) -> Tensor:
        """y2 (ROWS, active) of x2 in the same shape."""
        return x2.double() * self.j[:, : self.active].exp() + self.t[:, : self.active]

    def check_log_det(self) -> None:
        sums = torch.stack([self.j[:, :64].sum(1), self.j[:, 64 : self.active].sum(1)])
        torch.testing.assert_close(self.log_det[:, :ROWS].double(), sums, rtol=1e-5, atol=1e-4)

    def close(self, ours: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(ours[:ROWS].double(), expected.double(), **TOLERANCES[self.precision])


def halves_of(buffer: Tensor) -> Halves:
    """A row-major state's."""
    width = buffer.shape[1]
    return Halves(*(Rows(half, ROWS, HALF, width, 1) for half in (buffer[:, :HALF], buffer[:, HALF:])))


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_active_half_of_a_row_major_state_is_replaced(precision: str, split_k: int) -> None:
    layer = Layer(precision)
    buffer = operands(precision, PADDED, 2 * HALF)
    before = buffer.clone()
    halves = halves_of(buffer)
    config = CouplingConfig(32, 64, 64, warps=4, stages=2, split_k=split_k)
    guard = layer.run(halves, Target(halves.active), config)
    guard.written_once(halves.active.tensor)
    layer.close(buffer[:, HALF:], layer.expected(before[:ROWS, HALF:]))
    assert torch.equal(buffer[:, :HALF], before[:, :HALF])
    layer.check_log_det()


def test_active_half_is_read_from_another_tensor_and_kept_unrounded() -> None:
    layer = Layer("tf32")
    state, values = torch.full((PADDED, 2 * HALF), torch.nan), torch.randn(PADDED, 2 * HALF)
    source = Halves(halves_of(state).passive, halves_of(values).active)
    layer.run(source, Target(halves_of(state).active), rounded=False)
    y2 = state[:ROWS, HALF:]
    torch.testing.assert_close(y2.double(), layer.expected(values[:ROWS, HALF:]), **TOLERANCES["ieee"])
    assert not torch.equal(y2, round_to_tf32(y2))
    assert state[:, :HALF].isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_of_a_feature_major_state_are_replaced_by_index(precision: str) -> None:
    """70 active features of 150, with a scale and an offset pending; nobody else's are touched."""
    layer = Layer(precision, active=70)
    v = operands(precision, 150, PADDED)
    before = v.clone()
    order = torch.randperm(150).int()
    active, passive = (
        Rows(v, ROWS, len(index), 1, PADDED, index=torch.cat([index, index.new_zeros(HALF - len(index))]))
        for index in (order[:70], order[70:])
    )
    gain, shift = (torch.cat([torch.randn(70), torch.zeros(HALF - 70)]) for _ in range(2))
    layer.run(Halves(passive, active), Target(active), pending=Pending(gain, shift))
    x2 = before[order[:70].long(), :ROWS].T.double() * gain[:70] + shift[:70]
    layer.close(v[order[:70].long()].T, layer.expected(x2))
    assert torch.equal(v[order[70:].long()], before[order[70:].long()])
    layer.check_log_det()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_first_block_carries_the_features_into_the_state(
    precision: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    layer = Layer(precision, active=HALF - 1)
    maps = torch.randn(1, 2 * HALF - 1, 1, ROWS).to(dtype).contiguous(memory_format=layout)
    features, buffer = map_rows(maps), torch.full((PADDED, 2 * HALF), torch.nan, dtype=operand_dtype(precision))
    halves = halves_of(buffer)
    source = Halves(features.narrow(0, HALF), features.narrow(HALF, HALF - 1))
    guard = layer.run(source, Target(halves.active, halves.passive))
    guard.written_once(buffer)
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    layer.close(buffer[:, :HALF], rows[:, :HALF])
    layer.close(buffer[:, HALF:-1], layer.expected(rows[:, HALF:]))
    assert not buffer[:ROWS, -1].any(), "padding is zero, whatever the buffer held"
    layer.check_log_det()


@pytest.mark.parametrize("with_passive", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_last_block_leaves_its_share_of_the_norm(kept: bool, with_passive: bool) -> None:
    layer = Layer("ieee")
    buffer = torch.randn(PADDED, 2 * HALF)
    before = buffer[:ROWS].double()
    gains = torch.randn(4, HALF)
    squares = torch.full((2, PADDED), torch.nan)
    norm = Norm(squares, gains[0], gains[1], *(gains[2:] if with_passive else (None, None)))
    halves = halves_of(buffer)
    guard = layer.run(halves, Target(halves.active) if kept else None, norm=norm)
    guard.written_once(squares)
    y2 = layer.expected(before[:, HALF:])
    u = (gains[0] * y2 + gains[1]).square()
    if with_passive:
        u = u + (gains[2] * before[:, :HALF] + gains[3]).square()
    expected = torch.stack([u[:, :64].sum(1), u[:, 64:].sum(1)])
    torch.testing.assert_close(squares[:, :ROWS].double(), expected, rtol=1e-5, atol=0)
    layer.close(buffer[:, HALF:], y2 if kept else before[:, HALF:])


def test_split_sums_are_the_same_from_run_to_run() -> None:
    results = []
    for _ in range(2):
        layer = Layer("ieee")
        buffer = torch.randn(PADDED, 2 * HALF)
        halves = halves_of(buffer)
        layer.run(halves, Target(halves.active), CouplingConfig(32, 64, 64, warps=4, stages=2, split_k=2))
        results.append((buffer[:ROWS], layer.log_det[:, :ROWS]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(("log_dets", "norms"), [(1, 1), (20, 3), (15, 17), (150, 20)])
@pytest.mark.parametrize("config", [ReductionConfig(16, 32), select_reduction(1), select_reduction(1 << 15)], ids=str)
def test_reduction_adds_up_log_det_and_norm(config: ReductionConfig, log_dets: int, norms: int) -> None:
    torch.manual_seed(0)
    sums = torch.randn(log_dets + norms, PADDED)
    log_prob, log_det = torch.full((2, ROWS), torch.nan)
    with guarded() as guard:
        reduction_launch(sums, log_dets, 2.5, 150, log_prob, log_det, config).run()
    guard.written_once(log_prob, log_det)
    exact = sums[:, :ROWS].double()
    expected = 2.5 + exact[:log_dets].sum(0)
    torch.testing.assert_close(log_det.double(), expected, rtol=1e-5, atol=1e-5)
    expected = expected - 0.5 * (exact[log_dets:].sum(0) + 150 * math.log(2 * math.pi))
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
