"""The whole model is a well-behaved module: what it computes, how it folds, moves, copies and calibrates."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from tiny import SIZE, TINY, calibrated_model, read, same_tensors, tiny_model
from torch import Tensor

from cflow_fast.anomaly import anomaly_map
from cflow_fast.decoder import FlowDecoder
from cflow_fast.errors import CFlowFastError, DataError, EncoderError
from cflow_fast.images import resize
from cflow_fast.model import CFlowAD
from cflow_fast.precision import resolve_precision

CPU = torch.device("cpu")


def scores(model: CFlowAD, images: torch.Tensor) -> list[float]:
    return [prediction.score for prediction in model.predict(images)]


@torch.no_grad()
def test_log_probs_are_the_decoders_of_the_encoders_features_per_dimension(
    model: CFlowAD, good_paths: list[Path]
) -> None:
    images = read(good_paths[:3])
    features = model.encoder(images)
    assert [tuple(f.shape) for f in features] == [(3, 64, 16, 16), (3, 128, 8, 8)]
    for feature, decoder, log_prob in zip(features, model.decoders, model.log_probs(images), strict=True):
        assert isinstance(decoder, FlowDecoder)
        expected = decoder.log_prob(feature) / decoder.features
        torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=0)


def test_anomaly_maps_come_at_the_images_size_from_images_resized(model: CFlowAD) -> None:
    images = torch.rand(2, 3, 80, 100, generator=torch.Generator().manual_seed(0))
    maps = model(images)
    log_probs = model.log_probs(resize(images, (SIZE, SIZE)))
    torch.testing.assert_close(maps, anomaly_map(log_probs, (80, 100), model.log_prob_max.tolist()))
    assert maps.shape == (2, 80, 100)


def test_only_the_decoders_are_trained(model: CFlowAD) -> None:
    model.train()
    assert model.decoders.training
    assert not any(module.training for module in model.encoder.modules())
    trainable = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"decoders"}


def test_model_without_calibration_refuses_to_predict(good_paths: list[Path]) -> None:
    model = tiny_model()
    assert not model.is_calibrated
    assert (model.image_threshold, model.pixel_threshold) == (None, None)
    with pytest.raises(CFlowFastError, match="not calibrated: train it"):
        model.predict(good_paths[0])


def test_folded_decoders_are_kept_while_nothing_changes(model: CFlowAD, good_paths: list[Path]) -> None:
    before = model.folded()
    model.predict(good_paths[:2])
    model.set_thresholds(1.0, 1.0)
    assert model.folded() is before


@pytest.mark.parametrize("how", ["optimizer", "no_grad", "data", "load_state_dict", "replaced"])
def test_folded_decoders_are_refreshed_when_a_parameter_changes(
    model: CFlowAD, good_paths: list[Path], how: str
) -> None:
    images = read(good_paths[:2])
    before = model.log_probs(images)[1]
    decoder = model.decoders[1]
    assert isinstance(decoder, FlowDecoder)
    weight = decoder.blocks[0].subnet[0].weight  # type: ignore[union-attr, index]
    assert isinstance(weight, torch.nn.Parameter)
    if how == "optimizer":
        weight.grad = torch.randn_like(weight)
        torch.optim.Adam([weight], 0.1).step()
    elif how == "no_grad":
        with torch.no_grad():
            weight.mul_(2)
    elif how == "data":
        weight.data = weight.data * 2
    elif how == "load_state_dict":
        decoder.load_state_dict({name: tensor * 2 for name, tensor in decoder.named_parameters()}, strict=False)
    else:
        model.decoders[1] = decoder = FlowDecoder(128, 8, 2)
    after = model.log_probs(images)[1]
    assert not torch.allclose(after, before)
    with torch.no_grad():
        torch.testing.assert_close(after, decoder.log_prob(model.features(images)[1]) / 128, atol=1e-5, rtol=1e-5)


def test_deepcopy_predicts_the_same_and_shares_nothing(model: CFlowAD, good_paths: list[Path]) -> None:
    images = read(good_paths[:2])
    before = scores(model, images)
    clone = copy.deepcopy(model)
    assert scores(clone, images) == before
    with torch.no_grad():
        for tensor in (*clone.parameters(), clone.log_prob_max):
            tensor.mul_(1.5)
    assert scores(clone, images) != before
    assert scores(model, images) == before


def test_to_another_dtype_and_back_keeps_the_scores(model: CFlowAD, good_paths: list[Path]) -> None:
    images = read(good_paths[:2])
    before = scores(model, images)
    assert model.to(torch.float64) is model
    assert scores(model, images) == pytest.approx(before, abs=1e-5)
    assert scores(model.to(torch.float32), images) == pytest.approx(before, abs=1e-6)


def test_state_dict_carries_everything_into_a_model_of_the_same_options(model: CFlowAD, good_paths: list[Path]) -> None:
    torch.manual_seed(7)
    other = CFlowAD(**model.options, pretrained=False)
    assert other.options == model.options
    assert not same_tensors(model, other)
    other.load_state_dict(model.state_dict())
    images = read(good_paths[:2])
    assert scores(other, images) == scores(model, images)
    assert (other.image_threshold, other.pixel_threshold) == (model.image_threshold, model.pixel_threshold)


def test_state_dict_holds_the_normalisation_the_maxima_and_the_thresholds(model: CFlowAD) -> None:
    names = set(model.state_dict())
    assert {"encoder.mean", "encoder.std", "log_prob_max", "thresholds", "false_alarm_rate"} <= names


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_calibration_settles_the_precision(good_paths: list[Path], precision: str) -> None:
    model = tiny_model(precision=precision)
    model.calibrate_maxima([read(good_paths)])
    assert model.precision == resolve_precision(precision, CPU)
    assert {folded.precision for folded in model.folded()} == {model.precision}


def test_maxima_are_the_largest_over_all_batches(good_paths: list[Path]) -> None:
    model = tiny_model()
    images = read(good_paths)
    model.calibrate_maxima(images.split(5))
    expected = [log_prob.max().item() for log_prob in model.log_probs(images)]
    assert model.log_prob_max.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_good_image_of_the_maxima_scores_nowhere_below_zero(good_paths: list[Path]) -> None:
    model = calibrated_model(good_paths)
    maps = model(read(good_paths))
    assert 0 <= maps.min().item() <= maps.max().item() <= len(model.decoders)


def test_calibration_without_a_finite_feature_is_refused(model: CFlowAD) -> None:
    before = model.log_prob_max.clone()
    for batches in ([torch.full((1, 3, SIZE, SIZE), math.nan)], []):
        with pytest.raises(DataError, match="finite features"):
            model.calibrate_maxima(batches)
    assert torch.equal(model.log_prob_max, before)


def test_thresholds_are_the_conformal_quantile_of_good_scores(model: CFlowAD) -> None:
    model.calibrate_thresholds([0.3, 0.1, 0.4, 0.2], 0.4)  # k = ceil(5 * 0.6) = 3
    assert model.image_threshold == model.pixel_threshold == pytest.approx(0.3)
    assert model.false_alarm_rate.item() == pytest.approx(0.4)


def test_rate_that_so_few_images_cannot_promise_is_raised_with_a_warning(model: CFlowAD) -> None:
    with pytest.warns(UserWarning, match="3 held-out images cannot promise .* 0.05: the thresholds promise 0.25;.* 19"):
        model.calibrate_thresholds([0.1, 0.3, 0.2], 0.05)
    assert model.image_threshold == pytest.approx(0.3)
    assert model.false_alarm_rate.item() == pytest.approx(0.25)


def test_calibration_is_fetched_once_for_every_change_of_it(model: CFlowAD, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fetch waits for the card."""
    fetches: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: fetches.append(tensor) or tolist(tensor))  # type: ignore[func-returns-value]
    images = torch.rand(1, 3, SIZE, SIZE)
    for count, change in enumerate((lambda: None, lambda: model.set_thresholds(0.5, 0.25), model.log_prob_max.zero_)):
        change()
        for _ in range(3):
            assert model.is_calibrated
            model(images)
            assert (model.image_threshold, model.pixel_threshold) == tuple(map(float, model.thresholds.numpy()))
        assert len(fetches) <= 2 * (count + 1)
    assert model.image_threshold == 0.5
    model.load_state_dict(model.state_dict() | {"thresholds": torch.tensor([0.75, 0.125])})
    assert (model.image_threshold, model.pixel_threshold) == (0.75, 0.125)
    model.log_prob_max.fill_(torch.nan)
    assert not model.is_calibrated


