"""The folded decoder: immutable, movable, small, and it says what it is."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from flows import rough_decoder

from cflow_fast import FlowDecoder, ops
from cflow_fast.decoder import random_rotation
from cflow_fast.folding import _decompositions

CPU = torch.device("cpu")
FEATURES, CONDITION = 24, 8

each_permutation = pytest.mark.parametrize("permute_soft", [False, True])
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])


# What it does not do


def test_inverse_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no inverse \(rev=True\): use the FlowDecoder"):
        rough_decoder(FEATURES).fold("fp32")(torch.randn(2, FEATURES), [torch.randn(2, CONDITION)], rev=True)


def test_it_stays_in_evaluation_whatever_mode_its_model_is_in() -> None:
    folded = rough_decoder(FEATURES).train().fold("fp32")
    assert not folded.training
    for module in (folded, torch.nn.Sequential(folded)):
        for mode in (True, False, True):
            assert module.train(mode) is module
            assert not folded.training


def test_gradients_are_refused_where_they_would_silently_be_missing() -> None:
    folded = rough_decoder(FEATURES).fold("fp32")
    z, c = torch.randn(2, FEATURES), torch.randn(2, CONDITION)
    calls = [
        lambda: folded.log_prob(torch.randn(1, FEATURES, 2, 2, requires_grad=True)),
        lambda: folded.log_prob(z.clone().requires_grad_(), c),
        lambda: folded(z.clone().requires_grad_(), [c]),
        lambda: folded(z, [c.clone().requires_grad_()]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="has no gradients: detach the features"):
            call()
    assert not list(folded.parameters())
    assert not folded(z, [c])[1].requires_grad


def test_inputs_are_left_as_they_are() -> None:
    for permute_soft in (False, True):
        for features in (torch.randn(1, FEATURES, 3, 4), torch.randn(2, FEATURES, 3, 4)):
            before = features.clone()
            rough_decoder(FEATURES, permute_soft=permute_soft).fold("fp32").log_prob(features)
            assert torch.equal(features, before)


# Moving, copying, storing


@each_precision
def test_change_of_dtype_leaves_what_was_folded(precision: str) -> None:
    folded = rough_decoder(FEATURES, permute_soft=True).fold(precision)
    features = torch.randn(1, FEATURES, 3, 4)
    before, expected = {k: v.clone() for k, v in folded.state_dict().items()}, folded.log_prob(features)
    for same in (folded.half(), folded.double(), folded.bfloat16(), folded.to(torch.float64), folded.to("cpu").float()):
        assert same is folded
        assert torch.equal(folded.log_prob(features), expected)
    for name, tensor in folded.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_moves_to_another_device_with_its_working_copy() -> None:
    folded = rough_decoder(FEATURES).fold("fp32")
    folded.log_prob(torch.randn(1, FEATURES, 3, 4))
    moved = copy.deepcopy(folded).to("meta")
    assert {tensor.device.type for tensor in moved.buffers()} == {"meta"}
    assert moved.log_prob(torch.randn(1, FEATURES, 3, 4, device="meta")).device.type == "meta"
    assert folded.device == CPU


@each_permutation
@each_precision
def test_copies_and_pickles_compute_the_same(permute_soft: bool, precision: str) -> None:
    folded = rough_decoder(FEATURES, permute_soft=permute_soft).fold(precision)
    features = torch.randn(2, FEATURES, 3, 4)
    expected = folded.log_prob(features)
    stored = pickle.dumps(folded)
    copies: list[Any] = [copy.deepcopy(folded), pickle.loads(stored), copy.deepcopy(torch.nn.Sequential(folded))[0]]
    for same in copies:
        assert torch.equal(same.log_prob(features), expected)
        assert same.arithmetic == folded.arithmetic
        assert same.get_buffer("w1").data_ptr() != folded.get_buffer("w1").data_ptr()


def test_pickle_holds_no_working_copy() -> None:
    folded = rough_decoder(FEATURES).fold("fp32")
    before = len(pickle.dumps(folded))
    folded.log_prob(torch.randn(2, FEATURES, 3, 4))
    assert len(pickle.dumps(folded)) == before


@each_permutation
@each_precision
def test_state_dict_carries_everything_that_was_learned(permute_soft: bool, precision: str) -> None:
    """Into a decoder with other parameters, which has run already, through a file that holds tensors alone."""
    folded, other = (rough_decoder(FEATURES, seed=seed, permute_soft=permute_soft).fold(precision) for seed in (3, 4))
    features = torch.randn(2, FEATURES, 3, 4)
    expected = folded.log_prob(features)
    assert not torch.allclose(other.log_prob(features), expected)
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.log_prob(features), expected)


def _reference_bytes(features: int) -> int:
    """A FrEIA decoder's parameters; a soft permutation takes what a hard one does, two D x D matrices a block."""
    freia = FlowDecoder(features, coupling_blocks=1).to_freia()
    return 8 * sum(parameter.nbytes for parameter in freia.parameters())


