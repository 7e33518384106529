"""Factors as scaled operands of fp16, kernels/scaling.py, and the products that take and leave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import rough_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_guards import guarded
from torch import Tensor

from cflow_fast.kernels.bounds import Bounds
from cflow_fast.kernels.configs import CouplingConfig, LinearConfig, ScalingConfig, select_scaling
from cflow_fast.kernels.coupling import Halves, Target, coupling_launch
from cflow_fast.kernels.launch import Scratch
from cflow_fast.kernels.linear import Beyond, Positions, Rotation, linear_launch
from cflow_fast.kernels.rows import Rows, loose_rows, map_rows
from cflow_fast.kernels.scaling import Bound, scaling_launch
from cflow_fast.kernels.weights import SoftMixing

CPU = torch.device("cpu")
CONFIG = ScalingConfig(16, 64)
PADDED_ROWS, WIDTH = 128, 128
"""Of the workspaces, which hold any number of rows and features below."""
LAYOUTS = ("contiguous", "channels last", "every second column", "rows", "by index")
TOP = 2.0**15


def place(rows: int, width: int = WIDTH, in_two: bool = True, padded: int = PADDED_ROWS) -> Rows:
    large, low = (torch.full((padded, width), torch.nan, dtype=torch.float16) for _ in range(2))
    scale = torch.full((padded,), torch.nan)
    return Rows(large, rows, width, width, 1, low=low if in_two else None, scale=scale)


def laid_out(maps: Tensor, layout: str) -> tuple[Rows, Tensor]:
    """Where features lie, and what they are, row by row."""
    rows = maps.float().permute(0, 2, 3, 1).flatten(0, 2)
    match layout:
        case "channels last":
            return map_rows(maps.contiguous(memory_format=torch.channels_last)), rows
        case "every second column":
            return map_rows(maps.repeat_interleave(2, 3)[..., ::2]), rows
        case "rows":
            return loose_rows(rows.to(maps.dtype)), rows
        case "by index":
            index = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))
            state = F.pad(rows.T, (0, PADDED_ROWS - len(rows)), value=torch.nan).contiguous()
            source = Rows(state, *rows.shape, 1, PADDED_ROWS, index=F.pad(index, (0, WIDTH - len(index))).int())
            return source, rows[:, index]
    return map_rows(maps), rows


def value(y: Rows) -> Tensor:
    """What scaled operands stand for, (rows, width) in float64."""
    assert y.scale is not None
    whole = y.tensor.double() if y.low is None else y.tensor.double() + y.low.double()
    return (whole * y.scale.double()[:, None])[: y.count]


def scaled(x: Tensor, in_two: bool = True) -> Rows:
    """Rows as scaled operands, by the kernel."""
    y = place(len(x), x.shape[1], in_two)
    scaling_launch(loose_rows(x), y, select_scaling(x.shape[1])).run()
    return y


def in_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled weights in two operands, and what they were divided by."""
    scale = torch.tensor(2.0**-12)
    large = (weight / scale).half()
    return large, (weight / scale - large.float()).half(), scale


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 7)),
    features=st.integers(1, WIDTH),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    magnitude=st.integers(-14, 14),
    in_two=st.booleans(),
    block=st.sampled_from((64, 128)),
)
def test_rows_are_their_operands_times_their_scale(
    shape: tuple[int, int, int],
    features: int,
    layout: str,
    dtype: torch.dtype,
    magnitude: int,
    in_two: bool,
    block: int,
) -> None:
    """Whole rows at once, or in steps of 64 features."""
    batch, height, width = shape
    maps = (torch.randn(batch, features, height, width) * 2.0**magnitude).to(dtype)
    x, expected = laid_out(maps, layout)
    with guarded() as guard:
        y = place(x.count, in_two=in_two)
        scaling_launch(x, y, ScalingConfig(16, block)).run()
    assert y.scale is not None
    guard.written_once(y.tensor[: x.count], y.scale[: x.count], *([y.low[: x.count]] if y.low is not None else []))
    assert (torch.frexp(y.scale[: x.count]).mantissa == 0.5).all(), "powers of two"
    largest = y.tensor[: x.count].float().abs().amax(1)
    some = expected.abs().amax(1) > 0
    assert ((largest >= TOP / 2) & (largest <= TOP))[some].all()
    error = (value(y)[:, :features] - expected.double()).abs()
    digits = 2.0**-22 if in_two else 2.0**-11
    assert (error <= digits * expected.abs() + 2.0**-24 * y.scale[: x.count, None]).all()
    assert not value(y)[:, features:].any()


