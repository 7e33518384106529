"""The whole decoder in one kernel computes what the twin and FrEIA compute, in every precision, shape and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flows import rough_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_guards import guard, guarded  # noqa: F401  guard is a fixture
from torch import Tensor
from whole_flow_oracle import oracle_rows

from cflow_fast import FlowDecoder
from cflow_fast.decoder import gaussian_log_prob
from cflow_fast.folding import fold_weights
from cflow_fast.kernels import whole_flow
from cflow_fast.kernels.configs import WholeFlowConfig, select_whole_flow
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.torch_flow import TorchFlow, positional_tables
from cflow_fast.kernels.weights import FlowWeights, SoftMixing
from cflow_fast.kernels.whole_flow import Cover, whole_flow_map, whole_flow_rows
from cflow_fast.kernels.whole_flow_weights import WholeFlowWeights, paired, tiles
from cflow_fast.parity import EmulatedAutocast, measure
from cflow_fast.positional import encoding_factors, positional_encoding

SMALL = WholeFlowConfig(block_rows=64, block_hidden=64, warps=4, stages=2)
SHAPE = (2, 5, 7)  # 70 positions: tiles end within lines, images and the batch

each_mixing = pytest.mark.parametrize("permute_soft", [False, True], ids=["hard", "soft"])
each_size = pytest.mark.parametrize("features", [40, 41, 64, 112, 160])


def fold(decoder: FlowDecoder, precision: str) -> FlowWeights:
    return fold_weights(decoder, torch.bfloat16 if precision == "bf16" else torch.float32)


def maps_for(decoder: FlowDecoder, batch: int = 2, height: int = 5, width: int = 7) -> Tensor:
    return 1.3 * torch.randn(batch, decoder.features, height, width, generator=torch.Generator().manual_seed(1))


def kernel_map(
    weights: FlowWeights, features: Tensor, precision: str = "ieee", config: WholeFlowConfig = SMALL
) -> Tensor:
    prepared = WholeFlowWeights.prepare(weights, precision)
    tables = None
    if weights.condition:
        encoding = encoding_factors(weights.condition, *features.shape[2:])
        tables = prepared.tables(positional_tables(weights, encoding, torch.float32))
    return whole_flow_map(features, prepared, tables, config)


def rows_of(features: Tensor, condition: int) -> tuple[Tensor, Tensor | None]:
    """As the published code sees a map: rows, and the encoding of each."""
    batch, channels, height, width = features.shape
    z = features.permute(0, 2, 3, 1).reshape(-1, channels)
    if not condition:
        return z, None
    encoding = positional_encoding(condition, height, width).to(z.dtype)
    return z, encoding.flatten(1).t().repeat(batch, 1)


@torch.no_grad()
def freia_map(decoder: FlowDecoder, features: Tensor, dtype: torch.dtype) -> Tensor:
    """log p / D by FrEIA's own modules."""
    z, c = rows_of(features.to(dtype), decoder.condition)
    u, log_det = decoder.to_freia().to(dtype)(z, None if c is None else [c])
    return ((gaussian_log_prob(u) + log_det) / decoder.features).view(features.shape[0], *features.shape[2:])


@each_size
@each_mixing
def test_map_in_fp32_is_as_accurate_as_freia(features: int, permute_soft: bool, guard: Any) -> None:  # noqa: F811
    decoder = rough_decoder(features, 128, permute_soft=permute_soft)
    maps = maps_for(decoder)
    exact = freia_map(decoder, maps, torch.float64)
    log_prob = kernel_map(fold(decoder, "ieee"), maps)
    guard.written_once(log_prob)
    ours, theirs = measure(log_prob / features, exact), measure(freia_map(decoder, maps, torch.float32), exact)
    assert ours.maximum <= min(3e-6, 1.5 * theirs.maximum + 1e-7)


