"""anomalib itself: its models made fast by one line, its parts as contenders of the benchmark, its PaDiM beside ours.

It is no dependency of these tests' environment; `make test-anomalib` makes one with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cflow_fast import FoldedDecoder, accelerate
from cflow_fast.bench import decoder as decoders
from cflow_fast.bench import end_to_end, maps
from cflow_fast.bench.baselines import PaDiM
from cflow_fast.bench.cases import ENCODERS, DecoderCase
from cflow_fast.encoders import Encoder
from cflow_fast.freia import from_freia

cflow = pytest.importorskip("anomalib.models.image.cflow.torch_model", reason="needs anomalib: make test-anomalib")

LAYERS = ["layer1", "layer2", "layer3"]
OPTIONS = {"layers": LAYERS, "pre_trained": False, "condition_vector": 16, "coupling_blocks": 3}


def roughened(model: Any) -> Any:
    """Random weights as they are drawn make nearly the identity: these do not."""
    with torch.no_grad():
        for decoder in model.decoders:
            for block in decoder.module_list:
                for parameter in block.subnet.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
                block.global_offset.add_(0.3 * torch.randn_like(block.global_offset))
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("permute_soft", [False, True])
def test_a_model_answers_as_before(permute_soft: bool, images: Tensor) -> None:
    torch.manual_seed(0)
    model = roughened(cflow.CflowModel("resnet18", permute_soft=permute_soft, **OPTIONS))
    expected = model(images)
    fast: Any = accelerate(model, "fp32")
    assert all(isinstance(decoder, FoldedDecoder) for decoder in fast.decoders)
    assert fast.acceleration.replaced == {f"decoders.{k}": "fp32" for k in range(len(LAYERS))}
    for _ in range(2):  # its forward leaves decoders in training mode
        found = fast(images)
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=0, atol=2e-5)


def test_likelihoods_are_its_own_in_float64() -> None:
    torch.manual_seed(0)
    model = roughened(cflow.CflowModel("resnet18", permute_soft=True, **OPTIONS)).double()
    for sequence, features in zip(model.decoders, model.pool_dims, strict=True):
        z, c = torch.randn(37, features, dtype=torch.float64), torch.randn(37, 16, dtype=torch.float64)
        u, log_det = sequence(z, [c])
        expected = cflow.get_logp(features, u, log_det)
        own_u, own_log_det = from_freia(sequence)(z, [c])
        found = cflow.get_logp(features, own_u, own_log_det)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


def test_a_checkpoint_of_a_whole_lightning_model_becomes_fast(tmp_path: Path, images: Tensor) -> None:
    from anomalib.models.image.cflow import lightning_model as lightning

    torch.manual_seed(0)
    trained = lightning.Cflow("resnet18", **OPTIONS)
    roughened(trained.model)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "model.ckpt")
    model = lightning.Cflow("resnet18", **OPTIONS)
    model.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"])
    fast: Any = accelerate(model, "fp32")
    assert set(fast.acceleration.replaced) == {f"model.decoders.{k}" for k in range(len(LAYERS))}
    found, expected = fast.model(images), trained.model(images)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("bench", "name"), [(decoders, "anomalib"), (end_to_end, "anomalib"), (end_to_end, "anomalib-accelerated")]
)
def test_it_is_a_contender_with_the_likelihoods_of_the_case(bench: Any, name: str) -> None:
    kind = {decoders: DecoderCase, end_to_end: end_to_end.ModelCase}[bench]
    case = kind("resnet18", ENCODERS["resnet18"], 64, 2, "hard", coupling_blocks=2, condition=16)
    work = case.work()
    built = bench.CONTENDERS[name].build(work, "fp32")
    built.run()
    judged = case.yardstick(work).judge(name, "fp32", built)
    assert judged.parity, judged.failures


def test_its_map_is_the_map_in_float64() -> None:
    case = maps.MapCase("resnet18", ENCODERS["resnet18"], 64, 2)
    work = case.work()
    judged = case.yardstick(work).judge("anomalib", "fp32", maps.CONTENDERS["anomalib"].build(work, "fp32"))
    assert judged.parity, judged.failures


def test_padim_agrees_with_anomalibs() -> None:
    from anomalib.models.image.padim import torch_model as theirs

    torch.manual_seed(0)
    good = torch.rand(12, 3, 64, 64)
    reference = theirs.PadimModel("resnet18", LAYERS, pre_trained=False, n_features=40)
    encoder = Encoder("resnet18", LAYERS, pretrained=False)
    loaded = encoder.network.load_state_dict(reference.feature_extractor.feature_extractor.state_dict(), strict=False)
    assert not loaded.missing_keys
    ours = PaDiM(encoder, 40)
    ours.selected = reference.idx.clone()
    normalised = (good - encoder.mean) / encoder.std  # anomalib's model takes normalised images
    reference.train()
    reference.feature_extractor.eval()
    reference(normalised[:10])
    reference.fit()
    reference.eval()
    expected = reference(normalised[10:]).anomaly_map.squeeze(1)
    found = ours.fit([good[:10]]).anomaly_map(good[10:])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # covariances inverted in float32 cost it 5e-4
