"""A trained model in one safetensors file: weights of encoder and decoders, calibration, and how to rebuild them.

The metadata holds `format`, `version`, `resize` and, as JSON, the constructors' options of `model` and `decoders`; the
tensors are the module's state dict, so the encoder's weights and normalisation, the maxima and the thresholds travel
with it. Hard permutations are stored as indices. Nothing in the file is ever executed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cflow_fast.decoder import FlowDecoder
from cflow_fast.errors import CFlowFastError, ModelFileError
from cflow_fast.files import atomic_path

if TYPE_CHECKING:
    from cflow_fast.model import CFlowAD

FORMAT = "cflow_fast model"
VERSION = "1"
RESIZE = "stretch to image_size, bilinear, antialiased"
"""How images come to the model's size; a file that was written under another rule is refused."""


def save_model(model: CFlowAD, path: str | os.PathLike[str]) -> None:
    """See CFlowAD.save. Raises CFlowFastError when the file cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    decoders = [decoder.options for decoder in model.decoders]
    metadata = {"format": FORMAT, "version": VERSION, "resize": RESIZE}
    metadata |= {"model": json.dumps(model.options), "decoders": json.dumps(decoders)}
    write_tensors(path, tensors, metadata)


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> CFlowAD:
    """See CFlowAD.load."""
    from cflow_fast.model import CFlowAD

    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ModelFileError(f"{path} is not a cflow_fast model: train one with `cflow-fast train`")
    if metadata.get("version") != VERSION:
        raise ModelFileError(
            f"{path} is a model of version {metadata.get('version')}, this package reads version {VERSION}: "
            "train it anew, or install the package that wrote it"
        )
    if metadata.get("resize") != RESIZE:
        raise ModelFileError(f"{path} resizes images by {metadata.get('resize')!r}, which is not known: train it anew")
    try:
        options, decoders = json.loads(metadata["model"]), json.loads(metadata["decoders"])
        options["image_size"] = tuple(options["image_size"])
        options.setdefault("encoder_precision", "fp32")  # the only one there was before it was written down
        with torch.inference_mode(False):  # wherever it is loaded: its parameters have to tell when they change
            model = CFlowAD(**options, pretrained=False)
            if decoders != [decoder.options for decoder in model.decoders]:  # one was exchanged for another dialect
                model.decoders = nn.ModuleList(FlowDecoder(**decoder) for decoder in decoders)
            model.load_state_dict(tensors)
            model.encoder.source = f"file {os.fspath(path)}"
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"{path} is damaged or was altered ({first_line}): train the model anew") from error
    return model.to(device).eval()


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, str(temporary), metadata)
        except (OSError, SafetensorError) as error:
            raise CFlowFastError(f"cannot write {path}: {error}; is the disk full?") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor and the metadata of a safetensors file; ModelFileError names a file that cannot be read."""
    if not Path(path).is_file():
        raise ModelFileError(f"no model at {path}: give the file that `cflow-fast train` wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}): it is cut short or no model; train it anew") from error