def test_thresholds_from_elsewhere_promise_nothing(model: CFlowAD) -> None:
    model.set_thresholds(0.5, 0.25)
    assert (model.image_threshold, model.pixel_threshold) == (0.5, 0.25)
    assert model.false_alarm_rate.isnan()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precision": "fp8"}, ValueError, "precision is one of .* got 'fp8'"),
        ({"image_size": 4}, ValueError, "image_size is at least 8, .* got 4"),
        ({"condition": 6}, ValueError, "condition is a multiple of 4 .* got 6"),
        ({"coupling_blocks": 0}, ValueError, "coupling_blocks .* got 0"),
        ({"activation": "gelu"}, ValueError, "activation is one of .* got 'gelu'"),
        ({"encoder": "resnet81"}, EncoderError, "no encoder 'resnet81' in timm: did you mean .*resnet18"),
        ({"layers": ("layer9",)}, EncoderError, "resnet18 has no layer 'layer9'; it has .*layer"),
        ({"encoder_weights": "/nowhere.pth"}, EncoderError, "no weights file /nowhere.pth"),
    ],
)
def test_impossible_options_are_refused_in_one_line(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        CFlowAD(**TINY | options)
    assert "\n" not in str(caught.value)


def test_image_size_need_not_be_square(good_paths: list[Path]) -> None:
    model = calibrated_model(good_paths, image_size=(32, 64))
    assert model.image_size == (32, 64)
    assert [tuple(log_prob.shape) for log_prob in model.log_probs(read(good_paths[:1]))] == [(1, 8, 16), (1, 4, 8)]
    assert model.predict(good_paths[0])[0].anomaly_map.shape == (SIZE, SIZE)


def test_an_encoder_that_changed_is_fused_anew(model: CFlowAD) -> None:
    image = torch.rand(1, 3, 32, 32)
    before = model.features(image)[0]
    with torch.no_grad():
        next(iter(model.encoder.network.parameters())).mul_(2)
    after = model.features(image)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model.encoder(resize(image, model.image_size))[0], rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_model_in_use_is_independent_of_it(model: CFlowAD) -> None:
    image = torch.rand(1, 3, 32, 32)
    for _ in range(2):
        expected = model(image)
    torch.testing.assert_close(copy.deepcopy(model)(image), expected, rtol=0, atol=1e-6)


def test_encoder_precision_is_settled_by_calibration_and_kept_in_the_file(
    good_paths: list[Path], tmp_path: Path
) -> None:
    model = calibrated_model(good_paths, encoder_precision="auto")
    assert model.encoder_precision == "fp32"  # on a CPU
    model.save(tmp_path / "model.safetensors")
    assert CFlowAD.load(tmp_path / "model.safetensors").encoder_precision == "fp32"


def test_a_bf16_encoder_gives_features_close_to_those_of_an_fp32_one(good_paths: list[Path]) -> None:
    model = calibrated_model(good_paths, encoder_precision="bf16")
    image = read(good_paths[:1])
    dtype = torch.bfloat16 if resolve_precision("auto", model.device) == "bf16" else torch.float32
    features = model.features(image)
    assert {map.dtype for map in features} == {dtype}
    for rounded, exact in zip(features, model.encoder(resize(image, model.image_size)), strict=True):
        assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert model(image).isfinite().all()


def test_an_fp16_encoder_is_one_in_fp32_on_a_cpu(good_paths: list[Path]) -> None:
    model = calibrated_model(good_paths, encoder_precision="fp16")
    features = model.features(read(good_paths[:1]))
    assert {map.dtype for map in features} == {torch.float32}
    assert model.encoder_precision == "fp16", "and on a card what was asked for"


def test_an_unknown_encoder_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder_precision is one of auto, fp32, fp16, bf16, got 'tf32'"):
        tiny_model(encoder_precision="tf32")
