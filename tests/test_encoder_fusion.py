"""A fused encoder computes what the encoder does, faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cflow_fast import encoder_fusion
from cflow_fast.encoder_fusion import FusedEncoder
from cflow_fast.encoders import DEFAULT_LAYERS, Encoder


def random_encoder(name: str, layers: tuple[str, ...] | None = None, reflect_padding: bool = False) -> Encoder:
    """Batch norms far from their initial values, or there would be nothing to fold."""
    torch.manual_seed(0)
    encoder = Encoder(name, layers, pretrained=False, reflect_padding=reflect_padding)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return encoder.to(memory_format=torch.channels_last)


def assert_same(fused: FusedEncoder, encoder: Encoder, images: torch.Tensor) -> None:
    for mine, theirs in zip(fused(images), encoder(images), strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 5e-6 * theirs.abs().max()


@pytest.mark.parametrize("name", [*DEFAULT_LAYERS, "efficientnet_b0", "densenet121"])
def test_it_gives_the_encoders_own_maps_unpacked_and_packed(name: str) -> None:
    encoder = random_encoder(name)
    fused = FusedEncoder(encoder)
    images = torch.rand(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        assert_same(fused, encoder, images)


def test_reflected_padding_stays_reflected() -> None:
    encoder = random_encoder("resnet18", reflect_padding=True)
    fused = FusedEncoder(encoder)
    for _ in range(2):
        assert_same(fused, encoder, torch.rand(1, 3, 64, 64))


def test_no_batch_norm_is_left_in_a_residual_network() -> None:
    fused = FusedEncoder(random_encoder("resnet18"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in used_modules(fused.folded))


def used_modules(network: torch.fx.GraphModule) -> list[nn.Module]:
    return [network.get_submodule(str(node.target)) for node in network.graph.nodes if node.op == "call_module"]


def test_the_encoder_itself_stays_as_it_was() -> None:
    encoder = random_encoder("resnet18")
    before = copy.deepcopy(encoder.state_dict())
    FusedEncoder(encoder)(torch.rand(1, 3, 64, 64))
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs whatever the CPU's vector units are: oneDNN computes the same everywhere."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")
    monkeypatch.setattr(encoder_fusion, "cpu_has", lambda feature: True)


@pytest.mark.usefixtures("packing")
def test_additions_and_activations_go_into_the_convolutions_of_a_residual_network() -> None:
    fused = FusedEncoder(random_encoder("resnet18"))
    images = torch.rand(1, 3, 64, 64)
    fused(images)
    fused(images)
    (packed,) = fused._packed.values()
    kinds = {type(module).__name__ for module in used_modules(packed)}
    assert kinds == {"_PackedConvolution", "MaxPool2d"}
    assert not [node for node in packed.graph.nodes if node.op == "call_function" and "add" in node.name]


@pytest.mark.usefixtures("packing")
def test_a_shape_is_packed_for_at_its_second_use_and_few_are_kept() -> None:
    fused = FusedEncoder(random_encoder("resnet18", ("layer1",)))
    batches = [torch.rand(count, 3, 32, 32) for count in (1, 2, 3)]
    fused(batches[0])
    assert not fused._packed
    for batch in batches:
        fused(batch)
        fused(batch)
    assert [shape[0] for shape in fused._packed] == [2, 3]


@pytest.mark.usefixtures("packing")
def test_packed_or_not_an_image_has_the_same_features() -> None:
    fused = FusedEncoder(random_encoder("resnet18"))
    images = torch.rand(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    first = fused(images)
    fused(images)
    packed = fused(images)
    alone = fused(images[1:2])
    for a, b, c in zip(first, packed, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6 * a.abs().max().item())
        torch.testing.assert_close(a[1:2], c, rtol=0, atol=5e-6 * a.abs().max().item())


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("where", ["image", "weight"])
def test_nan_is_never_taken_for_a_zero(where: str) -> None:
    encoder = random_encoder("resnet18", ("layer1",))
    images = torch.rand(1, 3, 32, 32)
    if where == "image":
        images[0, 0, 3, 3] = torch.nan
    else:
        next(encoder.network.parameters())[0, 0, 0, 0] = torch.nan
    fused = FusedEncoder(encoder)
    for _ in range(3):
        assert fused(images)[0].isnan().any()


def test_an_empty_batch_gives_empty_maps() -> None:
    fused = FusedEncoder(random_encoder("resnet18", ("layer1",)))
    for _ in range(2):
        assert fused(torch.zeros(0, 3, 32, 32))[0].shape == (0, 64, 8, 8)


def test_images_are_checked_as_the_encoder_checks_them() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        FusedEncoder(random_encoder("resnet18", ("layer1",)))(torch.zeros(3, 32, 32))