@each_size
@each_mixing
def test_map_agrees_with_its_twin(features: int, permute_soft: bool) -> None:
    decoder = rough_decoder(features, 128, permute_soft=permute_soft)
    weights, maps = fold(decoder, "ieee"), maps_for(decoder)
    twin = TorchFlow(weights, torch.float32, packed=False).log_prob_map(maps, encoding_factors(128, 5, 7))
    torch.testing.assert_close(kernel_map(weights, maps), twin, rtol=1e-6, atol=1e-6 * features)


@pytest.mark.parametrize("features", [41, 64, 160])
@each_mixing
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_operands_are_rounded_where_they_should_be_and_nowhere_else(
    features: int, permute_soft: bool, precision: str
) -> None:
    """The oracle rounds operands and state and computes the rest in float64; only ties of rounding may differ."""
    decoder = rough_decoder(features, 128, permute_soft=permute_soft, coupling_blocks=2)
    weights, maps = fold(decoder, precision), maps_for(decoder)
    z, c = rows_of(maps.double(), 128)
    assert c is not None
    rounded = oracle_rows(weights, z, c, precision, positional=True).log_prob
    ours = measure(kernel_map(weights, maps, precision) / features, rounded / features)
    unrounded = measure(freia_map(decoder, maps, torch.float64), rounded / features)
    assert ours.rms < 0.2 * unrounded.rms


