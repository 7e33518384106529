"""FrEIA's blocks that a FlowDecoder cannot compute are refused by name, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import IndexBlock, SecondClampBlock, freia_sequence, named_as_freia_names_it, subnet
from FrEIA import modules
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from cflow_fast import FlowDecoder
from cflow_fast.errors import CFlowFastError, UnsupportedBlockError


def linear_without_bias(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8, bias=False), nn.ReLU(), nn.Linear(8, outputs))


def reparametrised(inputs: int, outputs: int) -> nn.Module:
    first = nn.Linear(inputs, 8)
    nn.utils.spectral_norm(first)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(8, outputs))


def deeper(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))


def sharper(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Softplus(beta=2), nn.Linear(8, outputs))


def other_activation(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.LeakyReLU(), nn.Linear(8, outputs))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gin_block": True}, r"GIN blocks \(gin_block=True\) are not supported"),
        ({"learned_householder_permutation": 2}, "learned householder permutations are not supported"),
        ({"reverse_permutation": True}, "reverse_permutation=True is not supported"),
        ({"subnet_constructor": linear_without_bias}, "a Linear without bias"),
        ({"subnet_constructor": reparametrised}, "reparametrised weight"),
        ({"subnet_constructor": deeper}, "its subnet is Linear, ReLU, Linear, ReLU, Linear; expected Linear, ReLU or"),
        ({"subnet_constructor": other_activation}, "its subnet is Linear, LeakyReLU, Linear; expected"),
        ({"subnet_constructor": nn.Linear}, "its subnet is Linear; expected"),
        ({"subnet_constructor": sharper}, "Softplus has another beta"),
    ],
)
def test_block_that_computes_something_else_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedBlockError, match=rf"^module_list\.0 \(AllInOneBlock\): .*{reason}"):
        FlowDecoder.from_freia(freia_sequence(**options))


@torch.no_grad()
def _spoil(block: Any, name: str, index: tuple[int, ...], value: float) -> None:
    getattr(block, name)[index] += value


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda b: _spoil(b, "w_perm", (0, 0), 1e-4), "w_perm is not orthogonal: .* is off the identity by"),
        (lambda b: _spoil(b, "w_perm", (0, 0), math.nan), "w_perm is not orthogonal: .* by nan"),
        (
            lambda b: _spoil(b, "w_perm_inv", (1, 0), 1e-4),
            "w_perm_inv is not w_perm's transpose: they differ by 1.0e-04",
        ),
        (lambda b: b.w_perm_inv.data.copy_(b.w_perm.data), "w_perm_inv is not w_perm's transpose"),
    ],
)
def test_permutation_that_is_none_is_refused_by_name(spoil: Callable[[Any], Any], reason: str) -> None:
    sequence = freia_sequence(permute_soft=True)
    spoil(sequence.module_list[1])
    with pytest.raises(UnsupportedBlockError, match=rf"^module_list\.1 \(AllInOneBlock\): its {reason}"):
        FlowDecoder.from_freia(sequence)


@pytest.mark.parametrize(
    ("name", "index", "reason"),
    [
        ("w_perm", [0] * 9, "its w_perm is not a permutation"),
        ("w_perm", [1, 2, 3, 4, 5, 6, 7, 8, 9], "its w_perm is not a permutation"),
        ("w_perm_inv", [0] * 9, "its w_perm_inv is not the inverse of w_perm"),
    ],
)
def test_index_vector_that_is_no_permutation_is_refused_by_name(name: str, index: list[int], reason: str) -> None:
    sequence = freia_sequence(IndexBlock)
    getattr(sequence.module_list[2], name).copy_(torch.tensor(index))
    with pytest.raises(UnsupportedBlockError, match=rf"^module_list\.2 .*{reason}"):
        FlowDecoder.from_freia(sequence)


def test_rotation_rounded_to_float32_counts_as_orthogonal() -> None:
    sequence = freia_sequence(permute_soft=True)
    _spoil(sequence.module_list[0], "w_perm", (0, 0), 1e-6)
    assert FlowDecoder.from_freia(sequence).permute_soft


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"affine_clamping": 1.5}, "its affine_clamping is 1.5, but .* has 1.9"),
        ({"global_affine_type": "EXP"}, "its global_affine_type is 'EXP', but .* has 'SOFTPLUS'"),
        ({"cond_shape": (5,)}, "its condition is 5, but .* has 4"),
    ],
)
def test_blocks_that_are_not_alike_are_refused_by_name(options: dict[str, Any], reason: str) -> None:
    sequence = freia_sequence()
    sequence.append(
        modules.AllInOneBlock,
        **({"subnet_constructor": subnet, "affine_clamping": 1.9} | {"cond": 0, "cond_shape": (4,)} | options),
    )
    with pytest.raises(UnsupportedBlockError, match=rf"^module_list\.3 \(AllInOneBlock\): {reason}"):
        FlowDecoder.from_freia(sequence)


def test_dialects_mixed_in_one_sequence_are_refused() -> None:
    sequence = freia_sequence()
    sequence.module_list[1] = freia_sequence(SecondClampBlock).module_list[1]
    with pytest.raises(UnsupportedBlockError, match=r"^module_list\.1 .*its clamp is 'tanh\(s/alpha\)'"):
        FlowDecoder.from_freia(sequence)


def test_second_condition_is_refused() -> None:
    with pytest.raises(UnsupportedBlockError, match=r"^module_list\.0 .*it takes condition number 1; only one"):
        FlowDecoder.from_freia(freia_sequence(cond=1))


def test_blocks_over_images_are_refused() -> None:
    def convolutions(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, 8, 1), nn.ReLU(), nn.Conv2d(8, outputs, 1))

    sequence = SequenceINN(4, 8, 8)
    sequence.append(modules.AllInOneBlock, subnet_constructor=convolutions)
    with pytest.raises(UnsupportedBlockError, match=r"^module_list\.0 .*blocks over images or sequences"):
        FlowDecoder.from_freia(sequence)


@named_as_freia_names_it
class UnknownClampBlock(modules.AllInOneBlock):
    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        j = self.clamp * F.softsign(0.1 * a[:, : x.shape[1]])
        return x * j.exp(), j.sum(1)


@named_as_freia_names_it
class SilentBlock(modules.AllInOneBlock):
    _affine = None


@named_as_freia_names_it
class OtherAffineBlock(modules.AllInOneBlock):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.global_scale_activation = torch.abs


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (UnknownClampBlock, r"its coupling clamps 1\.330 to .*, known are alpha tanh\(s\) = "),
        (SilentBlock, "its coupling cannot be asked for its clamp"),
        (OtherAffineBlock, "its global affine is none of SOFTPLUS, SIGMOID, EXP"),
    ],
)
def test_block_that_answers_otherwise_is_refused(block: type[nn.Module], reason: str) -> None:
    with pytest.raises(UnsupportedBlockError, match=rf"^module_list\.0 \(AllInOneBlock\): {reason}"):
        FlowDecoder.from_freia(freia_sequence(block))


def test_other_kinds_of_modules_are_refused() -> None:
    with pytest.raises(UnsupportedBlockError, match="expected a FrEIA SequenceINN, got Linear"):
        FlowDecoder.from_freia(nn.Linear(2, 2))
    with pytest.raises(UnsupportedBlockError, match="SequenceINN: it has no blocks"):
        FlowDecoder.from_freia(SequenceINN(9))
    other = SequenceINN(9)
    other.append(modules.RNVPCouplingBlock, subnet_constructor=subnet)
    with pytest.raises(UnsupportedBlockError, match=r"^module_list\.0 \(RNVPCouplingBlock\): only AllInOneBlock"):
        FlowDecoder.from_freia(other)
    with pytest.raises(UnsupportedBlockError, match="force_tuple_output=True is not supported"):
        FlowDecoder.from_freia(SequenceINN(9, force_tuple_output=True))
    assert issubclass(UnsupportedBlockError, CFlowFastError)
