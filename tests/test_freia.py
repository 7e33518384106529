"""FrEIA's decoders come over exactly, in every dialect, and go back."""

from __future__ import annotations

import pytest
import torch
from flows import IndexBlock, SecondClampBlock, freia_sequence
from FrEIA import modules
from FrEIA.framework import SequenceINN
from torch import nn

from cflow_fast import FlowDecoder
from cflow_fast.errors import UnsupportedBlockError
from cflow_fast.parity import roughen


def assert_computes_the_same(decoder: FlowDecoder, sequence: SequenceINN) -> None:
    """In float64, both directions, and folded."""
    decoder, sequence = decoder.double(), sequence.double()
    z, c = torch.randn(11, 9, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    condition = [c] if decoder.condition else None
    with torch.no_grad():
        for rev in (False, True):
            for ours, theirs in zip(decoder(z, condition, rev=rev), sequence(z, condition, rev=rev), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(decoder.fold("fp64")(z, condition), sequence(z, condition), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


DIALECTS = {
    "release": (modules.AllInOneBlock, "tanh(s)"),
    "index vectors": (IndexBlock, "tanh(s)"),
    "second clamp": (SecondClampBlock, "tanh(s/alpha)"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("global_affine_type", ["SOFTPLUS", "SIGMOID", "EXP"])
def test_every_dialect_is_told_apart_and_converted_exactly(
    dialect: str, permute_soft: bool, global_affine_type: str
) -> None:
    block, clamp = DIALECTS[dialect]
    sequence = freia_sequence(block, permute_soft=permute_soft, global_affine_type=global_affine_type)
    decoder = FlowDecoder.from_freia(sequence)
    assert (decoder.clamp, decoder.permute_soft) == (clamp, permute_soft)
    assert decoder.global_affine_type == global_affine_type
    assert_computes_the_same(decoder, sequence)


def test_the_clamps_are_not_the_same_function() -> None:
    """Or telling them apart would prove nothing."""
    first, second = (FlowDecoder.from_freia(freia_sequence(DIALECTS[name][0])) for name in ("release", "second clamp"))
    first.load_state_dict(second.state_dict())
    z, c = 3 * torch.randn(11, 9), torch.randn(11, 4)
    assert not torch.allclose(first(z, [c])[1], second(z, [c])[1], atol=1e-3)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.9, 5.0])
def test_clamp_is_recognised_at_any_strength(alpha: float) -> None:
    for block, clamp in DIALECTS.values():
        decoder = FlowDecoder.from_freia(freia_sequence(block, affine_clamping=alpha))
        assert decoder.affine_clamping == alpha
        assert decoder.clamp == (clamp if alpha != 1.0 else "tanh(s)")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_unconditional_and_softplus_flows_are_converted(dialect: str) -> None:
    def softplus(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 7), nn.Softplus(), nn.Linear(7, outputs))

    sequence = freia_sequence(DIALECTS[dialect][0], subnet_constructor=softplus, cond=None)
    decoder = FlowDecoder.from_freia(sequence)
    assert (decoder.condition, decoder.activation, decoder.hidden) == (0, "softplus", 7)
    assert_computes_the_same(decoder, sequence)


def test_hard_permutation_among_soft_ones_becomes_a_matrix() -> None:
    sequence = freia_sequence(permute_soft=True)
    hard = freia_sequence().module_list[1]
    sequence.module_list[1] = hard
    decoder = FlowDecoder.from_freia(sequence)
    assert decoder.permute_soft
    assert_computes_the_same(decoder, sequence)


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_round_trip_from_freia_is_exact_in_every_tensor(permute_soft: bool, dtype: torch.dtype, training: bool) -> None:
    sequence = freia_sequence(permute_soft=permute_soft).to(dtype).train(training)
    decoder = FlowDecoder.from_freia(sequence)
    back = decoder.to_freia()
    assert (decoder.dtype, decoder.training, back.training) == (dtype, training, training)
    ours, theirs = back.state_dict(), sequence.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("condition", [0, 4])
def test_round_trip_to_freia_is_exact_in_every_tensor(permute_soft: bool, condition: int) -> None:
    torch.manual_seed(1)
    decoder = FlowDecoder(
        9, condition, 3, permute_soft=permute_soft, affine_clamping=1.2, global_affine_type="EXP", hidden=5
    )
    roughen(decoder)
    back = FlowDecoder.from_freia(decoder.to_freia())
    assert back.options == decoder.options
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_converted_decoder_shares_nothing_with_its_origin() -> None:
    sequence = freia_sequence()
    decoder = FlowDecoder.from_freia(sequence)
    theirs = {parameter.data_ptr() for parameter in sequence.parameters()}
    assert not theirs & {tensor.data_ptr() for tensor in decoder.state_dict().values()}
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_second_clamp_cannot_go_to_the_released_freia() -> None:
    decoder = FlowDecoder(9, 4, 1, clamp="tanh(s/alpha)")
    with pytest.raises(UnsupportedBlockError, match=r"has another clamp than this decoder's tanh\(s/alpha\)"):
        decoder.to_freia()
