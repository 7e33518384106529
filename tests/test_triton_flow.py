"""Triton's kernels, put together, are the folded decoder: against PyTorch, float64 and FrEIA, however rows arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flows import rough_decoder
from kernel_guards import guarded
from triton_flows import CONDITION, TOLERANCES, Flows, each_mixing, use_small_tiles

from cflow_fast import parity
from cflow_fast.bench.headline import decoder_launches
from cflow_fast.bench.specimens import specimen_weights
from cflow_fast.kernels import phases, table_cache, triton_flow, tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import (
    OPERAND_BYTES,
    SHARED_MEMORY,
    CouplingConfig,
    LayingConfig,
    LinearConfig,
    Problem,
    candidates,
    rule,
    select_coupling,
    select_linear,
)
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.triton_flow import TritonFlow
from cflow_fast.kernels.tuning import select_whole_flow

PRECISIONS = ("ieee", "tf32x3", "fp16x3", "tf32", "fp16", "bf16")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@each_mixing
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("features", [41, 160])
def test_maps_agree_with_float64(features: int, precision: str, mixing: str) -> None:
    """Halves and hidden layers of 1 to 3 tiles, padded differently; 72 positions in two tiles of rows."""
    flows = Flows(mixing, precision, features, coupling_blocks=3 if features == 41 else 2)
    assert flows.error(flows.maps(3, 3, 8)) < TOLERANCES[precision]


@each_mixing
@pytest.mark.parametrize(("condition", "activation"), [(CONDITION, "relu"), (0, "softplus")])
@pytest.mark.parametrize("precision", ["ieee", "fp16x3", "fp16", "bf16"])
def test_rows_with_a_condition_of_their_own_agree_with_float64(
    precision: str, condition: int, activation: str, mixing: str
) -> None:
    flows = Flows(mixing, precision, condition=condition, activation=activation, coupling_blocks=2)
    flows.check_rows(TOLERANCES[precision])


@pytest.mark.parametrize("mixing", ["hard", "rotations"])
def test_maps_without_a_condition_agree_with_float64(mixing: str) -> None:
    flows = Flows(mixing, condition=0)
    assert flows.error(flows.maps(1, 4, 5)) < TOLERANCES["ieee"]


@pytest.mark.parametrize("mixing", ["hard", "matrices"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (2, 64), (1, 128)])
def test_positions_of_maps_of_any_size(height: int, width: int, mixing: str) -> None:
    flows = Flows(mixing, coupling_blocks=2)
    flows_error = flows.error(flows.maps(1, height, width))
    assert flows_error < TOLERANCES["ieee"]


@each_mixing
@pytest.mark.parametrize("precision", ["ieee", "fp16x3", "bf16"])
def test_single_block_is_first_and_last_at_once(precision: str, mixing: str) -> None:
    """Of features that are read where they lie, and of packed ones."""
    flows = Flows("matrices" if mixing.startswith("a matrix") else mixing, precision, coupling_blocks=1)
    z, c = flows.rows(5)
    ours, exact = flows.triton.rows(z, c, want_u=True), flows.exact_rows(z, c)
    tolerance = 100 * TOLERANCES[precision]
    torch.testing.assert_close(ours.log_prob.double(), exact.log_prob, rtol=0.1 * tolerance, atol=tolerance)
    torch.testing.assert_close(ours.u, exact.u, rtol=tolerance, atol=0.1 * tolerance, check_dtype=False)


@pytest.mark.parametrize("permute_soft", [False, True])
def test_decoder_agrees_with_freia_in_float64(permute_soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    decoder = rough_decoder(64, CONDITION, permute_soft=permute_soft)
    z, c = torch.randn(20, 64), torch.randn(20, CONDITION)
    u, log_det = decoder.fold("fp32")(z, [c])
    with torch.no_grad():
        exact_u, exact_log_det = decoder.double().to_freia().double().eval()(z.double(), [c.double()])
    torch.testing.assert_close(u.double(), exact_u, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det.double(), exact_log_det, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("permute_soft", [False, True])
def test_folded_decoder_on_triton_loses_no_more_than_freia(permute_soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    monkeypatch.setattr(phases, "select_linear", lambda *_, **__: LinearConfig(128, 128, 64, 4, 2))
    monkeypatch.setattr(phases, "select_coupling", lambda *_: CouplingConfig(128, 64, 64, 4, 2))
    rows = list(parity.check(parity.random_case(64, permute_soft, size=(1, 12, 16))))
    assert [(row.backend, row.precision) for row in rows] == [("triton", "fp32"), ("triton", "bf16")]
    for row in rows:
        assert row.passed, f"{row.case} {row.precision}: {'; '.join(row.failures)}"


def test_folded_decoder_runs_its_working_copy_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLOW_FAST_BACKEND", "triton")
    decoder = rough_decoder(64, CONDITION, coupling_blocks=1)
    folded = decoder.fold("bf16")
    assert isinstance(folded.flow, TritonFlow)
    assert folded.flow.precision == "bf16"
    assert folded.log_prob(torch.randn(1, 64, 2, 3)).shape == (1, 2, 3)
    assert isinstance(decoder.double().fold().flow, TorchFlow)


@each_mixing
@pytest.mark.parametrize("precision", ["tf32", "fp16", "fp16x3", "bf16"])
def test_kernels_stay_in_bounds_and_depend_on_nothing_unwritten(precision: str, mixing: str) -> None:
    """With an odd D, ragged everywhere; fresh memory holds NaN."""
    flows = Flows(mixing, precision, 41, coupling_blocks=2)
    maps, (z, c) = flows.maps(1, 5, 7), flows.rows(3)
    with guarded() as guard:
        log_prob = flows.log_prob(maps)
        guard.written_once(log_prob)
        result = flows.triton.rows(z, c, want_u=True)
    assert all(tensor is not None and tensor.isfinite().all() for tensor in (log_prob, *result))


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bf16"])
def test_laying_a_half_down_row_by_row_changes_no_bit(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for lays_down in (False, True):
        monkeypatch.setattr(phases, "select_laying", lambda *_, lays_down=lays_down: LayingConfig(lays_down))
        torch.manual_seed(0)
        flows = Flows("hard", precision, 41)
        maps, (z, c) = flows.maps(2, 5, 7), flows.rows(9)
        with guarded() as guard:
            results.append((flows.log_prob(maps), flows.triton.rows(z, c, want_u=True).u))
        assert ("packing_kernel" in {launch.name for launch in guard.launches}) >= lays_down
    for indexed, laid_down in zip(*results, strict=True):
        assert torch.equal(indexed, laid_down)


@each_mixing
@pytest.mark.parametrize("factor", [1e-30, 1e-4, 1e4, 1e12])
def test_features_of_any_size_lose_no_more_digits_as_scaled_operands(factor: float, mixing: str) -> None:
    """As those of fp32's range do: trained decoders carry defects far beyond what fp16 holds."""
    errors = {}
    for precision in ("fp16", "tf32", "fp16x3", "tf32x3"):
        torch.manual_seed(0)
        flows = Flows(mixing, precision, coupling_blocks=2)
        maps = factor * flows.maps(1, 3, 8)
        exact = flows.exact.log_prob_map(maps.double(), flows.encoding(maps))
        deviation = (flows.log_prob(maps) - exact).abs()
        errors[precision] = float((deviation / exact.abs().clamp(min=flows.features)).max())
    assert errors["fp16"] <= 1.5 * errors["tf32"] + 1e-7
    assert errors["fp16x3"] <= 1.5 * errors["tf32x3"] + 1e-7


