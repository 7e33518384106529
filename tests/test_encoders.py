"""Encoders give the outputs of timm's own modules, hold nothing beyond them, and say in one line what is wrong."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cflow_fast import lite0
from cflow_fast.encoders import Encoder, calibrate_batch_norm
from cflow_fast.errors import EncoderError

NOT_SQUARE = (64, 96)


def random_encoder(
    name: str = "resnet18", layers: tuple[str, ...] = ("layer1", "layer2"), reflect_padding: bool = False
) -> Encoder:
    """Random weights with batch norms that let something through."""
    torch.manual_seed(0)
    encoder = Encoder(name, layers, pretrained=False, reflect_padding=reflect_padding)
    calibrate_batch_norm(encoder, [images(4)])
    return encoder


def images(count: int, size: tuple[int, int] = NOT_SQUARE) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (128, 256, 512)),
        ("wide_resnet50_2", (512, 1024, 2048)),
        ("mobilenetv3_large_100", (40, 112, 160)),
        ("tf_efficientnet_lite0", (40, 112, 320)),
        ("regnety_004", (104, 208, 440)),  # not in the table: timm's own list
    ],
)
def test_default_taps_are_at_strides_8_16_and_32(name: str, channels: tuple[int, ...]) -> None:
    encoder = Encoder(name, pretrained=False)
    assert encoder.channels == channels
    assert encoder.strides == (8, 16, 32)
    shapes = [tuple(feature.shape) for feature in encoder(images(1))]
    height, width = NOT_SQUARE
    assert shapes == [(1, D, height // s, width // s) for D, s in zip(channels, encoder.strides, strict=True)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ("layer1", "layer2.0.conv1", "layer3")),
        ("mobilenetv3_large_100", ("blocks.4", "blocks.2")),
        ("tf_efficientnet_lite0", ("conv_stem", "blocks.6")),
    ],
)
@torch.no_grad()
def test_taps_are_the_outputs_of_timms_modules_on_normalised_images(name: str, layers: tuple[str, ...]) -> None:
    encoder = random_encoder(name, layers)
    model = timm.create_model(name).eval()
    model.load_state_dict(encoder.network.state_dict(), strict=False)
    outputs: dict[str, Tensor] = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: outputs.update({layer: output.clone()})
        )
    batch = images(2)
    expected = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    assert expected is not None
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (expected.mean, expected.std))
    model((batch - mean) / std)
    for layer, feature in zip(layers, encoder(batch), strict=True):
        torch.testing.assert_close(feature, outputs[layer])


def test_nothing_after_the_last_tap_is_held_or_run() -> None:
    encoder = Encoder("resnet18", ("layer1", "layer2"), pretrained=False)
    assert {key.split(".")[0] for key in encoder.network.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}
    run: list[nn.Module] = []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, _inputs, _output: run.append(module))
    encoder(images(1))
    whole = timm.create_model("resnet18")
    until_layer2 = [
        name
        for name, module in whole.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith(("conv1", "layer1", "layer2"))
    ]
    assert len(run) == len(until_layer2)


def test_an_encoder_stays_as_it_is_when_asked_to_train() -> None:
    encoder = random_encoder()
    before = copy.deepcopy(encoder.state_dict())
    encoder.train()
    features = encoder(images(2))
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(feature.requires_grad for feature in features)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


def test_state_dict_restores_weights_and_normalisation() -> None:
    encoder = random_encoder()
    encoder.mean += 0.1
    other = Encoder("resnet18", ("layer1", "layer2"), pretrained=False)
    other.load_state_dict(encoder.state_dict(), strict=True)
    batch = images(2)
    assert all(torch.equal(a, b) for a, b in zip(other(batch), encoder(batch), strict=True))


def test_a_deep_copy_is_independent() -> None:
    encoder = random_encoder()
    batch = images(2)
    before = encoder(batch)
    twin = copy.deepcopy(encoder)
    assert all(torch.equal(a, b) for a, b in zip(twin(batch), before, strict=True))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(encoder(batch), before, strict=True))
    assert (twin.layers, twin.channels, twin.strides) == (encoder.layers, encoder.channels, encoder.strides)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_large_100"])
def test_channels_last_gives_the_same_features(name: str) -> None:
    encoder = random_encoder(name, {"resnet18": ("layer2",), "mobilenetv3_large_100": ("blocks.2",)}[name])
    batch = images(2)
    (expected,) = encoder(batch)
    (feature,) = encoder.to(memory_format=torch.channels_last)(batch)
    assert feature.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_features_have_the_modules_dtype() -> None:
    encoder = random_encoder()
    batch = images(1)
    expected = encoder(batch)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
        features = copy.deepcopy(encoder).to(dtype)(batch)
        assert {feature.dtype for feature in features} == {dtype}
        for feature, reference in zip(features, expected, strict=True):
            torch.testing.assert_close(feature.float(), reference, rtol=tolerance, atol=tolerance)


def test_an_encoder_compiles_to_one_graph() -> None:
    encoder = random_encoder()
    batch = images(2)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(batch), encoder(batch), strict=True))


def test_with_reflection_a_uniform_image_has_uniform_features() -> None:
    uniform = torch.full((1, 3, 64, 96), 0.8)
    feature = random_encoder(layers=("layer2",), reflect_padding=True)(uniform)[0]
    torch.testing.assert_close(feature, feature[..., :1, :1].expand_as(feature))
    with_zeros = random_encoder(layers=("layer2",))(uniform)[0]
    assert not torch.allclose(with_zeros, with_zeros[..., :1, :1].expand_as(with_zeros), atol=1e-2)


def test_reflection_is_refused_where_the_encoder_pads_by_its_own_rules() -> None:
    with pytest.raises(EncoderError, match="tf_efficientnet_lite0 pads by rules of its own"):
        Encoder("tf_efficientnet_lite0", pretrained=False, reflect_padding=True)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])  # plain batch norm, and timm's with an activation inside
def test_calibrated_batch_norms_average_over_the_batches(name: str) -> None:
    encoder = Encoder(name, pretrained=False)
    first = next(module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d))
    inputs: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))
    calibrate_batch_norm(encoder, [images(2), images(3) ** 2])
    handle.remove()
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
    variance = torch.stack([x.var(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
    torch.testing.assert_close(first.running_mean, mean)
    torch.testing.assert_close(first.running_var, variance)
    assert not any(module.training for module in encoder.modules())
    assert first.momentum == 0.1


def test_calibrating_with_no_image_is_an_error() -> None:
    with pytest.raises(EncoderError, match="no image to calibrate"):
        calibrate_batch_norm(Encoder("resnet18", pretrained=False), [])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.rand(3, 64, 64), ValueError, r"\(B, 3, H, W\), not \(3, 64, 64\)"),
        (torch.rand(1, 1, 64, 64), ValueError, r"\(B, 3, H, W\), not \(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "not torch.uint8"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.complex64), TypeError, "not torch.complex64"),
    ],
)
def test_images_of_the_wrong_kind_are_refused(batch: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        random_encoder()(batch)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("wideresnet50_2", None, "did you mean wide_resnet50_2"),
        ("resnet18.tv_in2k", None, r"did you mean .*resnet18\.tv_in1k"),
        ("zzzzzzzz", None, r"timm\.list_models\(\)"),
        ("resnet18", ("layer5",), "no layer 'layer5'; it has layer4"),
        ("resnet18", ("zzz",), "no layer 'zzz'; it has conv1, bn1"),
        ("resnet18", (), "name at least one"),
        ("resnet18", ("fc",), "fc gives no feature map"),
        ("resnet18", ("bn1", "layer1"), "bn1 is overwritten by what follows it"),
        ("vit_tiny_patch16_224", None, "no feature map at stride 8"),
        ("vit_tiny_patch16_224", ("blocks.3",), "vit_tiny_patch16_224 cannot"),
    ],
)
def test_what_cannot_be_tapped_is_refused_in_one_line(name: str, layers: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        Encoder(name, layers, pretrained=False)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole_state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return timm.create_model("resnet18").state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_may_hold_more_or_less_than_the_taps_need(
    whole_state: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    until_layer2 = {key: x for key, x in whole_state.items() if not key.startswith(("layer3", "layer4", "fc"))}
    for number, state in enumerate((whole_state, until_layer2)):
        path = tmp_path / f"{number}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
        encoder = Encoder("resnet18", ("layer1", "layer2"), weights=path)
        assert encoder.source == f"file {path}"
        assert all(torch.equal(x, whole_state[key]) for key, x in encoder.network.state_dict().items())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"it lacks layer1\.0\.conv2\.weight;"),
        ("unknown", r"it holds the unknown layer1\.7\.weight;"),
        ("misshapen", r"it has in another shape conv1\.weight, \(64, 1, 7, 7\) for \(64, 3, 7, 7\);"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    whole_state: dict[str, Tensor], tmp_path: Path, fault: str, message: str
) -> None:
    state = dict(whole_state)
    if fault == "missing":
        del state["layer1.0.conv2.weight"]
    elif fault == "unknown":
        state["layer1.7.weight"] = torch.zeros(1)
    else:
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(EncoderError, match=message) as caught:
        Encoder("resnet18", ("layer1",), weights=path)
    assert str(path) in str(caught.value)


UNREADABLE = (
    "absent.pth",
    "cut.safetensors",
    "cut.pth",
    "code.pth",
    "numbers.pth",
    "list.pth",
    "empty.pth",
    "text.pth",
)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    whole_state: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name.startswith("cut"):
        save_file(whole_state, path) if path.suffix == ".safetensors" else torch.save(whole_state, path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif name == "code.pth":
        torch.save(nn.Conv2d(3, 3, 1), path)  # a pickle of more than tensors is never run
    elif name in ("numbers.pth", "list.pth"):
        torch.save({"epoch": 3} if name == "numbers.pth" else [1, 2], path)
    elif name != "absent.pth":
        path.write_bytes(b"" if name == "empty.pth" else b"no weights here")
    with pytest.raises(EncoderError) as caught:
        Encoder("resnet18", ("layer1",), weights=path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert name == "absent.pth" or "with a state dict of resnet18 in timm's names" in message
    assert not any(word in message for word in ("Error", "weights_only", "torch.", "pickle"))


@pytest.mark.skipif(not lite0.is_installed(), reason=f"needs the package {lite0.PACKAGE}")
def test_a_file_goes_before_a_package_and_a_package_before_the_hub(tmp_path: Path, no_hub: None) -> None:
    path = tmp_path / "own.safetensors"
    weights = lite0.load_weights()
    save_file({key: (x + 1).contiguous() for key, x in weights.items()}, path)
    layers, stem = ("blocks.2",), "conv_stem.weight"
    assert torch.equal(Encoder(lite0.ENCODER, layers).network.state_dict()[stem], weights[stem])
    assert torch.equal(Encoder(lite0.ENCODER, layers, weights=path).network.state_dict()[stem], weights[stem] + 1)
    assert Encoder(lite0.ENCODER, layers, pretrained=False).source == "none (random)"
    with pytest.raises(EncoderError, match="weights of efficientnet_lite0 "):
        Encoder("efficientnet_lite0")  # the same shapes, but not the model that the package is for


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and an address at which nobody answers."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_without_a_network_one_line_says_the_ways_out_at_once(no_hub: None) -> None:
    start = time.monotonic()
    with pytest.raises(EncoderError, match=r"local weights file.*efficientnet-lite0.*pretrained=False") as caught:
        Encoder("resnet18")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("CFLOW_FAST_WEIGHTS" not in os.environ, reason="needs CFLOW_FAST_WEIGHTS, a folder of real weights")
def test_a_real_resnet_up_to_layer3_fits() -> None:
    path = Path(os.environ["CFLOW_FAST_WEIGHTS"]) / "resnet18_to_layer3.safetensors"
    encoder = Encoder("resnet18", ("layer1", "layer2", "layer3"), weights=path)
    assert (encoder.channels, encoder.strides) == ((64, 128, 256), (4, 8, 16))
    state = load_file(path)
    assert encoder.network.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[key]) for key, x in encoder.network.state_dict().items())
    with pytest.raises(EncoderError, match=r"it lacks layer4\..* or tap only layers that they reach"):
        Encoder("resnet18", weights=path)
