"""A soft permutation and the next first layer as one product: the same decoder, in fewer launches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kernel_guards import guarded
from triton_flows import CONDITION, TOLERANCES, Flows, use_small_tiles

from cflow_fast.bench.specimens import specimen_weights
from cflow_fast.kernels import phases, triton_flow
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import CouplingConfig, LinearConfig, MergingConfig, Problem, candidates, rule
from cflow_fast.kernels.merging import is_merged, merge
from cflow_fast.kernels.phase_weights import PhaseWeights

SOFT = ("matrices", "rotations", "a matrix, then rotations")
each_soft_mixing = pytest.mark.parametrize("mixing", SOFT)


@pytest.fixture(autouse=True)
def merged_in_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)
    merging(monkeypatch, True)


def merging(monkeypatch: pytest.MonkeyPatch, merges: bool) -> None:
    monkeypatch.setattr(triton_flow, "is_merged", lambda *_: merges)


@each_soft_mixing
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize(("features", "blocks"), [(41, 3), (160, 2), (72, 4)])
def test_merged_decoders_agree_with_float64(features: int, blocks: int, precision: str, mixing: str) -> None:
    flows = Flows(mixing, precision, features, coupling_blocks=blocks)
    maps = flows.maps(3, 3, 8)
    with guarded() as guard:
        assert flows.error(maps) < TOLERANCES[precision]
    products = [launch.name for launch in guard.launches if launch.name in ("linear_kernel", "coupling_kernel")]
    assert len(products) == 2 * blocks, "nothing mixes by itself"


@each_soft_mixing
@pytest.mark.parametrize(("condition", "activation"), [(CONDITION, "relu"), (0, "softplus")])
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_merged_rows_and_their_u_agree_with_float64(
    precision: str, condition: int, activation: str, mixing: str
) -> None:
    flows = Flows(mixing, precision, 41, condition, activation=activation)
    flows.check_rows(TOLERANCES[precision])


@each_soft_mixing
def test_merged_decoders_stay_in_bounds_and_depend_on_nothing_unwritten(mixing: str) -> None:
    flows = Flows(mixing, "bf16", 41)
    maps, (z, c) = flows.maps(1, 5, 7), flows.rows(3)
    with guarded() as guard:
        log_prob = flows.log_prob(maps)
        guard.written_once(log_prob)
        result = flows.triton.rows(z, c, want_u=True)
    assert all(tensor is not None and tensor.isfinite().all() for tensor in (log_prob, *result))
    assert torch.equal(flows.log_prob(maps), log_prob)


@pytest.mark.parametrize("mixing", ["matrices", "rotations"])
def test_merged_bf16_loses_about_what_launches_of_their_own_do(mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root mean square. Between the two there is no more than both lose, if they have nothing in common."""
    monkeypatch.setattr(phases, "select_linear", lambda *_, **__: LinearConfig(128, 128, 64, 4, 2))
    monkeypatch.setattr(phases, "select_coupling", lambda *_: CouplingConfig(128, 64, 64, 4, 2))
    errors, between = dict.fromkeys((False, True), 0.0), 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        flows = Flows(mixing, "bf16", 128, seed=seed)
        maps = flows.maps(2, 8, 8)
        exact = flows.exact.log_prob_map(maps.double(), flows.encoding(maps))
        found = {}
        for merges in errors:
            merging(monkeypatch, merges)
            found[merges] = flows.log_prob(maps)
            errors[merges] += float((found[merges] - exact).square().sum())
        between += float((found[True] - found[False]).square().sum())
    assert errors[True] < 1.3**2 * errors[False]
    assert between < 1.1 * sum(errors.values())