@pytest.mark.parametrize("features", [41, 64, 160])
@each_mixing
def test_bf16_loses_less_than_freia_under_autocast(features: int, permute_soft: bool) -> None:
    decoder = rough_decoder(features, 128, permute_soft=permute_soft)
    maps = maps_for(decoder, 1, 8, 20)
    exact = freia_map(decoder, maps, torch.float64)
    with EmulatedAutocast():
        theirs = measure(freia_map(decoder, maps, torch.float32), exact)
    ours = measure(kernel_map(fold(decoder, "bf16"), maps, "bf16") / features, exact)
    assert ours.rms <= 0.9 * theirs.rms
    assert ours.spearman >= 0.9995


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@each_mixing
@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("condition", [0, 8, 100])
def test_loose_rows_agree_with_the_unfolded_decoder(
    precision: str,
    permute_soft: bool,
    activation: str,
    condition: int,
    guard: Any,  # noqa: F811
) -> None:
    decoder = rough_decoder(21, condition, permute_soft=permute_soft, activation=activation, coupling_blocks=2)
    z = torch.randn(70, 21)
    c = torch.randn(70, condition) if condition else None
    with torch.no_grad():
        u, log_det = decoder.double()(z.double(), None if c is None else [c.double()])
    prepared = WholeFlowWeights.prepare(fold(decoder, precision), precision)
    result = whole_flow_rows(z, c, prepared, want_u=True, config=SMALL)
    assert result.u is not None
    guard.written_once(*result)
    tolerance = {"ieee": 2e-6, "tf32": 1e-3, "bf16": 2e-2}[precision]
    torch.testing.assert_close(result.u.double(), u, rtol=0, atol=4 * tolerance)
    torch.testing.assert_close(result.log_det.double() / 21, log_det / 21, rtol=0, atol=tolerance)
    expected = (gaussian_log_prob(u) + log_det) / 21
    torch.testing.assert_close(result.log_prob.double() / 21, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("condition", [0, 8])
@each_mixing
def test_maps_of_every_variant_agree_with_float64(activation: str, condition: int, permute_soft: bool) -> None:
    decoder = rough_decoder(24, condition, permute_soft=permute_soft, activation=activation)
    weights, maps = fold(decoder, "ieee"), maps_for(decoder)
    exact = freia_map(decoder, maps, torch.float64) if activation == "relu" else None
    if exact is None:
        exact = decoder.double().log_prob(maps.double()).detach() / 24
    assert measure(kernel_map(weights, maps) / 24, exact).maximum < 3e-6


@pytest.mark.parametrize("features", [40, 41])
def test_blocks_with_a_matrix_and_blocks_with_a_rotation_in_one_decoder(
    features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for matrices in range(4):
        monkeypatch.setattr("cflow_fast.folding.matrix_blocks", lambda *_, count=matrices: count)
        decoder = rough_decoder(features, 8, permute_soft=True)
        weights, z, c = fold(decoder, "ieee"), torch.randn(33, features), torch.randn(33, 8)
        assert isinstance(weights.mixing, SoftMixing)
        assert weights.mixing.matrices == matrices
        prepared = WholeFlowWeights.prepare(weights, "ieee")
        result = whole_flow_rows(z, c, prepared, want_u=True, config=SMALL)
        with torch.no_grad():
            u, log_det = decoder.double()(z.double(), [c.double()])
        assert result.u is not None
        torch.testing.assert_close(result.u.double(), u, rtol=0, atol=1e-5)
        torch.testing.assert_close(result.log_prob.double(), gaussian_log_prob(u) + log_det, rtol=0, atol=1e-4)


@each_mixing
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_layout_of_a_map_in_memory_does_not_matter(permute_soft: bool, precision: str) -> None:
    decoder = rough_decoder(24, 8, permute_soft=permute_soft, coupling_blocks=2)
    weights, maps = fold(decoder, precision), maps_for(decoder)
    spaced = torch.full((4, 72, 15, 14), torch.nan)
    spaced[1::2, 1::3, ::3, ::2] = maps
    layouts = [
        maps.to(memory_format=torch.channels_last),
        spaced[1::2, 1::3, ::3, ::2],
        maps.mT.contiguous().mT,
        maps.flip(3).contiguous().flip(3),
        maps.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    expected = kernel_map(weights, maps, precision)
    for same in layouts:
        assert torch.equal(kernel_map(weights, same, precision), expected)
    one = torch.randn(1, 24, 1, 1).expand(2, 24, 5, 7)
    assert torch.equal(kernel_map(weights, one, precision), kernel_map(weights, one.contiguous(), precision))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_every_dtype_are_read_as_they_are(dtype: torch.dtype) -> None:
    decoder = rough_decoder(24, 8, coupling_blocks=2)
    weights, maps = fold(decoder, "ieee"), maps_for(decoder).to(dtype)
    assert torch.equal(kernel_map(weights, maps), kernel_map(weights, maps.float()))
    z, c = maps.flatten(2)[0].t(), torch.randn(35, 8).to(dtype)
    prepared = WholeFlowWeights.prepare(weights, "ieee")
    ours, expected = (whole_flow_rows(*x, prepared, False, SMALL) for x in ((z, c), (z.float(), c.float())))
    assert torch.equal(ours.log_prob, expected.log_prob)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 19),
    features=st.integers(2, 36),
    condition=st.sampled_from([0, 4, 8]),
    permute_soft=st.booleans(),
    precision=st.sampled_from(["ieee", "tf32"]),
    channels_last=st.booleans(),
)
def test_any_shape_agrees_with_the_twin(
    batch: int,
    height: int,
    width: int,
    features: int,
    condition: int,
    permute_soft: bool,
    precision: str,
    channels_last: bool,
) -> None:
    decoder = rough_decoder(features, condition, permute_soft=permute_soft, coupling_blocks=2)
    weights, maps = fold(decoder, precision), maps_for(decoder, batch, height, width)
    if channels_last:
        maps = maps.to(memory_format=torch.channels_last)
    encoding = encoding_factors(condition, height, width) if condition else None
    twin = TorchFlow(weights, torch.float32, packed=False).log_prob_map(maps, encoding)
    with guarded() as active:
        log_prob = kernel_map(weights, maps, precision)
    active.written_once(log_prob)
    tolerance = 3e-6 if precision == "ieee" else 5e-3
    torch.testing.assert_close(log_prob / features, twin / features, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "cover",
    [
        Cover(1, 8, 8, 16),
        Cover(2, 4, 8, 16),
        Cover(4, 4, 4, 16),
        Cover(1, 1, 64, 128),
        Cover(8, 4, 2, 16),
        Cover(0, 11, 0, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(5, 5, 7), (1, 9, 16)])
def test_every_cover_of_a_map_gives_the_same(
    cover: Cover, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cover.columns and cover.lines + shape[2] > cover.entries:
        cover = Cover(0, 5, 0, 32)
    decoder = rough_decoder(24, 8, coupling_blocks=2)
    weights, maps = fold(decoder, "tf32"), maps_for(decoder, *shape)
    expected = kernel_map(weights, maps, "tf32")
    monkeypatch.setattr(Cover, "of_maps", classmethod(lambda cls, *args: cover))
    with guarded() as active:
        log_prob = kernel_map(weights, maps, "tf32")
    active.written_once(log_prob)
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("width", [1, 3, 7, 8, 14, 28, 32, 56, 64, 200])
def test_chosen_cover_has_an_entry_for_every_line_and_column_it_touches(rows: int, width: int) -> None:
    for batch, height in ((1, width), (3, 2 * width), (32, 7)):
        cover = Cover.of_maps(batch, height, width, rows, places=32)
        if cover.columns:
            assert cover.images * cover.lines * cover.columns == rows
            assert cover.entries >= cover.lines + cover.columns
        else:
            touched = {
                (first + i) // width - first // width for first in range(0, 50 * rows, rows) for i in range(rows)
            }
            assert cover.lines > max(touched)
            assert cover.entries >= cover.lines + width


@pytest.mark.parametrize(
    "config", [WholeFlowConfig(16, 32, 4, 2), WholeFlowConfig(32, 32, 4, 3), WholeFlowConfig(128, 64, 8, 2)]
)
@each_mixing
def test_tile_shape_does_not_show(config: WholeFlowConfig, permute_soft: bool) -> None:
    decoder = rough_decoder(24, 8, permute_soft=permute_soft, coupling_blocks=2)
    weights, maps = fold(decoder, "ieee"), maps_for(decoder)
    torch.testing.assert_close(
        kernel_map(weights, maps, config=config), kernel_map(weights, maps), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("own_condition", [False, True])
def test_fewer_rows_get_smaller_tiles(capability: tuple[int, int], precision: str, own_condition: bool) -> None:
    for features in (2, 40, 64):
        chosen = [select_whole_flow(capability, features, 4**i, precision, own_condition) for i in range(12)]
        rows = [config.block_rows for config in chosen if config is not None]
        assert len(rows) == 12
        assert rows == sorted(rows)
    assert select_whole_flow(capability, 300, 10**6, precision, own_condition) is None


@each_mixing
def test_same_input_gives_the_same_bits(permute_soft: bool) -> None:
    decoder = rough_decoder(24, 8, permute_soft=permute_soft, coupling_blocks=2)
    weights, maps = fold(decoder, "bf16"), maps_for(decoder)
    assert torch.equal(kernel_map(weights, maps, "bf16"), kernel_map(weights, maps, "bf16"))


@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf, in numpy
@each_mixing
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_feature_that_is_not_finite_stays_at_its_position(permute_soft: bool, precision: str, value: float) -> None:
    decoder = rough_decoder(24, 8, permute_soft=permute_soft, coupling_blocks=2)
    weights, maps = fold(decoder, precision), maps_for(decoder)
    expected = kernel_map(weights, maps, precision)
    maps[1, 3, 2, 4] = value
    log_prob = kernel_map(weights, maps, precision)
    assert not log_prob[1, 2, 4].isfinite()
    log_prob[1, 2, 4] = expected[1, 2, 4]
    assert torch.equal(log_prob, expected)


@each_mixing
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_is_launched_for_no_rows(
    permute_soft: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launch, "run", lambda launch: pytest.fail("launched"))
    decoder = rough_decoder(24, 8, permute_soft=permute_soft)
    weights = fold(decoder, "ieee")
    log_prob = kernel_map(weights, torch.randn(shape[0], 24, *shape[1:]))
    assert (log_prob.shape, log_prob.dtype) == (shape, torch.float32)
    prepared = WholeFlowWeights.prepare(weights, "ieee")
    result = whole_flow_rows(torch.randn(0, 24), torch.randn(0, 8), prepared, want_u=True)
    assert result.u is not None
    assert [tuple(x.shape) for x in result if x is not None] == [(0,), (0,), (0, 24)]


def test_refusals_say_what_was_expected() -> None:
    decoder = rough_decoder(24, 8)
    weights = fold(decoder, "ieee")
    with pytest.raises(ValueError, match="precision is one of ieee, tf32, bf16, got 'fp16'"):
        WholeFlowWeights.prepare(weights, "fp16")
    with pytest.raises(TypeError, match="float64"):
        WholeFlowWeights.prepare(fold_weights(decoder, torch.float64), "ieee")
    prepared = WholeFlowWeights.prepare(weights, "ieee")
    with pytest.raises(ValueError, match=r"\(3, 12, 64\) are expected .* got \(3, 11, 64\)"):
        whole_flow_map(torch.randn(1, 24, 5, 7), prepared, torch.zeros(3, 11, 64), SMALL)
    with pytest.raises(ValueError, match="positional tables"):
        whole_flow_map(torch.randn(1, 24, 5, 7), prepared, None, SMALL)
    assert select_whole_flow((9, 0), 2048, 64, "bf16") is None
    wide = WholeFlowWeights.prepare(fold(rough_decoder(600, 0, coupling_blocks=1), "ieee"), "ieee")
    with pytest.raises(ValueError, match="600 features"):
        whole_flow_map(torch.randn(1, 600, 1, 1), wide, None)


@pytest.mark.parametrize(
    ("half", "expected"), [(1, (16, 0)), (20, (32, 0)), (21, (32, 0)), (32, (32, 0)), (33, (32, 16)), (56, (64, 0)),
                           (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0))]
)  # fmt: skip
def test_halves_are_padded_to_one_or_two_powers_of_two(half: int, expected: tuple[int, int]) -> None:
    assert tiles(half) == expected


def test_paired_outputs_lie_where_the_kernel_takes_them_apart() -> None:
    """Feature 8 g + 2 q + e of half b is column 16 g + 8 e + 2 q + b of its tile; the side tile comes after."""
    halves = torch.arange(2 * 48).view(1, 2, 48)
    columns = paired(halves, main=32)[0]
    for b in (0, 1):
        for feature in range(48):
            first, place = (0, feature) if feature < 32 else (64, feature - 32)
            g, q, e = place // 8, place % 8 // 2, place % 2
            assert columns[first + 16 * g + 8 * e + 2 * q + b] == halves[0, b, feature]


def test_launches_can_be_made_of_meta_tensors() -> None:
    """So that what is compiled ahead of time is what runs."""
    prepared = WholeFlowWeights.prepare(fold(rough_decoder(64, 128), "bf16"), "bf16")
    tables = torch.empty(3, 64, prepared.hidden, dtype=torch.bfloat16, device="meta")
    features, log_prob = torch.empty(32, 64, 32, 32, device="meta"), torch.empty(32, 32, 32, device="meta")
    launch = whole_flow.map_launch(features, prepared, tables, log_prob)
    assert launch.grid == (32 * 32 * 32 // launch.constexprs["BLOCK_ROWS"],)


def test_groups_of_warps_that_would_share_too_few_columns_are_refused() -> None:
    decoder = rough_decoder(160, 8, permute_soft=True, coupling_blocks=1)
    maps = maps_for(decoder)
    with pytest.raises(ValueError, match="8 warps cannot share 16 columns of 64 rows"):
        kernel_map(fold(decoder, "tf32"), maps, "tf32", WholeFlowConfig(64, 32, 8, 2))
