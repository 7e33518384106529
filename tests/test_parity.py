"""Folded decoders lose no more to rounding than FrEIA does, at every size; and the yardstick can turn red."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast import FlowDecoder, parity
from cflow_fast.folding import fold_weights
from cflow_fast.kernels import cpu_flow, torch_flow
from cflow_fast.kernels.cpu_library import library
from cflow_fast.kernels.weights import FlowWeights, round_to_tf32
from cflow_fast.parity import (
    Case,
    Error,
    check,
    log_prob_per_dimension,
    measure,
    model_cases,
    random_case,
    roughen,
)
from cflow_fast.precision import arithmetic

CPU = torch.device("cpu")


def assert_green(case: Case, reference: str = "FrEIA") -> None:
    rows = list(check(case))
    assert [(row.precision, row.backend) for row in rows] == [
        (precision, backend)
        for precision in ("fp32", "bf16")
        for backend in ("compiled", "torch")
        if backend == "torch" or library(arithmetic(precision, CPU).operands)
    ]
    for row in rows:
        assert row.reference == reference
        assert row.passed, f"{row.case} {row.backend} {row.precision}: {'; '.join(row.failures)}"


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("features", parity.SIZES)
def test_fold_is_as_accurate_as_freia(features: int, permute_soft: bool) -> None:
    assert_green(random_case(features, permute_soft))


@pytest.mark.parametrize("features", [41, 64, 160])
def test_bf16_of_narrow_soft_permutations_loses_a_quarter_of_what_freia_loses(features: int) -> None:
    """A soft permutation's matrix in bf16 would lose more than everything else."""
    for row in check(random_case(features, permute_soft=True), ["bf16"]):
        assert row.ours.rms < 0.25 * row.theirs.rms


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("features", [41, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"condition": 0},
        {"activation": "softplus"},
        {"global_affine_type": "SIGMOID"},
        {"global_affine_type": "EXP"},
        {"condition": 0, "activation": "softplus", "global_affine_type": "EXP"},
    ],
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_fold_of_every_variant_is_as_accurate_as_freia(
    features: int, permute_soft: bool, options: dict[str, Any]
) -> None:
    assert_green(random_case(features, permute_soft, **options))


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("features", [41, 64])
def test_fold_of_the_second_clamp_is_as_accurate_as_the_unfolded_decoder(features: int, permute_soft: bool) -> None:
    case = random_case(features, permute_soft, clamp="tanh(s/alpha)")
    assert_green(case, reference="unfolded (FrEIA's release has another clamp)")


def test_case_is_far_from_the_initial_parameters() -> None:
    """Or the comparison would be of a decoder that does next to nothing."""
    case = random_case(64)
    untrained = FlowDecoder(64).state_dict()
    for name, tensor in case.decoder.state_dict().items():
        if tensor.is_floating_point():
            assert (tensor - untrained[name]).square().mean().sqrt() > 0.02, name
    assert (case.decoder.log_prob(case.features) / 64).std() > 0.1


def test_case_is_drawn_by_its_seed_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second, other = random_case(41), random_case(41), random_case(41, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.features, second.features)
    assert not torch.equal(first.features, other.features)


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_emulated_autocast_is_the_real_one_but_for_the_order_of_sums(permute_soft: bool, activation: str) -> None:
    case = random_case(64, permute_soft, activation=activation, size=(1, 12, 20))
    freia: Any = case.decoder.to_freia().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real = parity.log_prob_per_dimension(freia, case)
    with parity.EmulatedAutocast():
        emulated = parity.log_prob_per_dimension(freia, case)
    in_fp32 = parity.log_prob_per_dimension(freia, case)
    assert (real == emulated).double().mean() > 0.9
    deviation, difference = measure(real, in_fp32), measure(emulated, real)
    assert difference.rms < 0.2 * deviation.rms
    assert measure(emulated, in_fp32).rms == pytest.approx(deviation.rms, rel=0.03)
    assert measure(emulated, in_fp32).maximum == pytest.approx(deviation.maximum, rel=0.1)


def test_autocast_is_emulated_only_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (False, True):
        monkeypatch.setattr("cflow_fast.parity.multiplies_bf16", lambda device, fast=fast: fast)
        assert isinstance(parity.autocast(CPU), torch.autocast if fast else parity.EmulatedAutocast)