@pytest.mark.parametrize("largest", [0.0, 1e-30, 2.0**-60, 1.0, 65504.0, 1e20, 3e38])
def test_no_size_of_numbers_is_too_large_or_too_small(largest: float) -> None:
    x = torch.linspace(-1, 1, 64)[None] * largest
    y = scaled(x)
    assert y.scale is not None
    assert y.tensor[:1].isfinite().all()
    assert (1 / y.scale[:1]).isfinite().all()
    assert ((value(y) - x.double()).abs() <= 2.0**-22 * largest + 2.0**-98).all()


def test_row_that_is_not_finite_spoils_no_other() -> None:
    x = torch.randn(20, 64)
    expected = value(scaled(x))
    x[3, 5], x[7, 9], x[11] = torch.nan, torch.inf, torch.nan
    ours = value(scaled(x))
    assert (~ours.isfinite().all(1)).nonzero().flatten().tolist() == [3, 7, 11]
    assert torch.equal(ours[ours.isfinite().all(1)], expected[ours.isfinite().all(1)])


@pytest.mark.parametrize("width", [64, 192, 576, 2048, 8192])
def test_the_tile_of_every_width_is_one(width: int) -> None:
    config = select_scaling(width)
    assert config.block_rows * config.block_features == 8192
    assert PADDED_ROWS % config.block_rows == 0
    if width <= 4096:
        assert config.block_features >= width, "whole rows at once"


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_bounds_are_bounds_and_no_more_than_a_power_of_two_above(mixed: bool, conditioned: bool) -> None:
    """Of |C v - S w| <= 3 max |x| + 5 max |other| + 0.25, and of a hidden layer that is made of it, or of x itself."""
    torch.manual_seed(0)
    x, other, condition = (torch.randn(20, 64) * torch.logspace(-3, 3, 20)[:, None].roll(i) for i in range(3))
    y, mixed_scale, hidden_scale = place(20, 64), torch.empty(PADDED_ROWS), torch.empty(PADDED_ROWS)
    numbers = [torch.tensor(number) for number in (3.0, 0.25, 5.0, 7.0, 0.5, 11.0)]
    of_mixed = Bound(mixed_scale, numbers[0], numbers[1], scaled(other), numbers[2]) if mixed else None
    own = (scaled(condition), numbers[5]) if conditioned else ()
    with guarded() as guard:
        of_hidden = Bound(hidden_scale, numbers[3], numbers[4], *own)
        scaling_launch(loose_rows(x), y, CONFIG, mixed=of_mixed, hidden=of_hidden).run()
    guard.written_once(hidden_scale[:20])
    reach = x.abs().amax(1).double()
    if mixed:
        guard.written_once(mixed_scale[:20])
        reach = 3 * reach + 0.25 + 5 * other.abs().amax(1).double()
        assert (mixed_scale[:20] * TOP >= reach).all()
        assert (mixed_scale[:20] * TOP <= 4.01 * reach).all()
    hidden = 7 * reach + 0.5 + (11 * condition.abs().amax(1).double() if conditioned else 0)
    assert (hidden_scale[:20] * TOP >= hidden).all()
    assert (hidden_scale[:20] * TOP <= 16.01 * hidden).all()


ROWS, PADDED, OUTPUTS, INPUTS = 37, 64, 96, 128
TILE = LinearConfig(32, 64, 64, warps=4, stages=2, group=2)
"""Two row tiles and two output tiles, both ragged, and two steps."""


class Product:
    """x W^T + b with rows of very different sizes, in float64, and as a launch."""

    def __init__(self, precision: str, outputs: int = OUTPUTS) -> None:
        torch.manual_seed(0)
        self.precision = precision
        self.x = torch.randn(ROWS, INPUTS) * torch.logspace(-4, 6, ROWS)[:, None]
        self.factor = scaled(self.x)
        weight, self.bias = torch.randn(outputs, INPUTS) / 16, torch.randn(outputs)
        self.weight, low, self.weight_scale = in_parts(weight)
        self.low = low if precision == "fp16x3" else None
        x = value(self.factor if precision == "fp16x3" else scaled(self.x, in_two=False))
        parts = self.weight.double() + (0 if self.low is None else self.low.double())
        self.expected = x @ (parts * self.weight_scale.double()).T + self.bias

    def run(self, y: Tensor, config: LinearConfig = TILE, **options: Any) -> None:
        options = {"bias": self.bias, "low": self.low, "weight_scale": self.weight_scale, "rounded": False} | options
        launch = linear_launch(self.factor, self.weight, y, config, self.precision, Scratch(CPU), 3, **options)
        with guarded() as guard:
            launch.run()
        guard.written_once(y)

    def close(self, ours: Tensor, expected: Tensor, digits: float = 2.0**-20) -> None:
        """Relative to the largest of a row: sums of numbers of either sign."""
        largest = expected.abs().amax(1, keepdim=True)
        assert ((ours[:ROWS].double() - expected).abs() <= digits * largest).all()