@each_mixing
@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_features_beyond_what_squares_hold_are_minus_infinite_as_in_fp32(precision: str, mixing: str) -> None:
    flows = Flows(mixing, precision, 64, coupling_blocks=2)
    exact = Flows(mixing, "ieee", 64, coupling_blocks=2)
    for factor in (1e34, 1e36, 1e37):
        torch.manual_seed(0)
        maps = factor * flows.maps(1, 2, 3)
        assert torch.equal(flows.log_prob(maps), exact.log_prob(maps)), "-inf"


def test_conditions_of_any_size_fit_scaled_operands() -> None:
    errors = {}
    for precision in ("fp16x3", "tf32x3"):
        torch.manual_seed(0)
        flows = Flows("rotations", precision, coupling_blocks=2)
        z, c = flows.rows(9)
        assert c is not None
        exact = flows.exact_rows(z, 1e5 * c).log_prob
        errors[precision] = float((flows.triton.rows(z, 1e5 * c, want_u=False).log_prob / exact - 1).abs().max())
    assert errors["fp16x3"] <= 1.5 * errors["tf32x3"] + 1e-7


@each_mixing
def test_result_is_bitwise_the_same_from_run_to_run(mixing: str) -> None:
    flows = Flows(mixing, features=64, coupling_blocks=2)
    maps = flows.maps(1, 3, 5)
    assert torch.equal(flows.log_prob(maps), flows.log_prob(maps))


