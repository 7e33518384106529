"""The product kernel of kernels/linear.py is what its docstring says: ragged tiles, every bias, however x lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_guards import guarded
from torch import Tensor

from cflow_fast.kernels.configs import LinearConfig
from cflow_fast.kernels.launch import Launch, Scratch
from cflow_fast.kernels.linear import Beyond, Positions, Rotation, linear_launch
from cflow_fast.kernels.phase_weights import operand_dtype
from cflow_fast.kernels.rows import Rows, loose_rows, map_rows
from cflow_fast.kernels.weights import round_to_tf32

CPU = torch.device("cpu")
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16")
TOLERANCES: dict[str, dict[str, float]] = {
    "ieee": {"rtol": 1e-5, "atol": 1e-5},
    "tf32x3": {"rtol": 1e-5, "atol": 1e-5},
    "tf32": {"rtol": 2**-10, "atol": 1e-4},
    "bf16": {"rtol": 2**-7, "atol": 1e-3},
}
PADDED = 64
CONFIG = LinearConfig(32, 64, 64, warps=4, stages=2, group=2)
"""With 37 rows, 96 outputs and 128 inputs: two row tiles, two output tiles, both ragged, and two steps."""
ROWS, OUTPUTS, INPUTS = 37, 96, 128


def operands(precision: str, *shape: int) -> Tensor:
    x = torch.randn(shape)
    return round_to_tf32(x) if precision == "tf32" else x.to(operand_dtype(precision))


def state(precision: str, width: int) -> Rows:
    """Row-major rows of a workspace; beyond the rows that count it holds NaN."""
    x = operands(precision, PADDED, width)
    x[ROWS:] = torch.nan
    return Rows(x, ROWS, width, width, 1)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def launched(
    x: Rows, weight: Tensor, y: Tensor, precision: str = "ieee", config: LinearConfig = CONFIG, **options: Any
) -> Launch:
    torch.manual_seed(1)
    if precision == "tf32x3":
        exact, weight = weight, round_to_tf32(weight)
        options["low"] = round_to_tf32(exact - weight)
    launch = linear_launch(x, weight, y, config, precision, Scratch(CPU), multiprocessors=3, **options)
    with guarded() as guard:
        launch.run()
    guard.written_once(y)
    return launch


def close(ours: Tensor, expected: Tensor, precision: str = "ieee") -> None:
    torch.testing.assert_close(ours[:ROWS].double(), expected, **TOLERANCES[precision])


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("activation", ["none", "relu", "softplus"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_product_with_bias_and_activation(precision: str, activation: str, split_k: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = state(precision, INPUTS), operands(precision, OUTPUTS, INPUTS), torch.randn(OUTPUTS)
    y = torch.full((PADDED, OUTPUTS), torch.nan, dtype=operand_dtype(precision))
    config = LinearConfig(32, 64, 64, warps=4, stages=2, split_k=split_k)
    launched(x, weight, y, precision, config, bias=bias, activation=activation)
    expected = product(x.tensor[:ROWS], weight) + bias.double()
    match activation:
        case "relu":
            expected = expected.relu()
        case "softplus":
            expected = F.softplus(expected)
    close(y, expected, precision)


def test_result_that_is_no_operand_is_not_rounded() -> None:
    torch.manual_seed(0)
    x, weight, y = state("tf32", INPUTS), operands("tf32", OUTPUTS, INPUTS), torch.empty(PADDED, OUTPUTS)
    launched(x, weight, y, "tf32", rounded=False)
    close(y, product(x.tensor[:ROWS], weight), "ieee")


@pytest.mark.parametrize(("height", "width"), [(3, 8), (5, 32), (2, 64), (4, 7), (1, 1)])
@pytest.mark.parametrize("split_k", [1, 2])
def test_positional_bias_by_lines_parts_of_lines_and_positions(height: int, width: int, split_k: int) -> None:
    torch.manual_seed(0)
    x, weight, y = state("ieee", INPUTS), operands("ieee", OUTPUTS, INPUTS), torch.empty(PADDED, OUTPUTS)
    tables = Positions(torch.randn(height, OUTPUTS), torch.randn(width, OUTPUTS))
    config = LinearConfig(32, 64, 64, warps=4, stages=2, split_k=split_k)
    launch = launched(x, weight, y, config=config, bias=tables, activation="relu")
    assert launch.constexprs["LINE"] == (0 if width == 7 else min(width, 32))
    row = torch.arange(ROWS)
    bias = tables.rows[row // width % height] + tables.columns[row % width]
    close(y, (product(x.tensor[:ROWS], weight) + bias.double()).relu())


def test_bias_of_every_row_is_what_the_result_held() -> None:
    torch.manual_seed(0)
    x, weight, bias = state("ieee", INPUTS), operands("ieee", OUTPUTS, INPUTS), torch.randn(OUTPUTS)
    y = torch.randn(PADDED, OUTPUTS)
    held = y.clone()
    config = LinearConfig(32, 64, 64, warps=4, stages=2, split_k=2)
    launched(x, weight, y, config=config, bias=bias, added=y, activation="relu")
    close(y, (product(x.tensor[:ROWS], weight) + held[:ROWS] + bias).relu())


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("keeps", ["values", "squares", "both"])
def test_outputs_beyond_are_kept_as_values_or_as_sums_of_squares(keeps: str, precision: str) -> None:
    torch.manual_seed(0)
    weight, bias = operands(precision, OUTPUTS + 96, INPUTS), torch.randn(OUTPUTS + 96)
    x, y = state(precision, INPUTS), torch.empty(PADDED, OUTPUTS, dtype=operand_dtype(precision))
    values = torch.full((PADDED, 200), torch.nan)[:, 50:146] if keeps != "squares" else None
    squares = torch.full((2, PADDED), torch.nan) if keeps != "values" else None
    launched(x, weight, y, precision, bias=bias, activation="relu", beyond=Beyond(values, squares))
    expected = product(x.tensor[:ROWS], weight) + bias.double()
    close(y, expected[:, :OUTPUTS].relu(), precision)
    v = expected[:, OUTPUTS:]
    if values is not None:
        close(values, v)
    if squares is not None:
        sums = torch.stack([v[:, :64].square().sum(1), v[:, 64:].square().sum(1)])
        torch.testing.assert_close(squares[:, :ROWS].double(), sums, rtol=1e-5, atol=0)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("kept", [64, 96])
def test_first_outputs_beyond_are_kept_as_operands(kept: int, precision: str, split_k: int) -> None:
    """96: a tile of 64 has both."""
    torch.manual_seed(0)
    weight, bias = operands(precision, OUTPUTS + kept + 70, INPUTS), torch.randn(OUTPUTS + kept + 70)
    x, y = state(precision, INPUTS), torch.empty(PADDED, OUTPUTS, dtype=operand_dtype(precision))
    first = torch.full((PADDED, 200), torch.nan, dtype=operand_dtype(precision))
    values = torch.full((PADDED, 150), torch.nan)
    beyond = Beyond(values[:, 50:120], None, first[:, 20 : 20 + kept])
    config = LinearConfig(32, 64, 64, warps=4, stages=2, split_k=split_k)
    launched(x, weight, y, precision, config, bias=bias, activation="relu", beyond=beyond)
    expected = product(x.tensor[:ROWS], weight) + bias.double()
    close(y, expected[:, :OUTPUTS].relu(), precision)
    close(first[:, 20 : 20 + kept], expected[:, OUTPUTS : OUTPUTS + kept], precision)
    close(values[:, 50:120], expected[:, OUTPUTS + kept :])
    for others in (first[:, :20], first[:, 20 + kept :], values[:, :50], values[:, 120:]):
        assert others.isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rotation_combines_the_product_with_v(precision: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = state(precision, INPUTS), operands(precision, OUTPUTS, INPUTS), torch.randn(OUTPUTS)
    both = torch.full((PADDED, 2 * OUTPUTS), torch.nan, dtype=operand_dtype(precision))
    y, rotated = both[:, :OUTPUTS], both[:, OUTPUTS:]
    v = torch.randn(PADDED, 2 * OUTPUTS)[:, OUTPUTS:]
    angle = torch.rand(OUTPUTS)
    launched(x, weight, y, precision, bias=bias, rotation=Rotation(v, angle.cos(), angle.sin(), rotated))
    w, v64 = product(x.tensor[:ROWS], weight) + bias.double(), v[:ROWS].double()
    close(y, angle.cos() * v64 - angle.sin() * w, precision)
    close(rotated, angle.sin() * v64 + angle.cos() * w, precision)


@pytest.mark.parametrize("keeps", ["values", "squares"])
def test_all_outputs_may_lie_beyond(keeps: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = state("ieee", INPUTS), operands("ieee", OUTPUTS, INPUTS), torch.randn(OUTPUTS)
    values = torch.full((PADDED, OUTPUTS), torch.nan) if keeps == "values" else None
    squares = torch.full((2, PADDED), torch.nan) if keeps == "squares" else None
    launched(x, weight, torch.empty(PADDED, 0), bias=bias, beyond=Beyond(values, squares))
    v = product(x.tensor[:ROWS], weight) + bias.double()
    if values is not None:
        close(values, v)
    if squares is not None:
        torch.testing.assert_close(squares[:, :ROWS].sum(0).double(), v.square().sum(1), rtol=1e-5, atol=0)


def test_factor_that_is_taken_as_two_operands_keeps_its_digits() -> None:
    torch.manual_seed(0)
    x, weight = Rows(torch.randn(PADDED, INPUTS), ROWS, INPUTS, INPUTS, 1), operands("tf32", OUTPUTS, INPUTS)
    expected = product(x.tensor[:ROWS], weight)
    errors = {}
    for takes in ("split", "rounded"):
        y = torch.empty(PADDED, OUTPUTS)
        launched(x, weight, y, "tf32", takes=takes, rounded=False)
        errors[takes] = float((y[:ROWS].double() - expected).square().mean().sqrt())
    rounded = product(round_to_tf32(x.tensor[:ROWS]), weight) - expected
    assert errors["split"] < 2e-6
    assert errors["rounded"] == pytest.approx(float(rounded.square().mean().sqrt()), rel=1e-3)


def test_three_products_of_tf32_lose_no_more_than_fp32_and_to_no_side() -> None:
    """Parts that are cut off instead of rounded would shrink every product alike."""
    torch.manual_seed(0)
    x, weight = state("tf32x3", 4 * INPUTS), operands("tf32x3", OUTPUTS, 4 * INPUTS)
    y = torch.empty(PADDED, OUTPUTS)
    launched(x, weight, y, "tf32x3", LinearConfig(32, 64, 64, warps=4, stages=2))
    expected = product(x.tensor[:ROWS], weight)
    plain = (x.tensor[:ROWS] @ weight.T).double()
    deviation = y[:ROWS].double() - expected
    assert deviation.square().mean() <= 2 * (plain - expected).square().mean()
    assert abs((deviation * expected).sum() / expected.square().sum()) < 3e-8


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_inputs_are_read_by_index_from_a_state_that_lies_feature_major(precision: str) -> None:
    torch.manual_seed(0)
    features = operands(precision, 150, PADDED)
    index = torch.randperm(150)[:INPUTS].int()
    x = Rows(features, ROWS, INPUTS, 1, PADDED, index=index)
    weight, y = operands(precision, OUTPUTS, INPUTS), torch.empty(PADDED, OUTPUTS, dtype=operand_dtype(precision))
    launched(x, weight, y, precision)
    close(y, product(features.T[:ROWS][:, index.long()], weight), precision)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "spaced": lambda x: F.pad(x, (0, 3, 0, 2))[..., : x.shape[2], : x.shape[3]],
    "turned": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    batch=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 9),
    features=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    precision=st.sampled_from(["ieee", "tf32", "bf16"]),
)
def test_features_are_read_where_they_lie(
    layout: str, batch: int, height: int, width: int, features: int, dtype: torch.dtype, precision: str
) -> None:
    torch.manual_seed(0)
    maps = LAYOUTS[layout](torch.randn(batch, features, height, width).to(dtype))
    rows, padded = batch * height * width, -(-batch * height * width // 32) * 32
    weight = F.pad(operands(precision, 64, features), (0, -features % 64))
    y = torch.empty(padded, 64, dtype=operand_dtype(precision))
    launched(map_rows(maps), weight, y, precision)
    x = maps.permute(0, 2, 3, 1).flatten(0, 2).float()
    x = round_to_tf32(x) if precision == "tf32" else x.to(operand_dtype(precision))
    torch.testing.assert_close(y[:rows].double(), product(x, weight[:, :features]), **TOLERANCES[precision])


@pytest.mark.parametrize("turned", [False, True])
def test_loose_rows_are_read_where_they_lie(turned: bool) -> None:
    torch.manual_seed(0)
    z = torch.randn(100, ROWS).T if turned else torch.randn(ROWS, 300)[:, ::3]
    weight, y = F.pad(operands("ieee", 64, 100), (0, 28)), torch.empty(PADDED, 64)
    launched(loose_rows(z), weight, y)
    close(y, product(z, weight[:, :100]))


def test_row_that_is_not_finite_spoils_no_other() -> None:
    torch.manual_seed(0)
    z = torch.randn(ROWS, INPUTS)
    z[5, 3], z[20, 100] = torch.nan, torch.inf
    weight, y = operands("ieee", OUTPUTS, INPUTS), torch.empty(PADDED, OUTPUTS)
    launched(loose_rows(z), weight, y, activation="relu")
    assert (~y[:ROWS].isfinite().all(1)).nonzero().flatten().tolist() == [5, 20]


def test_split_sums_are_the_same_from_run_to_run_and_leave_their_counters_at_zero() -> None:
    torch.manual_seed(0)
    x, weight, bias = state("ieee", 3 * INPUTS), operands("ieee", OUTPUTS, 3 * INPUTS), torch.randn(OUTPUTS)
    scratch = Scratch(CPU)
    config = LinearConfig(32, 64, 64, warps=4, stages=2, split_k=4)  # six steps among four: the last one has none
    results = []
    for _ in range(2):
        y = torch.full((PADDED, OUTPUTS), torch.nan)
        linear_launch(x, weight, y, config, "ieee", scratch, 100, bias=bias).run()
        results.append(y[:ROWS])
        assert not scratch.counters(1).any()
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), product(x.tensor[:ROWS], weight) + bias, rtol=1e-5, atol=1e-5)


def test_launch_can_be_made_of_shapes_alone() -> None:
    meta = torch.device("meta")
    x = Rows(torch.empty(256, 512, dtype=torch.bfloat16, device=meta), 200, 512, 512, 1)
    weight, y = (torch.empty(size, 512, dtype=torch.bfloat16, device=meta) for size in (768, 256))
    config = LinearConfig(128, 256, 64, warps=8, stages=3, split_k=2)
    launch = linear_launch(x, weight[:512], y, config, "bf16", Scratch(meta), multiprocessors=132)
    assert launch.grid == (8,)
    assert launch.options == {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert launch.args["partial_ptr"].shape == (8 * 128 * 256,)
