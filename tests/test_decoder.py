"""The trainable decoder is FrEIA's flow, and its likelihood is a density."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from flows import rough_decoder, rows_for

from cflow_fast import FlowDecoder
from cflow_fast.decoder import random_rotation
from cflow_fast.positional import positional_encoding


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("condition", [0, 8])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("global_affine_type", ["SOFTPLUS", "SIGMOID", "EXP"])
def test_both_directions_are_freias_in_float64(
    permute_soft: bool, condition: int, activation: str, global_affine_type: str
) -> None:
    decoder = rough_decoder(
        condition=condition, permute_soft=permute_soft, activation=activation, global_affine_type=global_affine_type
    ).double()
    freia = decoder.to_freia()
    z, c = rows_for(decoder, 11)
    for rev in (False, True):
        for ours, theirs in zip(decoder(z, c, rev=rev), freia(z, c, rev=rev), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("clamp", "divisor"), [("tanh(s)", 1.0), ("tanh(s/alpha)", 1.9)])
def test_block_follows_its_formula(clamp: str, divisor: float) -> None:
    decoder = rough_decoder(5, 4, coupling_blocks=1, permute_soft=True, clamp=clamp).double()
    z, c = rows_for(decoder, 6)
    (block,) = decoder.blocks
    p = {name: tensor.detach().numpy() for name, tensor in block.state_dict().items()}
    x, condition = z.numpy(), c[0].numpy()  # type: ignore[index]

    x1, x2 = x[:, :3], x[:, 3:]
    hidden = np.maximum(np.concatenate([x1, condition], 1) @ p["subnet.0.weight"].T + p["subnet.0.bias"], 0)
    a = 0.1 * (hidden @ p["subnet.2.weight"].T + p["subnet.2.bias"])
    s, t = a[:, :2], a[:, 2:]
    j = 1.9 * np.tanh(s / divisor)
    y = np.concatenate([x1, x2 * np.exp(j) + t], 1)
    sigma = 0.1 * 2.0 * np.log1p(np.exp(0.5 * p["global_scale"]))
    expected = (sigma * y + p["global_offset"]) @ p["rotation"].T
    log_det = j.sum(1) + np.log(sigma).sum()

    u, ours = decoder(z, c)
    np.testing.assert_allclose(u.detach(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(ours.detach(), log_det, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("permute_soft", [False, True])
def test_log_det_is_that_of_the_jacobian(permute_soft: bool) -> None:
    decoder = rough_decoder(6, 4, permute_soft=permute_soft).double()
    z, c = rows_for(decoder, 1)
    jacobian = torch.autograd.functional.jacobian(lambda row: decoder(row, c)[0].squeeze(0), z).squeeze(1)
    torch.testing.assert_close(decoder(z, c)[1][0], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-6, atol=1e-6)


def test_likelihood_is_a_gaussians_under_a_change_of_variables() -> None:
    decoder = rough_decoder(6, 4).double()
    z, c = rows_for(decoder, 5)
    u, log_det = decoder(z, c)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(1) + log_det
    torch.testing.assert_close(decoder.log_prob(z, c[0]), expected, rtol=1e-12, atol=1e-12)  # type: ignore[index]


@pytest.mark.parametrize(
    ("features", "permute_soft"),
    [*((features, soft) for features in (2, 41, 64, 160) for soft in (False, True)), (512, False), (2048, False)],
)
def test_inverse_gives_the_features_back(features: int, permute_soft: bool) -> None:
    decoder = rough_decoder(features, permute_soft=permute_soft, coupling_blocks=8)
    z, c = rows_for(decoder, 50)
    with torch.no_grad():
        u, log_det = decoder(z, c)
        back, inverse_log_det = decoder(u, c, rev=True)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-4)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows_are_rows(count: int) -> None:
    decoder = rough_decoder()
    z, c = rows_for(decoder, count)
    u, log_det = decoder(z, c)
    assert (u.shape, log_det.shape) == ((count, 7), (count,))
    assert decoder(u, c, rev=True)[0].shape == (count, 7)


def test_maps_are_rows_under_the_encoding_of_their_position() -> None:
    decoder = rough_decoder().double()
    features = torch.randn(2, 7, 3, 5, dtype=torch.float64)
    encoding = positional_encoding(8, 3, 5)
    log_prob = decoder.log_prob(features)
    assert log_prob.shape == (2, 3, 5)
    for image, row, column in ((0, 0, 0), (1, 2, 0), (0, 0, 4), (1, 1, 3)):
        z, c = features[image, :, row, column].unsqueeze(0), encoding[:, row, column].unsqueeze(0)
        torch.testing.assert_close(log_prob[image, row, column], decoder.log_prob(z, c)[0], rtol=1e-12, atol=1e-12)


def test_layout_of_a_map_in_memory_does_not_matter() -> None:
    decoder = rough_decoder()
    features = torch.randn(2, 7, 4, 6)
    expected = decoder.log_prob(features)
    wide = torch.randn(2, 7, 8, 12)
    wide[:, :, ::2, ::2] = features
    for same in (features.to(memory_format=torch.channels_last), wide[:, :, ::2, ::2], features.mT.contiguous().mT):
        assert torch.equal(decoder.log_prob(same), expected)


@pytest.mark.parametrize("shape", [(0, 7, 3, 4), (2, 7, 0, 4), (2, 7, 3, 0)])
def test_maps_without_positions_have_an_empty_likelihood(shape: tuple[int, ...]) -> None:
    assert rough_decoder().log_prob(torch.randn(shape)).shape == (shape[0], *shape[2:])


@pytest.mark.parametrize(
    ("module", "expected"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64])
def test_likelihood_is_float32_unless_the_module_is_float64(
    module: torch.dtype, expected: torch.dtype, given: torch.dtype
) -> None:
    decoder = rough_decoder().to(module)
    assert decoder.log_prob(torch.randn(1, 7, 2, 2).to(given)).dtype == expected
    assert decoder.log_prob(torch.randn(3, 7).to(given), torch.randn(3, 8).to(given)).dtype == expected


def test_samples_are_the_inverse_of_gaussian_draws() -> None:
    decoder = rough_decoder(permute_soft=True).double()
    drawn = decoder.sample(2, 3, 4, temperature=0.5, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (2, 7, 3, 4)
    expected = 0.5 * torch.randn(24, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    c = positional_encoding(8, 3, 4).flatten(1).t().repeat(2, 1)
    u, _ = decoder(drawn.permute(0, 2, 3, 1).reshape(-1, 7), [c])
    torch.testing.assert_close(u, expected, rtol=1e-5, atol=1e-5)


def test_unconditional_decoder_samples_and_scores() -> None:
    decoder = rough_decoder(condition=0)
    drawn = decoder.sample(1, 2, 3)
    torch.testing.assert_close(
        decoder.log_prob(drawn).flatten(), decoder.log_prob(drawn.flatten(2).squeeze(0).t()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("kind", "sigma"), [("SOFTPLUS", 1.0), ("SIGMOID", 0.7), ("EXP", 2.5)])
def test_parameters_start_where_freias_do(kind: str, sigma: float) -> None:
    from FrEIA.modules import AllInOneBlock

    def subnet(inputs: int, outputs: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(inputs, 9), torch.nn.ReLU(), torch.nn.Linear(9, outputs))

    freia = AllInOneBlock([(40,)], subnet_constructor=subnet, global_affine_type=kind, global_affine_init=sigma)
    decoder = FlowDecoder(40, 24, global_affine_type=kind, global_affine_init=sigma)
    blocks: Any = decoder.blocks
    for block in blocks:
        torch.testing.assert_close(block.global_scale, freia.global_scale[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(block.scale(), torch.full((40,), sigma), rtol=1e-5, atol=0)
        assert not block.global_offset.any()
        assert sorted(block.permutation.tolist()) == list(range(40))
        for layer in (block.subnet[0], block.subnet[2]):  # uniform within 1 / sqrt(inputs), as PyTorch's Linear
            bound = 1 / math.sqrt(layer.in_features)
            assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert not torch.equal(blocks[0].permutation, blocks[1].permutation)


def test_subnet_is_as_wide_as_published_unless_told() -> None:
    published, narrow = FlowDecoder(41, 128, 1).state_dict(), FlowDecoder(41, 128, 1, hidden=10).state_dict()
    assert published["blocks.0.subnet.0.weight"].shape == (2 * (21 + 128), 21 + 128)
    assert narrow["blocks.0.subnet.2.weight"].shape == (40, 10)


@pytest.mark.parametrize("size", [2, 3, 41, 128])
def test_random_rotation_is_a_rotation(size: int) -> None:
    torch.manual_seed(0)
    rotation = random_rotation(size).double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size).double(), rtol=0, atol=5e-7)
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0, abs=1e-5)


def test_random_rotations_are_uniform() -> None:
    """Under the uniform (Haar) measure the trace has mean 0 and variance 1, and every entry variance 1 / n."""
    torch.manual_seed(0)
    rotations = torch.stack([random_rotation(6) for _ in range(4000)])
    traces = rotations.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(traces.mean().item()) < 4 / math.sqrt(4000)
    assert traces.square().mean().item() == pytest.approx(1.0, abs=0.1)
    assert (rotations.square().mean(0) - 1 / 6).abs().max() < 0.02
    assert rotations.mean(0).abs().max() < 0.03


def test_options_and_state_dict_rebuild_a_decoder() -> None:
    decoder = rough_decoder(5, 4, permute_soft=True, activation="softplus", hidden=6, clamp="tanh(s/alpha)")
    other = FlowDecoder(**decoder.options)
    other.load_state_dict(decoder.state_dict())
    clone = copy.deepcopy(decoder)
    z, c = rows_for(decoder, 4)
    for same in (other, clone):
        assert torch.equal(same(z, c)[0], decoder(z, c)[0])


@pytest.mark.parametrize("permute_soft", [False, True])
def test_decoder_compiles_without_a_break(permute_soft: bool) -> None:
    decoder = rough_decoder(permute_soft=permute_soft, coupling_blocks=2)
    features = torch.randn(1, 7, 3, 4)
    compiled = torch.compile(decoder.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), decoder.log_prob(features), rtol=1e-5, atol=1e-5)