def test_yardstick_of_tf32_is_freia_with_tf32_where_there_is_tf32() -> None:
    cuda = torch.device("cuda")
    on_card = {precision: parity.yardstick_of(precision, cuda) for precision in parity.precisions(cuda)}
    exact = dict.fromkeys(("fp32", "tf32x3", "fp16x3"), "fp32")
    assert on_card == exact | {"tf32": "tf32", "fp16": "tf32", "bf16": "bf16"}
    on_cpu = {precision: parity.yardstick_of(precision, CPU) for precision in on_card}
    assert on_cpu == dict.fromkeys(on_card, "fp32") | {"bf16": "bf16"}
    before = torch.backends.cuda.matmul.allow_tf32
    for kind in ("fp32", "tf32", "bf16"):
        with parity.arithmetic_of(kind, CPU):
            assert torch.backends.cuda.matmul.allow_tf32 == (kind == "tf32")
        assert torch.backends.cuda.matmul.allow_tf32 == before


def test_tf32_is_emulated_for_widths_that_cublas_has_none_for() -> None:
    x, weight, bias = torch.randn(5, 41), torch.randn(7, 41), torch.randn(7)
    with parity.arithmetic_of("tf32", CPU, features=41):
        assert not torch.backends.cuda.matmul.allow_tf32
        rounded = F.linear(x, weight, bias)
    assert torch.equal(rounded, F.linear(round_to_tf32(x), round_to_tf32(weight), bias))
    assert 1e-6 < (rounded - F.linear(x, weight, bias)).abs().max() < 1e-2


# Faults


def _scaled(field: str, factor: float, blocks: int = 1) -> Callable[[FlowWeights], FlowWeights]:
    def fault(weights: FlowWeights) -> FlowWeights:
        tensor = getattr(weights, field).clone()
        tensor[3 : 3 + blocks] *= factor
        return dataclasses.replace(weights, **{field: tensor})

    return fault


def _one_weight(weights: FlowWeights) -> FlowWeights:
    w1 = weights.w1.clone()
    w1[2, 5, 7] += 0.3
    return dataclasses.replace(weights, w1=w1)


