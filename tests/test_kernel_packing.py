"""Features laid down for the first block, kernels/packing.py: every value in its place, whatever order it came in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_guards import guarded
from torch import Tensor

from cflow_fast.bench.headline import decoder_launches, rows_launches
from cflow_fast.bench.specimens import specimen_weights
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import PackingConfig
from cflow_fast.kernels.packing import packing_launch
from cflow_fast.kernels.phase_weights import operand_dtype
from cflow_fast.kernels.rows import Rows, loose_rows, map_rows
from cflow_fast.kernels.weights import round_to_tf32

CONFIG = PackingConfig(16, 32, 4)
PADDED_ROWS, WIDTH = 128, 64
"""Of the workspaces, which hold any number of rows and features below."""
FORMATS = ("contiguous", "channels last", "every second column", "rows")


def laid_out(maps: Tensor, layout: str) -> Rows:
    if layout == "channels last":
        return map_rows(maps.contiguous(memory_format=torch.channels_last))
    if layout == "every second column":
        return map_rows(maps.repeat_interleave(2, 3)[..., ::2])
    if layout == "rows":
        return loose_rows(maps.permute(0, 2, 3, 1).flatten(0, 2))
    return map_rows(maps)


def rounded(x: Tensor, precision: str) -> Tensor:
    return round_to_tf32(x) if precision == "tf32" else x.to(operand_dtype(precision))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 7)),
    features=st.integers(2, 80),
    layout=st.sampled_from(FORMATS),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    precision=st.sampled_from(("ieee", "tf32", "tf32x3", "bf16")),
)
def test_both_halves_of_a_row_major_state(
    shape: tuple[int, int, int], features: int, layout: str, dtype: torch.dtype, precision: str
) -> None:
    batch, height, width = shape
    maps = torch.randn(batch, features, height, width).to(dtype)
    expected = maps.float().permute(0, 2, 3, 1).flatten(0, 2)
    x, passive = laid_out(maps, layout), features - features // 2
    with guarded() as guard:
        y1 = torch.empty(PADDED_ROWS, WIDTH, dtype=operand_dtype(precision))
        y2 = torch.empty(PADDED_ROWS, WIDTH)
        y1_rows, y2_rows = (Rows(y, x.count, WIDTH, WIDTH, 1) for y in (y1, y2))
        x1, x2 = x.narrow(0, passive), x.narrow(passive, features - passive)
        packing_launch(x1, x2, y1_rows, y2_rows, CONFIG, precision, rounded=True).run()
    guard.written_once(y1[: x.count], y2[: x.count])
    assert torch.equal(y1[: x.count, :passive], rounded(expected[:, :passive], precision))
    assert torch.equal(y2[: x.count, : features - passive], expected[:, passive:])
    assert not y1[: x.count, passive:].any()
    assert not y2[: x.count, features - passive :].any()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_one_half_is_read_by_index_from_a_feature_major_state(precision: str) -> None:
    state = torch.randn(41, PADDED_ROWS).to(operand_dtype(precision))
    index = torch.cat([torch.randperm(41)[:21], torch.zeros(WIDTH - 21)]).int()
    with guarded() as guard:
        y1 = torch.empty(PADDED_ROWS, WIDTH, dtype=operand_dtype(precision))
        x1 = Rows(state, 42, 21, 1, PADDED_ROWS, index=index)
        packing_launch(x1, None, Rows(y1, 42, WIDTH, WIDTH, 1), None, CONFIG, precision, rounded=True).run()
    guard.written_once(y1[:42])
    assert torch.equal(y1[:42, :21], rounded(state.float(), precision)[index[:21].long(), :42].T)
    assert not y1[:42, 21:].any()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_one_half_of_a_feature_major_state_by_index(precision: str) -> None:
    maps = torch.randn(2, 41, 3, 7)
    others = 1 + torch.randperm(40)
    index = torch.cat([torch.zeros(1), others[:20], torch.zeros(43)]).int()  # what pads it has the first one's place
    x = map_rows(maps)
    state = torch.full((41, PADDED_ROWS), torch.nan).to(operand_dtype(precision))
    with guarded():
        place = Rows(state, x.count, 21, 1, PADDED_ROWS, index=index)
        packing_launch(x.narrow(0, 21), None, place, None, CONFIG, precision, rounded=True).run()
    expected = rounded(maps[:, :21].permute(1, 0, 2, 3).flatten(1), precision)
    assert torch.equal(state[index[:21].long(), : x.count], expected)
    assert state[others[20:]].isnan().all()


def test_a_state_in_float32_keeps_every_digit_beside_tf32_operands() -> None:
    x = loose_rows(torch.randn(5, 12))
    y1 = torch.empty(PADDED_ROWS, WIDTH)
    packing_launch(x.narrow(0, 6), None, Rows(y1, 5, WIDTH, WIDTH, 1), None, CONFIG, "tf32", rounded=False).run()
    assert torch.equal(y1[:5, :6], x.tensor[:, :6])


CASES = {
    "soft, as a bf16 encoder gives them": (True, "bf16", torch.bfloat16, torch.channels_last, False),
    "soft, bf16 feature by feature": (True, "bf16", torch.bfloat16, torch.contiguous_format, True),
    "soft, float32 beside bf16": (True, "bf16", torch.float32, torch.channels_last, True),
    "soft, float32 beside tf32": (True, "tf32", torch.float32, torch.channels_last, False),
    "soft, float32 feature by feature": (True, "tf32x3", torch.float32, torch.contiguous_format, True),
    "hard, as a bf16 encoder gives them": (False, "bf16", torch.bfloat16, torch.channels_last, False),
    "hard, bf16 feature by feature": (False, "bf16", torch.bfloat16, torch.contiguous_format, False),
    "hard, float32 beside bf16": (False, "bf16", torch.float32, torch.channels_last, True),
    "hard, float32 in parts": (False, "tf32x3", torch.float32, torch.contiguous_format, False),
    "hard, float32 as it is": (False, "ieee", torch.float32, torch.contiguous_format, False),
    "hard, bf16 beside float32": (False, "ieee", torch.bfloat16, torch.contiguous_format, True),
}


@pytest.mark.parametrize("case", CASES)
def test_only_features_that_are_not_taken_as_a_state_is_are_packed(case: str) -> None:
    soft, precision, dtype, memory_format, packed = CASES[case]
    weights = specimen_weights(512, soft, torch.bfloat16 if precision == "bf16" else torch.float32)
    maps = torch.empty(2, 512, 8, 8, dtype=dtype, device="meta", memory_format=memory_format)
    launches = decoder_launches(weights, maps, precision, Chip())
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("packing_kernel") == packed
    assert names.index("linear_kernel") == packed
    outer = [launch.constexprs.get("OUTER", False) for launch in launches]
    assert sum(outer) == (not soft) if packed else outer[0]


LAID_DOWN = {
    "tf32": ("tf32", 512, 8, 8),
    "one image in tf32": ("tf32", 2048, 1, 8),
    "bf16, many wide rows": ("bf16", 2048, 32, 7),
    "bf16, few wide rows": ("bf16", 2048, 1, 0),
    "bf16, many narrow rows": ("bf16", 512, 32, 0),
    "in parts": ("tf32x3", 2048, 32, 0),
}


@pytest.mark.parametrize("case", LAID_DOWN)
def test_what_a_hard_permutation_leaves_is_laid_down_where_that_is_faster(case: str) -> None:
    """Every block's x1, but the first one's where an encoder left operands."""
    precision, features, images, count = LAID_DOWN[case]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    maps = torch.empty(images, features, 8, 8, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    launches = decoder_launches(specimen_weights(features, False, dtype), maps, precision, Chip())
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("packing_kernel") == count
    taken = [launch.args["index_ptr"] for launch in launches if launch.kernel.__name__ == "linear_kernel"]
    assert sum(index is not None for index in taken) == (0 if count else 7)


def test_loose_rows_in_float32_are_packed_beside_bf16() -> None:
    weights = specimen_weights(512, True, torch.bfloat16)
    z, c = torch.empty(9, 512, device="meta"), torch.empty(9, 128, device="meta")
    names = [launch.kernel.__name__ for launch in rows_launches(weights, z, c, "bf16", Chip())]
    assert names[0] == "packing_kernel"
