"""A model file holds everything, needs nothing else, and a bad one is named in one line."""

from __future__ import annotations

import copy
import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import calibrated_model, same_tensors, tiny_model

from cflow_fast.decoder import FlowDecoder
from cflow_fast.errors import CFlowFastError, ModelFileError
from cflow_fast.model import CFlowAD
from cflow_fast.model_file import read_tensors


@pytest.fixture
def path(model: CFlowAD, tmp_path: Path) -> Path:
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path: Path, metadata: dict[str, str], without: str | None = None) -> None:
    """Change entries of a model file's metadata, and leave out a tensor."""
    tensors, old = read_tensors(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != without}, str(path), old | metadata)


def refused(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        CFlowAD.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permute_soft": True, "activation": "softplus", "affine_clamping": 1.2},
        {"condition": 0, "image_size": (32, 64), "reflect_padding": True, "precision": "bf16"},
        {"encoder": "mobilenetv3_large_100", "layers": ("blocks.2",), "coupling_blocks": 1, "precision": "auto"},
    ],
)
def test_loaded_model_predicts_identically(tmp_path: Path, good_paths: list[Path], options: dict[str, object]) -> None:
    saved = calibrated_model(good_paths, **options)
    saved.save(tmp_path / "model.safetensors")
    torch.manual_seed(99)
    loaded = CFlowAD.load(tmp_path / "model.safetensors")
    assert same_tensors(saved, loaded)
    assert loaded.options == saved.options
    assert not loaded.training
    for before, after in zip(saved.predict(good_paths), loaded.predict(good_paths), strict=True):
        np.testing.assert_array_equal(before.anomaly_map, after.anomaly_map)
        assert (before.score, before.is_defective, before.defects) == (after.score, after.is_defective, after.defects)


def test_loading_touches_no_network_and_no_other_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, good_paths: list[Path]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert CFlowAD.load(path).predict(good_paths[0])[0].score > 0


def test_file_is_safetensors_with_everything_inside(path: Path, model: CFlowAD) -> None:
    assert path.read_bytes()[8:10] == b'{"', "after eight bytes of its length, safetensors' header is JSON"
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(model.state_dict())
        assert torch.equal(file.get_tensor("encoder.mean"), model.encoder.mean)
    assert (metadata["format"], metadata["version"]) == ("cflow_fast model", "1")
    assert json.loads(metadata["model"]) == model.options


def test_precision_is_the_one_of_the_calibration(tmp_path: Path, good_paths: list[Path]) -> None:
    """A model calibrated where bf16 is not multiplied goes on in fp32 where it is, and the other way round."""
    for settled in ("fp32", "bf16"):
        model = tiny_model(precision=settled)
        model.save(tmp_path / "model.safetensors")
        assert {f.precision for f in CFlowAD.load(tmp_path / "model.safetensors").folded()} == {settled}


def test_uncalibrated_model_stays_uncalibrated(tmp_path: Path, good_paths: list[Path]) -> None:
    tiny_model().save(tmp_path / "model.safetensors")
    loaded = CFlowAD.load(tmp_path / "model.safetensors")
    assert not loaded.is_calibrated
    assert loaded.image_threshold is None


def test_model_loaded_in_inference_mode_predicts_and_trains(path: Path, good_paths: list[Path]) -> None:
    with torch.inference_mode():
        loaded = CFlowAD.load(path)
        inside = loaded.predict(good_paths[0])[0].score
    assert loaded.predict(good_paths[0])[0].score == inside
    decoder = loaded.decoders[0]
    decoder.log_prob(torch.randn(1, 64, 2, 2)).sum().backward()  # type: ignore[operator]
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_loaded_encoder_says_where_its_weights_came_from(path: Path) -> None:
    assert CFlowAD.load(path).encoder.source == f"file {path}"


def test_file_cut_short_at_any_place_is_named(path: Path) -> None:
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "it is cut short or no model" in refused(path)


def test_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("not a model\n" * 100)
    assert "cut short or no model" in refused(path)
    torch.save({"weight": torch.zeros(3)}, path)
    assert "cut short or no model" in refused(path)
    save_file({"weight": torch.zeros(3)}, str(path))
    assert "is not a cflow_fast model: train one" in refused(path)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    assert "no model at" in refused(tmp_path / "model.safetensors")
    assert "no model at" in refused(tmp_path)


def test_other_version_is_named(path: Path) -> None:
    rewrite(path, {"version": "7"})
    assert "is a model of version 7, this package reads version 1" in refused(path)


@pytest.mark.parametrize(
    "options",
    [
        "not JSON",
        "[]",
        "{}",
        '{"image_size": 5}',
        '{"image_size": [64, 64], "encoder": "resnet81"}',
        '{"image_size": [64, 64], "encoder": "resnet18", "colour": "red"}',
    ],
)
def test_altered_options_are_named(path: Path, options: str) -> None:
    rewrite(path, {"model": options})
    assert "is damaged or was altered" in refused(path)


def test_missing_tensor_is_named(path: Path) -> None:
    rewrite(path, {}, without="thresholds")
    assert "is damaged or was altered" in refused(path)


def test_file_where_a_folder_is_wanted_is_named_and_left_alone(model: CFlowAD, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CFlowFastError, match=r"cannot write .*/file/model\.safetensors: .*/file is a file;"):
        model.save(tmp_path / "file" / "model.safetensors")
    assert (tmp_path / "file").read_text() == "mine"


def test_model_that_cannot_be_written_leaves_the_old_one(
    path: Path, model: CFlowAD, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = path.read_bytes()

    def half(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(whole[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cflow_fast.model_file.save_file", half)
    model.set_thresholds(math.pi, math.pi)
    with pytest.raises(CFlowFastError, match=r"cannot write .*model\.safetensors: .*No space left"):
        model.save(path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_exchanged_decoder_of_another_dialect_survives_the_file(model: CFlowAD, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    old = other.decoders[0]
    other.decoders[0] = FlowDecoder(**old.options | {"clamp": "tanh(s/alpha)", "global_affine_type": "SIGMOID"})
    other.save(tmp_path / "model.safetensors")
    loaded = CFlowAD.load(tmp_path / "model.safetensors")
    image = torch.rand(1, 3, *model.image_size)
    torch.testing.assert_close(loaded(image), other.eval()(image), rtol=0, atol=0)


def test_file_with_another_resize_rule_is_refused(path: Path) -> None:
    rewrite(path, {"resize": "crop"})
    assert "resizes images by 'crop'" in refused(path)


def test_altered_decoders_are_named(path: Path, model: CFlowAD) -> None:
    longer = [decoder.options | {"coupling_blocks": 3} for decoder in model.decoders]
    rewrite(path, {"decoders": json.dumps(longer)})
    assert "is damaged or was altered" in refused(path)