def _eight_blocks(features: int, permute_soft: bool) -> FlowDecoder:
    """Zeros but for the permutations, which are all the same: drawing numbers is not what is measured."""
    with torch.device("meta"):
        decoder = FlowDecoder(features, permute_soft=permute_soft)
    decoder.to_empty(device="cpu")
    torch.manual_seed(0)
    permutation = random_rotation(features) if permute_soft else torch.randperm(features)
    for tensor in decoder.state_dict().values():
        if tensor.shape == permutation.shape and (permute_soft or tensor.dtype == torch.long):
            tensor.copy_(permutation)
        else:
            tensor.zero_()
    return decoder


@pytest.mark.parametrize(
    ("permute_soft", "precision", "limit"),
    [(True, "fp32", 0.72), (True, "bf16", 0.36), (False, "fp32", 0.50), (False, "bf16", 0.25)],
)
def test_wide_resnets_decoders_take_less_storage(
    permute_soft: bool, precision: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed = functools.cache(lambda features, h: _decompositions([random_rotation(features).double()], h)[0])
    monkeypatch.setattr(
        "cflow_fast.folding._decompositions", lambda matrices, h: [decomposed(len(matrix), h) for matrix in matrices]
    )
    stored = reference = 0
    for features in (512, 1024, 2048):
        folded = _eight_blocks(features, permute_soft).fold(precision)
        stored += sum(tensor.nbytes for tensor in folded.state_dict().values())
        reference += _reference_bytes(features)
    assert stored <= limit * reference


def test_file_is_as_large_as_the_state_dict() -> None:
    folded = rough_decoder(96, permute_soft=True).fold("bf16")
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    assert file.tell() <= 1.1 * sum(tensor.nbytes for tensor in folded.state_dict().values())


# What it says


def test_arithmetic_says_what_is_stored_and_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.precision.multiplies_bf16", lambda device: False)
    folded = rough_decoder(FEATURES).fold("bf16")
    assert (folded.arithmetic.storage, folded.arithmetic.operands) == (torch.bfloat16, torch.float32)
    assert "this cpu has no fast bf16 multiplication: weights are stored in bf16, multiplied in fp32" in repr(folded)
    assert folded.get_buffer("w1").dtype == torch.bfloat16
    assert ops.torch_flow(folded.weights, folded.arithmetic).operand_dtype == torch.float32
    assert rough_decoder(FEATURES).fold("auto").precision == "fp32"


def test_auto_takes_bf16_where_it_is_multiplied_and_fp64_for_a_float64_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cflow_fast.precision.multiplies_bf16", lambda device: True)
    assert rough_decoder(FEATURES).fold().precision == "bf16"
    assert rough_decoder(FEATURES).double().fold().precision == "fp64"


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision is one of auto, .*, tf32, fp16, bf16, got 'fp8'"):
        rough_decoder(FEATURES).fold("fp8")
