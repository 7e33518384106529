"""Frozen feature encoders: a convolutional timm model, tapped at some of its modules and cut off after the last one."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from cflow_fast.encoder_weights import create_model, first_line, load_part
from cflow_fast.errors import EncoderError

DEFAULT_LAYERS = {
    "wide_resnet50_2": ("layer2", "layer3", "layer4"),  # 512, 1024 and 2048 channels
    "resnet18": ("layer2", "layer3", "layer4"),  # 128, 256, 512
    "mobilenetv3_large_100": ("blocks.2", "blocks.4", "blocks.5"),  # 40, 112, 160, CFLOW-AD's; timm's end with 960
    "tf_efficientnet_lite0": ("blocks.2", "blocks.4", "blocks.6"),  # 40, 112, 320
}
"""Taps at strides 8, 16 and 32 (the CFLOW-AD paper's layers 1, 2, 3) of the encoders that this package is tested with.

For every other encoder they are the deepest modules that timm itself lists at these strides.
"""


class Encoder(nn.Module):
    """A frozen timm model that gives the outputs of its modules `layers`, and neither holds nor computes what follows.

    Args:
        name: a timm model name, with or without a tag ("resnet18", "wide_resnet50_2.tv_in1k").
        layers: modules of that model ("layer2", "blocks.5"); None takes DEFAULT_LAYERS.
        pretrained: take ImageNet weights, from where is said below.
        weights: a safetensors or pth file with a state dict in timm's names.
        reflect_padding: pad every convolution by reflection, as the published cflow-ad does with its ResNets.

    The weights are the first of these that applies: the file `weights`; with `pretrained`, an installed package that
    carries them (`lite0`), or else timm's hub; random ones. A file must fit tensor by tensor; only what lies after the
    last tap may be missing, or be there in vain.

    Attributes: `name`, `layers`, `reflect_padding`, `channels` (D of each layer), `strides` (image pixels per feature
    vector, a power of two), `source` (where the weights came from, in words), and the buffers `mean` and `std`,
    (3, 1, 1), which are part of the state dict. Raises EncoderError when a name, a layer or the weights cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        layers: Sequence[str] | None = None,
        pretrained: bool = True,
        weights: str | os.PathLike[str] | None = None,
        reflect_padding: bool = False,
    ) -> None:
        super().__init__()
        config = find_config(name)
        model, state, self.source = create_model(name, pretrained, weights)
        model.eval()
        self.name = name
        self.layers = tuple(layers) if layers is not None else _default_layers(name, model)
        _check_layers(name, model, self.layers)
        self.network = _cut(name, model, self.layers)
        if state is not None:
            load_part(self.network, model, state, f"{name} from {self.source}")
        self.channels, self.strides = _probe(name, model, self.network, self.layers)
        self.reflect_padding = reflect_padding
        if reflect_padding:
            _pad_by_reflection(name, self.network)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), RGB in [0, 1], to a feature map (B, D, H / stride, W / stride) per layer."""
        features = self.network(self.normalised(images))
        return [features[layer] for layer in self.layers]

    def normalised(self, images: Tensor) -> Tensor:
        """Images as the network takes them, in the encoder's precision."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], not {images.dtype}")
        return ((images - self.mean) / self.std).to(self.mean.dtype)

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode whatever is asked, so that its batch norms never move."""
        return super().train(False)


@torch.no_grad()
def calibrate_batch_norm(encoder: Encoder, batches: Iterable[Tensor]) -> None:
    """Set the statistics of an untrained encoder's batch norms to their averages over batches (B, 3, H, W) of images.

    Without it random weights shrink or blow up from layer to layer. The statistics it had are lost.
    """
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average of all batches
            norm.train()
        for batch in batches:
            encoder(batch)
            count += len(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    if not count:
        raise EncoderError(f"no image to calibrate the batch norms of {encoder.name} with: give at least one batch")


def find_config(name: str) -> Any:
    """timm's record of the model and of the inputs its weights expect. Raises EncoderError for a name it has not."""
    try:
        return timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        near = difflib.get_close_matches(name, timm.list_models(include_tags="." in name), n=4, cutoff=0.5)
        tested = f"this package is tested with {', '.join(DEFAULT_LAYERS)}; timm.list_models() lists them all"
        hint = f"did you mean {', '.join(near)}?" if near else tested
        raise EncoderError(f"no encoder {name!r} in timm: {hint}") from error