FAULTS = {
    "one block's first layer is 1e-4 larger": (_scaled("w1", 1 + 1e-4), ["fp32"]),
    "one block's second layer is 1e-4 larger": (_scaled("w2", 1 + 1e-4), ["fp32"]),
    "one weight is wrong": (_one_weight, ["fp32"]),
    "the clamp is 5% off": (lambda w: dataclasses.replace(w, clamp=1.05 * w.clamp), ["fp32", "bf16"]),
    "two blocks' biases are missing": (_scaled("b1", 0.0, blocks=2), ["fp32", "bf16"]),
    "the scale's constant is missing": (lambda w: dataclasses.replace(w, log_scale=0.0), ["fp32", "bf16"]),
}


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_turns_the_row_red(fault: str, permute_soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, shown_in = FAULTS[fault]
    monkeypatch.setattr(
        "cflow_fast.folded.fold_weights", lambda decoder, storage: plant(fold_weights(decoder, storage))
    )
    rows = list(check(random_case(64, permute_soft)))
    assert [row.passed for row in rows] == [row.precision not in shown_in for row in rows]


def test_one_missing_bias_turns_every_row_red_with_hard_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With soft ones it is less than what FrEIA itself loses in bf16."""
    monkeypatch.setattr("cflow_fast.folded.fold_weights", lambda *args: _scaled("b1", 0.0)(fold_weights(*args)))
    assert not any(row.passed for row in check(random_case(64)))


def test_swapped_axes_turn_every_row_red(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = torch_flow.positional_tables

    def swapped(weights: FlowWeights, encoding: tuple[Tensor, Tensor], operand_dtype: torch.dtype) -> Any:
        right = tables(weights, encoding[::-1], operand_dtype)
        return torch_flow.PositionalTables(right.columns, right.rows)

    monkeypatch.setattr(torch_flow, "positional_tables", swapped)
    monkeypatch.setattr(cpu_flow, "positional_tables", swapped)
    assert not any(row.passed for row in check(random_case(64)))


def test_result_that_is_not_finite_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.folded.fold_weights", lambda *args: _scaled("w2", math.nan)(fold_weights(*args)))
    rows = list(check(random_case(64)))
    assert [row.failures for row in rows] == [["not finite"]] * len(rows)


# What is measured, and what is told


def test_errors_are_those_of_their_definition() -> None:
    exact = torch.tensor([[1.0, -2.0], [-4000.0, 3.0]])
    error = measure(exact + torch.tensor([[0.1, 0.0], [4.0, -0.2]], dtype=torch.float64), exact)
    assert error.maximum == pytest.approx(4.0)
    assert error.rms == pytest.approx(math.sqrt((0.01 + 16 + 0.04) / 4))
    assert error.bounded == pytest.approx(0.1)
    assert error.spearman == pytest.approx(1.0)
    assert measure(exact.flip(0), exact).spearman == pytest.approx(-0.6)


NO_ERROR = Error(0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "failures"),
    [
        ("fp32", Error(1.5e-6, 1.0, 3e-6, 0.0, 0.0), Error(1e-6, 0, 0, 1, 0.0), 0),
        ("fp32", Error(1.6e-6, 0.0, 1e-6, 1.0, 0.0), Error(1e-6, 0, 0, 1, 0.0), 1),
        ("fp32", Error(1e-6, 0.0, 3.1e-6, 1.0, 0.0), Error(1e-6, 0, 0, 1, 0.0), 1),
        ("fp32", NO_ERROR, NO_ERROR, 0),
        ("tf32", Error(1.0, 1e-4, 1.0, 0.9, 0.0), Error(0.1, 1e-4, 0, 1, 0.0), 0),
        ("tf32", Error(0.1, 1.1e-4, 1.0, 1.0, 0.0), Error(0.1, 1e-4, 0, 1, 0.0), 1),
        ("bf16", Error(0.01, 0.009, 1.0, 0.9996, 0.0), Error(0.01, 0.01, 0, 1, 0.0), 0),
        ("bf16", Error(0.01, 0.0091, 1.0, 0.9996, 0.0), Error(0.01, 0.01, 0, 1, 0.0), 1),
        ("bf16", Error(0.011, 0.009, 1.0, 0.9994, 0.0), Error(0.01, 0.01, 0, 1, 0.0), 2),
        ("bf16", Error(math.nan, math.nan, math.nan, math.nan, 0.0), Error(0.01, 0.01, 0, 1, 0.0), 1),
    ],
)
def test_yardstick_is_at_its_numbers(kind: str, ours: Error, theirs: Error, failures: int) -> None:
    assert len(parity.failures(kind, ours, theirs)) == failures


@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_equivalents_are_the_same_function_rounded_otherwise(kind: str, activation: str) -> None:
    case = random_case(64, activation=activation, size=(2, 16, 16))
    double = copy.deepcopy(case.decoder).double()
    exact, *others = (log_prob_per_dimension(each, case) for each in parity.equivalents(double, 3, kind))
    assert len(others) == 2
    for other in others:
        torch.testing.assert_close(other, exact, rtol=1e-12, atol=1e-12)
    with parity.arithmetic_of(kind, CPU):
        runs = [
            log_prob_per_dimension(parity.reference_decoder(each)[1], case)
            for each in parity.equivalents(case.decoder, 3, kind)
        ]
    errors = [measure(run, exact) for run in runs]
    rms = [error.rms for error in errors]
    if (kind, activation) != ("bf16", "softplus"):
        assert max(rms) > 1.002 * min(rms)
    worst = parity.largest(errors)
    assert worst.maximum == max(error.maximum for error in errors)
    assert worst.spearman == min(error.spearman for error in errors)
    for comparison in parity.compare(dataclasses.replace(case, runs=3), [kind]):
        assert comparison.row().theirs == worst


def test_positions_below_a_bound_are_left_out() -> None:
    (exact, ours) = torch.tensor([1.0, -5.0, -10.0]).double(), torch.tensor([1.0, -5.1, -20.0])
    comparison = parity.Comparison("case", "torch", "fp32", "fp32", ours, "FrEIA", [ours, exact + 0.3], exact)
    assert comparison.row().ours.maximum == pytest.approx(10)
    assert comparison.row(lowest=-5.0).ours.maximum == pytest.approx(0.1)
    assert comparison.row(lowest=-5.0).theirs.maximum == pytest.approx(0.3)


def on_images(backend: str, kind: str, ours: Tensor, exact: Tensor, theirs: Tensor) -> list[parity.Row]:
    return parity.Comparison("case", backend, kind, kind, ours, "FrEIA", [theirs], exact).trained_rows()


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_on_images_usual_values_are_held_to_the_yardstick_and_all_to_relative_errors(kind: str) -> None:
    exact = torch.tensor([-1.0, -7000.0, -7001.0, -1e6]).double()
    freias = exact + torch.tensor([1e-3, 3.0, 3.0, 100.0])
    usual, everything = on_images("compiled", kind, exact + torch.tensor([5e-4, 1.0, 1.0, 50.0]), exact, freias)
    assert (usual.case, usual.relative, usual.failures) == ("case", False, [])
    assert (everything.case, everything.relative, everything.failures) == ("case, relative", True, [])
    assert usual.theirs.maximum == pytest.approx(3)
    assert everything.theirs.maximum == pytest.approx(100)
    below = exact + torch.tensor([5e-4, 1.0, 1.0, 2e4])  # a fault that only the lowest has
    usual, everything = on_images("compiled", kind, below, exact, freias)
    assert usual.passed
    assert any("relative RMS / FrEIA's" in failure for failure in everything.failures)
    assert any("relative maximum" in failure for failure in everything.failures) == (kind == "fp32")
    above = exact + torch.tensor([5e-4, 5.0, 1.0, 50.0])  # and one that a usual one has
    assert not on_images("compiled", kind, above, exact, freias)[0].passed


def test_on_images_pytorchs_products_are_held_to_relative_errors_alone() -> None:
    exact = torch.tensor([-1.0, -2.0]).double()
    (row,) = on_images("torch", "fp32", exact + torch.tensor([0.0, 1.3e-3]), exact, exact + 1e-3)
    assert row.relative
    assert row.passed


def test_on_images_without_a_usual_value_errors_are_relative() -> None:
    exact = torch.tensor([-1e5, -1e6]).double()
    (row,) = on_images("compiled", "fp32", exact + 1, exact, exact + 2)
    assert row.relative
    assert row.passed


@pytest.mark.parametrize(
    ("kind", "ours", "failures"),
    [
        ("fp32", Error(9.0, 9.0, 1.5e-3, 1.0, 1.5e-4), 0),
        ("fp32", Error(9.0, 9.0, 1.6e-3, 1.0, 1.6e-4), 2),
        ("bf16", Error(9.0, 9.0, 9.0, 0.9996, 0.9e-4), 0),
        ("bf16", Error(9.0, 9.0, 9.0, 0.9994, 0.91e-4), 2),
        ("tf32", Error(9.0, 9.0, 9.0, 1.0, 1e-4), 0),
        ("tf32", Error(9.0, 9.0, 9.0, 1.0, 1.1e-4), 1),
        ("fp32", Error(math.nan, 0.0, 0.0, 1.0, 0.0), 1),
    ],
)
def test_relative_yardstick_is_at_its_numbers(kind: str, ours: Error, failures: int) -> None:
    assert len(parity.relative_failures(kind, ours, Error(1.0, 1.0, 1e-3, 1.0, 1e-4))) == failures


def test_an_error_of_freias_that_is_no_number_is_no_pass() -> None:
    lost = Error(math.nan, math.nan, math.nan, 1.0, math.nan)
    for kind in ("fp32", "tf32", "bf16"):
        assert parity.failures(kind, NO_ERROR, lost)
        assert parity.relative_failures(kind, NO_ERROR, lost)


def test_rows_can_be_written_as_json() -> None:
    rows = [row.as_dict() for row in check(random_case(41, size=(1, 2, 3)), ["fp32"])]
    *compiled, told = json.loads(json.dumps(rows))
    assert [row["backend"] for row in compiled] == ["compiled"] * (library(torch.float32) is not None)
    assert told["case"] == "D=41 hard, C=128, relu, SOFTPLUS, tanh(s)"
    assert (told["backend"], told["precision"], told["reference"]) == ("torch", "fp32", "FrEIA")
    assert told["passed"] == (not told["failures"])
    assert told["ours"].keys() == {"maximum", "rms", "bounded", "spearman", "relative_rms"}


def test_without_freia_the_unfolded_decoder_is_the_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "FrEIA.framework", None)
    assert_green(random_case(64), reference="unfolded (FrEIA is not installed)")


def test_decoders_of_a_model_are_checked_on_their_own_samples() -> None:
    decoders = []
    for features in (12, 20):
        torch.manual_seed(features)
        decoders.append(FlowDecoder(features, 8, 4))
        roughen(decoders[-1])
    cases = model_cases(decoders, [(6, 5), (3, 4)])
    assert [case.name for case in cases] == ["scale 1, D=12", "scale 2, D=20"]
    assert [case.features.shape for case in cases] == [(3, 12, 6, 5), (3, 20, 3, 4)]
    for case in cases:
        usual, _, unusual = (case.decoder.log_prob(case.features) / case.decoder.features).flatten(1).mean(1).tolist()
        assert unusual < usual
        assert next(iter(check(case))).passed
    again = model_cases(decoders, [(6, 5), (3, 4)])
    assert torch.equal(again[1].features, cases[1].features)