@pytest.mark.parametrize("few", [35, 36], ids=["not merged", "merged"])
def test_all_chunks_of_a_call_are_merged_or_none(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 positions, of which what is left over by chunks of 24 are few."""
    monkeypatch.setattr(triton_flow, "is_merged", lambda prepared, rows, chip: rows <= few)
    flows = Flows("rotations", features=64)
    maps, (z, c) = flows.maps(3, 3, 4), flows.rows(36)
    expected = flows.log_prob(maps), *flows.triton.rows(z, c, want_u=True)
    assert ("merged" in flows.triton.made) == (few == 36)
    monkeypatch.setattr(triton_flow, "CHUNK_ROWS", 24)
    for ours, whole in zip((flows.log_prob(maps), *flows.triton.rows(z, c, want_u=True)), expected, strict=True):
        assert torch.equal(ours, whole)


def test_nothing_is_merged_inside_somebodys_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made there is only there after a replay, and would be kept for other calls."""
    flows = Flows("matrices", features=64)
    maps, rows = flows.maps(1, 2, 2), flows.rows(3)
    merging(monkeypatch, False)
    expected = flows.log_prob(maps), flows.triton.rows(*rows, want_u=True)
    merging(monkeypatch, True)
    with monkeypatch.context() as capture:
        capture.setattr(triton_flow, "in_capture", lambda device: True)
        assert torch.equal(flows.log_prob(maps), expected[0])
        assert torch.equal(flows.triton.rows(*rows, want_u=True).u, expected[1].u)
        assert "merged" not in flows.triton.made
        assert flows.triton.merged.merged, "as a warm-up of rows leaves it"
        assert torch.equal(flows.log_prob(maps), expected[0]), "there are no tables yet"
        assert not torch.equal(flows.triton.rows(*rows, want_u=True).u, expected[1].u)
    assert not torch.equal(flows.log_prob(maps), expected[0])
    with monkeypatch.context() as capture:
        capture.setattr(triton_flow, "in_capture", lambda device: True)
        assert not torch.equal(flows.log_prob(maps), expected[0])


def test_threads_make_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that one of them captures reads what it made, and keeps nothing alive."""
    flows = Flows("matrices", features=64)
    made, both_ask = [], threading.Barrier(2)

    def slowly(prepared: PhaseWeights) -> PhaseWeights:
        time.sleep(0.05)
        made.append(merge(prepared))
        return made[-1]

    monkeypatch.setattr(triton_flow, "merge", slowly)

    def ask() -> PhaseWeights:
        both_ask.wait()
        return flows.triton.merged

    with ThreadPoolExecutor(2) as threads:
        found = [future.result() for future in [threads.submit(ask) for _ in range(2)]]
    assert len(made) == 1
    assert found[0] is found[1] is made[0]


def test_rows_that_are_not_merged_keep_no_second_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    merging(monkeypatch, False)
    flows = Flows("matrices", features=64, coupling_blocks=2)
    flows.log_prob(flows.maps(1, 2, 2))
    assert set(flows.triton.made) == {"prepared"}


def test_other_matrices_are_shared() -> None:
    prepared = PhaseWeights.prepare(specimen_weights(64, True, torch.bfloat16), "bf16")
    merged = merge(prepared)
    assert merged.w2 is prepared.w2
    assert [tuple(w1.shape) for w1 in merged.w1] == [(320, 64), *[(320 + 128, 128)] * 7]


@pytest.mark.parametrize(
    ("features", "few", "many"), [(256, 4096, 8192), (512, 1024, 4096), (1024, 1024, 2048), (2048, 256, 512)]
)
def test_few_rows_are_merged(features: int, few: int, many: int) -> None:
    """WideResNet-50's of one image at 256 px, and the two coarser ones at 512 px."""
    prepared = PhaseWeights.prepare(specimen_weights(features, True, torch.bfloat16), "bf16")
    assert is_merged(prepared, few, Chip())
    assert not is_merged(prepared, many, Chip())
    for card in (Chip((8, 0)), Chip((10, 0)), Chip(multiprocessors=16)):
        assert not is_merged(prepared, few, card), "nothing is predicted of it, or it has less"
    assert not is_merged(replace(prepared, soft=None), few, Chip())


def test_single_blocks_and_other_precisions_are_not_merged() -> None:
    assert not is_merged(PhaseWeights.prepare(specimen_weights(64, True, torch.bfloat16, blocks=1), "bf16"), 1, Chip())
    for precision in ("ieee", "tf32", "tf32x3", "fp16", "fp16x3"):
        prepared = PhaseWeights.prepare(specimen_weights(64, True, torch.float32), precision)
        assert not is_merged(prepared, 1, Chip())


@pytest.mark.parametrize("rows", [64, 1 << 15])
def test_either_way_may_stand_in_a_table(rows: int) -> None:
    problem = Problem("merging", "bf16", rows, (2304, 1024))
    assert candidates(problem, Chip()) == [rule(problem, Chip()), MergingConfig(rows > 64)]
    assert candidates(problem._replace(precision="tf32"), Chip()) == [MergingConfig(False)]