def _default_layers(name: str, model: nn.Module) -> tuple[str, ...]:
    if (architecture := name.partition(".")[0]) in DEFAULT_LAYERS:
        return DEFAULT_LAYERS[architecture]
    features: Any = model.feature_info
    modules = {feature["reduction"]: feature["module"] for feature in features}  # the last of a stride is the deepest
    if missing := {8, 16, 32} - modules.keys():
        raise EncoderError(f"{name} has no feature map at stride {min(missing)}: name the layers to tap")
    return tuple(modules[stride] for stride in (8, 16, 32))


def _check_layers(name: str, model: nn.Module, layers: tuple[str, ...]) -> None:
    if not layers:
        raise EncoderError(f"no layer of {name} to tap: name at least one")
    modules = [module for module, _ in model.named_modules() if module]
    for layer in layers:
        if layer not in modules:
            near = difflib.get_close_matches(layer, modules, n=4) or [child for child, _ in model.named_children()]
            raise EncoderError(f"{name} has no layer {layer!r}; it has {', '.join(near)} and others")


def _cut(name: str, model: nn.Module, layers: tuple[str, ...]) -> fx.GraphModule:
    """The part of the model that the taps depend on; its forward gives a dictionary of their outputs."""
    try:
        traced = create_feature_extractor(
            model,
            list(layers),
            tracer_kwargs={"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()},
            suppress_diff_warning=True,  # about the graph for training, which is not kept
        )
    except Exception as error:  # tracing runs the model's code, which may do anything
        raise EncoderError(
            f"{name} cannot be cut at {', '.join(layers)} ({first_line(error)}): take a convolutional encoder"
        ) from error
    return fx.GraphModule(traced, traced.graph)


@torch.no_grad()
def _probe(
    name: str, model: nn.Module, network: fx.GraphModule, layers: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of the taps, measured; EncoderError unless each tap is its module's output, a feature map.

    It is not where a module gives a list, or where an activation in place writes over the tap.
    """
    height, width = 96, 128
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    outputs: dict[str, object] = {}

    def keep(layer: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            outputs[layer] = output.clone() if isinstance(output, Tensor) else output

        return hook

    hooks = [model.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    try:
        model(image)
        features = network(image)
    except Exception as error:  # a model of one fixed image size fails in its own way
        raise EncoderError(f"{name} cannot encode an image of {height} x {width} px ({first_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()

    channels, strides = [], []
    for layer in layers:
        output, feature = outputs.get(layer), features[layer]
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise EncoderError(f"{name}'s {layer} gives no feature map (B, D, H, W): tap another layer")
        if output.shape != feature.shape or not torch.allclose(output, feature, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise EncoderError(f"{name}'s {layer} is overwritten by what follows it: tap another layer")
        vertical, horizontal = height / output.shape[2], width / output.shape[3]
        if not 0.5 < vertical / horizontal < 2:
            raise EncoderError(
                f"{name}'s {layer} gives no feature map (B, D, H, W), channels second: tap another layer"
            )
        channels.append(output.shape[1])
        strides.append(2 ** round(math.log2(vertical * horizontal) / 2))  # unpadded convolutions lose border pixels
    return tuple(channels), tuple(strides)


def _pad_by_reflection(name: str, network: nn.Module) -> None:
    for layer, module in network.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if type(module) is not nn.Conv2d:
            raise EncoderError(
                f"{name} pads by rules of its own ({type(module).__name__} {layer}): leave out reflect_padding"
            )
        if module.padding not in ((0, 0), "valid"):
            module.padding_mode = "reflect"
