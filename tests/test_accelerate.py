"""One line replaces FrEIA's decoders, wherever they are, and says what it did."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from cflow_fast import FlowDecoder, FoldedDecoder
from cflow_fast.accelerate import accelerate
from cflow_fast.errors import UnsupportedBlockError
from cflow_fast.parity import roughen
from cflow_fast.precision import arithmetic

CONDITION = 8


def freia_decoder(features: int, **options: Any) -> Any:
    torch.manual_seed(features)
    decoder = FlowDecoder(features, CONDITION, 3, **options)
    roughen(decoder)
    return decoder.to_freia().eval()


def refused_decoder(features: int) -> Any:
    sequence = freia_decoder(features)
    sequence.module_list[1].GIN = True
    return sequence


class Detector(nn.Module):
    """As anomalib holds its decoders: a ModuleList, called as decoder(z, [c])."""

    def __init__(self, *decoders: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoders = nn.ModuleList(decoders)

    def forward(self, z: list[Tensor], c: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [decoder(rows, [c]) for decoder, rows in zip(self.decoders, z, strict=True)]


def assert_answers_agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for fast, slow in zip(ours, theirs, strict=True):
        assert not fast.requires_grad
        torch.testing.assert_close(fast, slow.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("permute_soft", [False, True])
def test_sequence_answers_as_before(permute_soft: bool) -> None:
    sequence = freia_decoder(24, permute_soft=permute_soft)
    fast = accelerate(sequence, "fp32")
    z, c = torch.randn(7, 24), torch.randn(7, CONDITION)
    assert_answers_agree(fast(z, [c]), sequence(z, [c]))
    assert isinstance(sequence, SequenceINN), "the original is as it was"
    assert str(fast.acceleration) == "replaced the module: fp32"


def test_sequence_answers_to_freias_keywords() -> None:
    sequence = freia_decoder(24)
    z, c = torch.randn(7, 24), torch.randn(7, CONDITION)
    assert_answers_agree(accelerate(sequence, "fp32")(x_or_z=z, c=[c]), sequence(x_or_z=z, c=[c]))


@pytest.mark.parametrize("again", ["auto", "fp32"])
def test_what_was_accelerated_before_is_given_back_itself(again: str) -> None:
    one, detector = accelerate(freia_decoder(24), "fp32"), Detector(freia_decoder(24), refused_decoder(9))
    fast: Any = accelerate(detector, "fp32")
    decoders, report = list(fast.decoders), fast.acceleration
    assert accelerate(one, again) is one
    assert str(one.acceleration) == "replaced the module: fp32"
    assert accelerate(fast, again) is fast
    assert all(a is b for a, b in zip(fast.decoders, decoders, strict=True))
    assert fast.acceleration == report


def test_a_decoder_that_is_new_is_replaced_beside_those_that_were_before() -> None:
    fast: Any = accelerate(Detector(freia_decoder(24)), "fp32")
    fast.decoders.append(freia_decoder(16))
    more: Any = accelerate(fast, "fp32")
    assert more.acceleration.replaced == {"decoders.0": "fp32", "decoders.1": "fp32"}
    assert isinstance(fast.decoders[1], SequenceINN)
    z, c = [torch.randn(5, features) for features in (24, 16)], torch.randn(5, CONDITION)
    for ours, theirs in zip(more(z, c), fast(z, c), strict=True):
        assert_answers_agree(ours, theirs)


def test_another_precision_than_before_is_refused() -> None:
    fast = accelerate(Detector(freia_decoder(24)), "fp32")
    with pytest.raises(UnsupportedBlockError, match=r"decoders\.0 was accelerated in fp32 before: accelerate the orig"):
        accelerate(fast, "bf16")
    with pytest.raises(ValueError, match="precision is one of"):
        accelerate(fast, "half")


def test_every_decoder_of_a_module_is_replaced_in_a_copy() -> None:
    detector = Detector(freia_decoder(24), freia_decoder(16, permute_soft=True), freia_decoder(9))
    fast: Any = accelerate(detector, "fp32")
    z, c = [torch.randn(5, features) for features in (24, 16, 9)], torch.randn(5, CONDITION)
    assert all(isinstance(decoder, SequenceINN) for decoder in detector.decoders)
    assert all(isinstance(decoder, FoldedDecoder) for decoder in fast.decoders)
    assert not hasattr(detector, "acceleration")
    for ours, theirs in zip(fast(z, c), detector(z, c), strict=True):
        assert_answers_agree(ours, theirs)
    assert fast.encoder.weight.data_ptr() != detector.encoder.weight.data_ptr()
    assert fast.acceleration.replaced == {f"decoders.{i}": "fp32" for i in range(3)}
    assert not fast.acceleration.left


def test_inplace_replaces_within_the_module_itself() -> None:
    detector = Detector(freia_decoder(24), freia_decoder(9))
    encoder = detector.encoder
    assert accelerate(detector, "fp32", inplace=True) is detector
    assert all(isinstance(decoder, FoldedDecoder) for decoder in detector.decoders)
    assert detector.encoder is encoder


def test_sequence_itself_is_returned_as_another_module_even_inplace() -> None:
    sequence = freia_decoder(24)
    fast = accelerate(sequence, "fp32", inplace=True)
    assert isinstance(fast, FoldedDecoder)
    assert isinstance(sequence, SequenceINN)


def test_what_is_left_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    detector = Detector(freia_decoder(24), refused_decoder(9))
    with caplog.at_level(logging.WARNING, "cflow_fast"):
        fast: Any = accelerate(detector, "fp32")
    reason = "module_list.1 (AllInOneBlock): GIN blocks (gin_block=True) are not supported"
    assert fast.acceleration.left == {"decoders.1": reason}
    assert str(fast.acceleration) == f"replaced decoders.0: fp32\nleft decoders.1: {reason}"
    assert [record.getMessage() for record in caplog.records] == [f"accelerate left decoders.1 as it was: {reason}"]
    z, c = torch.randn(5, 9), torch.randn(5, CONDITION)
    for ours, theirs in zip(fast.decoders[1](z, [c]), detector.decoders[1](z, [c]), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_replaced_is_an_error_that_names_every_reason() -> None:
    detector = Detector(refused_decoder(24), refused_decoder(9))
    with pytest.raises(
        UnsupportedBlockError, match=r"nothing could be replaced: decoders\.0: .*GIN.*; decoders\.1: .*GIN"
    ):
        accelerate(detector, inplace=True)
    assert all(isinstance(decoder, SequenceINN) for decoder in detector.decoders)
    with pytest.raises(UnsupportedBlockError, match=r"^module_list\.1 \(AllInOneBlock\): GIN"):
        accelerate(refused_decoder(9))
    with pytest.raises(
        UnsupportedBlockError, match="Linear contains no FrEIA SequenceINN: there is nothing to replace"
    ):
        accelerate(nn.Linear(2, 2))


def test_decoder_with_a_rotation_that_is_none_is_left() -> None:
    detector = Detector(freia_decoder(24, permute_soft=True), freia_decoder(9))
    with torch.no_grad():
        detector.decoders[0].module_list[2].w_perm[0, 0] += 1e-3  # type: ignore[union-attr,index]
    fast: Any = accelerate(detector)
    assert list(fast.acceleration.replaced) == ["decoders.1"]
    assert "module_list.2 (AllInOneBlock): its w_perm is not orthogonal" in fast.acceleration.left["decoders.0"]


def test_decoder_known_by_two_names_is_replaced_under_both() -> None:
    detector: Any = Detector(freia_decoder(9))
    detector.first, detector.all_decoders = detector.decoders[0], detector.decoders
    fast: Any = accelerate(detector, "fp32")
    assert isinstance(fast.first, FoldedDecoder)
    assert isinstance(fast.all_decoders[0], FoldedDecoder)
    assert isinstance(fast.decoders[0], FoldedDecoder)


def test_precision_is_handed_on_and_reported() -> None:
    fast: Any = accelerate(Detector(freia_decoder(24)), "bf16")
    assert fast.decoders[0].get_buffer("w1").dtype == torch.bfloat16
    assert fast.acceleration.replaced == {"decoders.0": str(arithmetic("bf16", torch.device("cpu")))}
    with pytest.raises(ValueError, match=r"precision is one of auto, .*, tf32, fp16, bf16, got 'half'"):
        accelerate(freia_decoder(9), "half")


def test_accelerated_module_switches_modes_as_before_and_its_decoders_stay_in_evaluation() -> None:
    fast: Any = accelerate(Detector(freia_decoder(9)).train(), "fp32")
    fast.eval()
    assert not any(module.training for module in fast.modules())
    fast.train()  # as anomalib's model does to its decoders at the end of every call
    assert fast.training
    assert fast.encoder.training
    assert not fast.decoders[0].training


@pytest.mark.parametrize("given", [None, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_refused_by_its_kind(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"a torch.nn.Module .*, got {type(given).__name__}"):
        accelerate(given)