each_precision = pytest.mark.parametrize("precision", ["fp16", "fp16x3"])


@pytest.mark.parametrize("split_k", [1, 2])
@each_precision
def test_product_of_scaled_operands_is_the_product(precision: str, split_k: int) -> None:
    product, y = Product(precision), torch.full((PADDED, OUTPUTS), torch.nan)
    product.run(y, LinearConfig(32, 64, 64, warps=4, stages=2, split_k=split_k))
    product.close(y, product.expected)


def test_eleven_digits_of_a_factor_or_twenty_two() -> None:
    """As a permutation's product takes it beside weights of eleven."""
    product = Product("fp16")
    exact = product.x.double() @ (product.weight.double() * product.weight_scale.double()).T + product.bias
    errors = {}
    for takes in ("operand", "parts"):
        y = torch.empty(PADDED, OUTPUTS)
        product.run(y, takes=takes)
        errors[takes] = ((y[:ROWS].double() - exact) / exact.abs().amax(1, keepdim=True)).abs().max()
    assert errors["parts"] < 2.0**-20
    assert errors["operand"] > 2.0**-13


@each_precision
def test_every_bias_and_what_a_row_adds(precision: str) -> None:
    product, y = Product(precision), torch.empty(PADDED, OUTPUTS)
    tables, added = Positions(torch.randn(3, OUTPUTS), torch.randn(5, OUTPUTS)), torch.randn(PADDED, 2 * OUTPUTS)
    product.run(y, bias=tables, added=added[:, OUTPUTS:])
    row = torch.arange(ROWS)
    bias = tables.rows[row // 5 % 3] + tables.columns[row % 5] + added[:ROWS, OUTPUTS:]
    product.close(y, product.expected - product.bias + bias)


@pytest.mark.parametrize("activation", ["relu", "softplus"])
@each_precision
def test_hidden_layer_is_left_as_scaled_operands(precision: str, activation: str) -> None:
    product, in_two = Product(precision), precision == "fp16x3"
    y = place(ROWS, OUTPUTS, in_two, PADDED)
    assert y.scale is not None
    y.scale[:ROWS] = torch.exp2(product.expected.abs().amax(1).log2().ceil() - 9).float()  # as far off as bounds are
    product.run(y.tensor, activation=activation, rounded=True, y_low=y.low, y_scale=y.scale)
    expected = product.expected.relu() if activation == "relu" else F.softplus(product.expected)
    product.close(value(y), expected, 2.0**-19 if in_two else 2.0**-11)


@each_precision
def test_rotation_leaves_both_results_as_scaled_operands(precision: str) -> None:
    product, v, angle = Product(precision), torch.randn(PADDED, OUTPUTS), torch.rand(OUTPUTS)
    y, rotated = (place(ROWS, OUTPUTS, padded=PADDED) for _ in range(2))
    assert y.scale is not None
    y.scale[:ROWS] = torch.exp2((product.expected.abs().amax(1) + 5).log2().ceil() - 14).float()
    rotation = Rotation(v, angle.cos(), angle.sin(), rotated.tensor, rotated.low)
    product.run(y.tensor, takes="parts", rotation=rotation, y_low=y.low, y_scale=y.scale)
    w, v64 = product.expected, v[:ROWS].double()
    if precision == "fp16":  # beside a factor in two parts
        weight = product.weight.double() * product.weight_scale.double()
        w = value(product.factor) @ weight.T + product.bias
    rotated = Rows(rotated.tensor, ROWS, OUTPUTS, OUTPUTS, 1, low=rotated.low, scale=y.scale)
    largest = (w.abs() + v64.abs()).amax(1, keepdim=True)
    for ours, expected in (
        (y, angle.cos() * v64 - angle.sin() * w),
        (rotated, angle.sin() * v64 + angle.cos() * w),
    ):
        assert ((value(ours) - expected).abs() <= 2.0**-19 * largest).all()


@each_precision
def test_outputs_beyond_are_in_float32_without_a_scale(precision: str) -> None:
    product = Product(precision, OUTPUTS + 64)
    y, values = place(ROWS, OUTPUTS, precision == "fp16x3", PADDED), torch.full((PADDED, 64), torch.nan)
    squares = torch.full((1, PADDED), torch.nan)
    assert y.scale is not None
    y.scale[:ROWS] = torch.exp2(product.expected.abs().amax(1).log2().ceil() - 14).float()
    beyond = Beyond(values, squares)
    product.run(y.tensor, activation="relu", rounded=True, beyond=beyond, y_low=y.low, y_scale=y.scale)
    v = product.expected[:, OUTPUTS:]
    product.close(values, v)
    torch.testing.assert_close(squares[0, :ROWS].double(), v.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("split_k", [1, 2])
@each_precision
def test_coupling_layer_takes_scaled_operands(precision: str, split_k: int) -> None:
    product = Product(precision, 2 * OUTPUTS)
    hidden = scaled(product.x / product.x.abs().amax(1, keepdim=True), in_two=precision == "fp16x3")
    weight = product.weight.double() + (0 if product.low is None else product.low.double())
    both = value(hidden) @ (weight * product.weight_scale.double()).T + product.bias
    s, t = both.chunk(2, 1)
    state = torch.randn(PADDED, 2 * OUTPUTS)
    before = state[:ROWS].double()
    halves = Halves(*(Rows(half, ROWS, OUTPUTS, 2 * OUTPUTS, 1) for half in state.split(OUTPUTS, 1)))
    log_det = torch.full((2, PADDED), torch.nan)
    launch = coupling_launch(
        hidden,
        product.weight,
        product.bias,
        halves,
        Target(halves.active),
        log_det,
        1.9,
        CouplingConfig(32, 64, 64, warps=4, stages=2, split_k=split_k),
        precision,
        Scratch(CPU),
        multiprocessors=3,
        rounded=False,
        low=product.low,
        weight_scale=product.weight_scale,
    )
    with guarded() as guard:
        launch.run()
    guard.written_once(halves.active.tensor, log_det)
    j = 1.9 * s.tanh()
    expected = before[:, OUTPUTS:] * j.exp() + t
    torch.testing.assert_close(state[:ROWS, OUTPUTS:].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det[:, :ROWS].sum(0).double(), j.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("condition", [0, 8])
def test_bounds_are_what_the_worst_features_reach(condition: int) -> None:
    """Signs of the weights of one hidden unit, or of one place of a rotation."""
    weights = rough_decoder(41, condition, permute_soft=True, coupling_blocks=2).fold("fp32").weights
    assert isinstance(weights.mixing, SoftMixing)
    bounds = Bounds.of(weights)
    for block in range(2):
        w1, b1 = weights.w1[block], weights.b1[block]
        reached = w1.abs().sum(1)
        assert reached.max() <= bounds.hidden[block] <= 1.02 * reached.max()
        worst = w1[reached.argmax()].sign()
        largest = F.softplus(3 * w1 @ worst + b1).max()
        if weights.w1_condition is not None:
            largest = F.softplus(3 * w1 @ worst + weights.w1_condition[block].abs().sum(1) + b1).max()
        assert largest <= 3 * bounds.hidden[block] + bounds.positional[block]
        assert (bounds.condition[block] > 0) == bool(condition)
    assert len(bounds.passive) == len(bounds.active) == len(bounds.mixed) == len(weights.mixing.cosine)
    for rotation in range(len(bounds.passive)):
        v, w = weights.mixing.passive[rotation], weights.mixing.active[rotation]
        assert v.abs().sum(1).max() <= bounds.passive[rotation] <= 1.02 * v.abs().sum(1).max()
        assert w.abs().sum(1).max() <= bounds.active[rotation] <= 1.02 * w.abs().sum(1).max()
        offsets = weights.mixing.passive_offset[rotation], weights.mixing.active_offset[rotation]
        assert bounds.mixed[rotation] >= sum(offset.abs().max() for offset in offsets)
    assert all(number.stride(0) == 4 for number in vars(bounds).values())
