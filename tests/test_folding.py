"""Folding changes no likelihood: every simplification is exact in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cflow_fast import FlowDecoder
from cflow_fast.decoder import random_rotation
from cflow_fast.folding import ROTATION_RESIDUAL, _CosineSine, _decompositions, _orthogonalised, fold_weights
from cflow_fast.kernels.products import MatmulProducts
from cflow_fast.kernels.weights import HardMixing, SoftMixing
from cflow_fast.parity import roughen


def exact_decoder(features: int, condition: int = 8, **options: Any) -> FlowDecoder:
    """Rough parameters in float64; rotations orthogonal to float64, not to the float32 that they were drawn in."""
    torch.manual_seed(5)
    decoder = FlowDecoder(features, condition, **({"coupling_blocks": 4} | options))
    roughen(decoder)
    decoder.double()
    blocks: Any = decoder.blocks
    for block in blocks:
        if block.permute_soft:
            block.rotation = torch.linalg.qr(block.rotation).Q
    return decoder


def assert_folds_exactly(decoder: FlowDecoder) -> None:
    folded = decoder.fold("fp64")
    maps = 1.3 * torch.randn(2, decoder.features, 3, 5, dtype=torch.float64)
    z = 1.3 * torch.randn(9, decoder.features, dtype=torch.float64)
    c = [torch.randn(9, decoder.condition, dtype=torch.float64)] if decoder.condition else None
    with torch.no_grad():
        pairs = [
            (folded.log_prob(maps), decoder.log_prob(maps)),
            (folded.log_prob(z, c[0] if c else None), decoder.log_prob(z, c[0] if c else None)),
            *zip(folded(z, c), decoder(z, c), strict=True),
        ]
    for ours, expected in pairs:
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("features", [2, 3, 40, 41])
@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("clamp", ["tanh(s)", "tanh(s/alpha)"])
def test_fold_is_exact(features: int, permute_soft: bool, condition: int, clamp: str) -> None:
    assert_folds_exactly(exact_decoder(features, condition, permute_soft=permute_soft, clamp=clamp))


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("global_affine_type", ["SOFTPLUS", "SIGMOID", "EXP"])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_fold_is_exact_for_every_affine_and_activation(
    permute_soft: bool, global_affine_type: str, activation: str
) -> None:
    options: dict[str, Any] = {
        "permute_soft": permute_soft,
        "global_affine_type": global_affine_type,
        "activation": activation,
    }
    assert_folds_exactly(exact_decoder(13, **options))


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("coupling_blocks", [1, 2, 8])
def test_fold_is_exact_for_any_number_of_blocks(permute_soft: bool, coupling_blocks: int) -> None:
    assert_folds_exactly(exact_decoder(10, permute_soft=permute_soft, coupling_blocks=coupling_blocks, hidden=5))


def _halves_apart(size: int) -> Tensor:
    half = size - size // 2
    return torch.block_diag(random_rotation(half), random_rotation(size // 2)).double()


@pytest.mark.parametrize("features", [12, 13])
@pytest.mark.parametrize(
    "matrix", ["halves that map onto themselves", "identity", "permutation", "a few that turn, permuted"]
)
def test_soft_permutation_that_turns_nothing_folds_as_a_rotation_too(features: int, matrix: str) -> None:
    decoder = exact_decoder(features, permute_soft=True)
    blocks: Any = decoder.blocks
    blocks[1].rotation = {
        "halves that map onto themselves": torch.linalg.qr(_halves_apart(features)).Q,
        "identity": torch.eye(features, dtype=torch.float64),
        "permutation": torch.eye(features, dtype=torch.float64)[torch.randperm(features)],
        "a few that turn, permuted": torch.block_diag(
            torch.linalg.qr(random_rotation(4).double()).Q, torch.eye(features - 4, dtype=torch.float64)
        )[torch.randperm(features)],
    }[matrix]
    mixing = fold_weights(decoder, torch.float64).mixing
    assert isinstance(mixing, SoftMixing)
    assert mixing.matrices == 0
    assert_folds_exactly(decoder)


@pytest.mark.parametrize("turning", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_what_turns_a_few_and_permutes_all_has_a_decomposition(turning: int, seed: int) -> None:
    """Half of its cosines are exactly zero, and eigenvalues that rounding made negative are among them."""
    torch.manual_seed(seed)
    matrix = torch.block_diag(torch.linalg.qr(torch.randn(turning, turning)).Q, torch.eye(64 - turning))
    matrix = matrix[torch.randperm(64)].double()
    found = _decompositions([matrix], 32)
    assert found is not None
    torch.testing.assert_close(found[0].times(torch.eye(64).double()), matrix, rtol=0, atol=1e-6)


NO_ROTATIONS = {
    "a little longer": lambda matrix: 1.0001 * matrix,
    "twice as long": lambda matrix: 2 * matrix,
    "three times as long": lambda matrix: 3 * matrix,
    "shorter in one direction": lambda matrix: matrix - 0.001 * matrix[:, :1] @ matrix[:, :1].T @ matrix,
    "rounded to float16": lambda matrix: matrix.half().double(),
    "rounded to bfloat16": lambda matrix: matrix.bfloat16().double(),
    "not finite": lambda matrix: torch.nan * matrix,
}


@pytest.mark.parametrize("features", [12, 320])
@pytest.mark.parametrize("change", NO_ROTATIONS)
def test_soft_permutation_that_is_no_rotation_folds_as_the_matrix_that_it_is(features: int, change: str) -> None:
    decoder = exact_decoder(features, permute_soft=True)
    blocks: Any = decoder.blocks
    blocks[1].rotation = NO_ROTATIONS[change](blocks[1].rotation)
    mixing = fold_weights(decoder, torch.float64).mixing
    assert isinstance(mixing, SoftMixing)
    assert mixing.matrices == 4
    if change != "not finite":
        assert_folds_exactly(decoder)


def test_matrices_and_rotations_agree_within_one_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for matrices in range(5):
        monkeypatch.setattr("cflow_fast.folding.matrix_blocks", lambda *_, count=matrices: count)
        for features in (10, 11):
            decoder = exact_decoder(features, permute_soft=True)
            mixing = fold_weights(decoder, torch.float64).mixing
            assert isinstance(mixing, SoftMixing)
            assert (mixing.matrices, len(mixing.cosine)) == (matrices, 4 - matrices)
            assert_folds_exactly(decoder)


@pytest.mark.parametrize("size", [2, 3, 40, 41, 160])
def test_cosine_sine_decomposition_is_one(size: int) -> None:
    torch.manual_seed(0)
    matrix = random_rotation(size).double()
    h, d = size - size // 2, size // 2
    (parts,) = _decompositions([matrix], h)
    for factor, n in ((parts.u1, h), (parts.u2, d), (parts.v1, h), (parts.v2, d)):
        torch.testing.assert_close(factor @ factor.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.cosine**2 + parts.sine**2, torch.ones(d, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.times(torch.eye(size).double()), matrix, rtol=0, atol=1e-7)
    assert parts.residual < 1e-9


def rotation_of(size: int, angles: Tensor) -> Tensor:
    """By random factors of its decomposition."""
    h, d = size - size // 2, size // 2
    u1, u2, v1, v2 = (random_rotation(n).double() for n in (h, d, h, d))
    cosine, sine = torch.ones(h, dtype=torch.float64), torch.zeros(h, d, dtype=torch.float64)
    cosine[:d], sine[:d] = angles.cos(), angles.sin().diag()
    upper = torch.cat([u1 * cosine @ v1, -u1 @ sine @ v2], 1)
    return torch.cat([upper, torch.cat([u2 @ sine.T @ v1, u2 * angles.cos() @ v2], 1)])


@pytest.mark.parametrize("size", [40, 41])
@pytest.mark.parametrize("least", [1e-4, 1e-5, 1e-7, 1e-12, 0.0])
def test_rotation_by_almost_nothing_or_almost_a_right_angle_has_a_decomposition(size: int, least: float) -> None:
    """One in twenty-five decoders of 320 features has one in its eight random blocks."""
    torch.manual_seed(0)
    angles = torch.linspace(0.05, 1.5, size // 2, dtype=torch.float64)
    angles[:2] = torch.tensor([1.0, 2.0]) * least
    angles[-2:] = math.pi / 2 - torch.tensor([3.0, 1.0], dtype=torch.float64) * least
    matrix = rotation_of(size, angles).float().double()
    h = size - size // 2
    (parts,) = _decompositions([matrix], h)
    assert parts.residual < ROTATION_RESIDUAL
    for factor in (parts.u1, parts.u2, parts.v1, parts.v2):
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor)).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(parts.times(torch.eye(size).double()), matrix, rtol=0, atol=1e-7)
    assert (parts.cosine.diff() > -1e-8).all()


@pytest.mark.parametrize("seed", [16, 18, 22])
def test_random_soft_decoders_with_such_an_angle_fold_as_rotations(seed: int) -> None:
    torch.manual_seed(seed)
    mixing = FlowDecoder(320, 0, 8, permute_soft=True, hidden=1).fold("fp32").weights.mixing
    assert isinstance(mixing, SoftMixing)
    assert mixing.matrices == 0


def test_residual_tells_a_wrong_decomposition_from_a_right_one() -> None:
    torch.manual_seed(0)
    p = _orthogonalised(random_rotation(40).double())
    squared, vectors = torch.linalg.eigh(p[:20, :20].T @ p[:20, :20])
    assert _CosineSine(p, 20, squared, vectors).residual < 1e-10
    for turned, values, skewed in ((0.0, 0.0, 3e-8), (0.0, 3e-8, 0.0), (3e-8, 0.0, 0.0)):
        wrong = [each.clone(memory_format=torch.contiguous_format) for each in (vectors, squared, p)]
        for tensor, by in zip(wrong, (turned, values, skewed), strict=True):
            tensor.view(-1)[7] += by
        assert _CosineSine(wrong[2], 20, wrong[1], wrong[0]).residual > ROTATION_RESIDUAL


def test_autocast_around_a_fold_changes_nothing() -> None:
    decoder = exact_decoder(40, permute_soft=True).float()
    expected = fold_weights(decoder, torch.float32).tensors()
    with torch.autocast("cpu", torch.bfloat16):
        folded = fold_weights(decoder, torch.float32).tensors()
    assert folded.keys() == expected.keys()
    assert all(torch.equal(folded[name], expected[name]) for name in expected)


def test_rounded_rotation_becomes_orthogonal_by_moves_under_its_rounding() -> None:
    torch.manual_seed(0)
    for rounding, atol in ((torch.float32, 3e-8), (torch.float16, 1e-3)):
        rounded = random_rotation(96).to(rounding).double()
        exact = _orthogonalised(rounded)
        torch.testing.assert_close(exact @ exact.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(exact, rounded, rtol=0, atol=atol)


def test_fold_of_a_soft_permutation_holds_three_quarters_of_it() -> None:
    mixing = fold_weights(exact_decoder(40, permute_soft=True, coupling_blocks=8), torch.float32).mixing
    assert isinstance(mixing, SoftMixing)
    rotations = sum(matrix.numel() for matrix in (mixing.passive, mixing.active, mixing.output, mixing.passive_output))
    assert mixing.matrix.numel() == 0
    assert rotations == (3 * 8 + 1) * 20 * 20


def test_fold_of_hard_permutations_holds_indices_alone() -> None:
    mixing = fold_weights(exact_decoder(40), torch.float32).mixing
    assert isinstance(mixing, HardMixing)
    assert max(tensor.dim() for tensor in vars(mixing).values()) == 2
    assert {tensor.shape[-1] for tensor in vars(mixing).values()} == {20, 40}


def test_half_of_a_wide_bf16_decoders_permutations_are_rotations() -> None:
    wide = FlowDecoder(1024, 0, 2, permute_soft=True, hidden=4)
    narrow = FlowDecoder(512, 0, 2, permute_soft=True, hidden=4)
    mixings = [fold_weights(decoder, torch.bfloat16).mixing for decoder in (wide, narrow)]
    assert [mixing.matrices for mixing in mixings if isinstance(mixing, SoftMixing)] == [1, 2]


@pytest.mark.parametrize(
    ("storage", "vectors"), [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("features", [10, 511, 512])
def test_matrices_are_stored_in_the_precision_and_vectors_in_float32_at_least(
    storage: torch.dtype, vectors: torch.dtype, permute_soft: bool, features: int
) -> None:
    """Those of narrow decoders' soft permutations too."""
    decoder = FlowDecoder(features, 4, 1, permute_soft=permute_soft, hidden=4).double()
    weights = fold_weights(decoder, storage)
    assert (weights.operand_dtype, weights.state_dtype) == (storage, vectors)
    own, mixing = ("w1", "w1_condition", "w2"), ("matrix", "passive", "active", "output", "passive_output")
    expected = dict.fromkeys(own, storage)
    if permute_soft:
        expected |= dict.fromkeys([f"mixing_{name}" for name in mixing], storage if features >= 512 else vectors)
    for name, tensor in weights.tensors().items():
        wanted = expected.get(name, vectors) if tensor.is_floating_point() else torch.int32
        assert tensor.dtype == wanted, name


@pytest.mark.parametrize(("permute_soft", "in_likelihood", "in_u"), [(True, 3, 4), (False, 0, 0)])
def test_last_permutation_is_left_out_of_a_likelihood(
    permute_soft: bool, in_likelihood: int, in_u: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    product = MatmulProducts.product

    def recorded(self: MatmulProducts, name: str, *args: Any, **kwargs: Any) -> Tensor:
        made.append(name)
        return product(self, name, *args, **kwargs)

    monkeypatch.setattr(MatmulProducts, "product", recorded)
    folded = exact_decoder(10, permute_soft=permute_soft).fold("fp64")
    z, c = torch.randn(3, 10), torch.randn(3, 8)
    folded.log_prob(z, c)
    assert made.count("output") == in_likelihood
    made.clear()
    folded(z, [c])
    assert made.count("output") == in_u


def test_fold_leaves_the_decoder_and_the_threads_as_they_are() -> None:
    decoder = exact_decoder(10, permute_soft=True)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    threads = torch.get_num_threads()
    folded = decoder.fold("fp64")
    assert torch.get_num_threads() == threads
    for tensor in folded.buffers():
        tensor.zero_()
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