@pytest.mark.parametrize("mixing", ["hard", "rotations"])
def test_maps_may_lie_anyhow_and_in_any_dtype(mixing: str) -> None:
    flows = Flows(mixing, coupling_blocks=2)
    maps = flows.maps(2, 3, 4).bfloat16()
    expected = flows.log_prob(maps.float())
    for same in (maps, maps.contiguous(memory_format=torch.channels_last), maps.mT.contiguous().mT, maps.double()):
        assert torch.equal(flows.log_prob(same), expected)


@pytest.mark.parametrize("mixing", ["hard", "matrices"])
@pytest.mark.parametrize("chunk", [5, 12, 25])
def test_chunks_of_rows_do_not_show(chunk: int, mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 positions in lines of 4: chunks of a line, of an image, of two images."""
    flows = Flows(mixing, features=64, coupling_blocks=1)
    maps, (z, c) = flows.maps(3, 3, 4), flows.rows(11)
    whole = flows.log_prob(maps), *flows.triton.rows(z, c, want_u=True)
    monkeypatch.setattr(triton_flow, "CHUNK_ROWS", chunk)
    for chunked, expected in zip((flows.log_prob(maps), *flows.triton.rows(z, c, want_u=True)), whole, strict=True):
        assert torch.equal(chunked, expected)


@each_mixing
@pytest.mark.parametrize("condition", [0, CONDITION])
def test_no_rows_are_no_rows(condition: int, mixing: str) -> None:
    flows = Flows(mixing, condition=condition)
    result = flows.triton.rows(*flows.rows(0), want_u=True)
    assert result.u is not None
    assert (result.log_prob.shape, result.u.shape) == ((0,), (0, flows.features))
    for shape in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        assert flows.log_prob(flows.maps(*shape)).shape == shape


@each_mixing
@pytest.mark.parametrize("precision", ["ieee", "fp16", "fp16x3"])
def test_position_that_is_not_finite_spoils_no_other(precision: str, mixing: str) -> None:
    flows = Flows(mixing, precision, coupling_blocks=2)
    maps = flows.maps(1, 4, 6)
    expected = flows.log_prob(maps)
    maps[0, 3, 1, 2], maps[0, 60, 3, 5] = torch.nan, torch.inf
    ours = flows.log_prob(maps)
    assert (~ours.isfinite()).nonzero().tolist() == [[0, 1, 2], [0, 3, 5]]
    assert torch.equal(ours[ours.isfinite()], expected[ours.isfinite()])


def test_narrow_decoder_runs_whole_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_flow, "select_whole_flow", select_whole_flow)
    flows = Flows("rotations", features=24, coupling_blocks=2)
    with guarded() as guard:
        assert flows.error(flows.maps(1, 3, 5)) < TOLERANCES["ieee"]
        z, c = flows.rows(7)
        ours, exact = flows.triton.rows(z, c, want_u=True), flows.exact_rows(z, c)
    assert {launch.name for launch in guard.launches} == {"whole_flow_kernel"}
    torch.testing.assert_close(ours.log_prob.double(), exact.log_prob, rtol=1e-5, atol=1e-4)


def test_tables_of_few_sizes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "MAX_TABLES", 2)
    flows = Flows("hard", features=64, coupling_blocks=1)
    for width in (1, 2, 3):
        flows.log_prob(flows.maps(1, 1, width))
    assert [(1, width, False) in flows.triton.tables for width in (1, 2, 3)] == [False, True, True]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_every_tile_fits_the_card(capability: tuple[int, int], precision: str) -> None:
    chip = Chip(capability, 132)
    x_bytes, w_bytes = OPERAND_BYTES.get(precision, (4, 4))
    for rows in (1, 64, 256, 1024, 2048, 8192, 32768):
        for half in (64, 256, 512, 1024):
            hidden = 2 * (half + 128)
            b = select_coupling(rows, hidden, half, precision, chip)
            held = {(b.block_rows, 2 * b.block_out, b.block_k, b.stages)}
            for inputs, outputs in ((half, hidden), (2 * half, 2 * half)):
                a = select_linear(rows, inputs, outputs, precision, chip)
                held.add((a.block_rows, a.block_out, a.block_k, a.stages))
                assert (a.split_k - 1) * -(-inputs // a.block_k // a.split_k) * a.block_k < inputs, "no idle split"
            for block_rows, block_out, block_k, stages in held:
                held_at_once = stages * block_k * (x_bytes * block_rows + w_bytes * block_out)
                assert held_at_once <= SHARED_MEMORY[capability] * 1024
                assert block_rows <= phases.ROW_PADDING


def test_few_rows_still_give_every_multiprocessor_work() -> None:
    """One image's three scales run side by side; alone each keeps half of an H100 busy at least."""
    for half, rows in ((256, 1024), (512, 256), (1024, 64)):
        hidden = 2 * (half + 128)
        a, b = select_linear(rows, half, hidden, "bf16", Chip()), select_coupling(rows, hidden, half, "bf16", Chip())
        for config, outputs in ((a, hidden), (b, half)):
            tiles = -(-rows // config.block_rows) * -(-outputs // config.block_out)
            assert 60 <= tiles <= 200
            assert config.split_k == 1 or hidden >= 16 * config.block_k, "sums that are split come together late"


@pytest.mark.parametrize("permute_soft", [False, True])
def test_few_rows_of_halves_that_no_deep_step_divides_agree_with_float64(
    permute_soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EfficientNet-Lite0's coarsest scale: 192 and 576 inputs, in the tiles that are launched on a card."""
    monkeypatch.setattr(phases, "select_linear", tuning.select_linear)
    monkeypatch.setattr(phases, "select_coupling", tuning.select_coupling)
    flows = Flows("matrices" if permute_soft else "hard", "bf16", 320, 128, coupling_blocks=2)
    maps = flows.maps(1, 2, 3)
    with guarded():
        assert flows.error(maps) < TOLERANCES["bf16"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 64, 300, 2048, 40000])
def test_every_step_of_every_tile_that_may_be_launched_divides_its_inputs(rows: int, precision: str) -> None:
    for chip in (Chip((9, 0)), Chip((8, 0))):
        for inputs in range(64, 2368, 64):
            for problem in (
                Problem("linear", precision, rows, (inputs, 1280, 0)),
                Problem("linear", precision, rows, (inputs, 256, 1)),
                Problem("coupling", precision, rows, (inputs, 160)),
            ):
                tiles: list[Any] = [rule(problem, chip), *candidates(problem, chip)]
                assert not [tile for tile in tiles if inputs % tile.block_k]


@pytest.mark.parametrize(
    ("side", "capability", "early"),
    [(32, (9, 0), True), (64, (9, 0), False), (32, (8, 0), False)],
    ids=["few rows", "many rows", "a card without it"],
)
@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp16x3"])
def test_launches_for_few_rows_begin_early_but_for_the_first(
    side: int, capability: tuple[int, int], early: bool, permute_soft: bool, precision: str
) -> None:
    """What is launched in between would have to be, too: the counters of split sums are there before the first."""
    weights = specimen_weights(512, permute_soft, torch.bfloat16 if precision == "bf16" else torch.float32)
    features = torch.empty(1, 512, side, side, device="meta")
    launches = decoder_launches(weights, features, precision, Chip(capability))
    begins = [launch.constexprs.get("EARLY", False) for launch in launches]
    assert begins == [False, *[early] * (len(launches) - 1)]
    assert [launch.options.get("launch_pdl", False) for launch in launches] == begins
