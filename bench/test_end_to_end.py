"""The whole model, encoder included, against anomalib's Cflow as it ships; skipped where anomalib is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cflow_fast.bench.timing import ratio_of, seconds
from cflow_fast.model import CFlowAD

LAYERS = ("layer2", "layer3", "layer4")
ROUNDS = int(os.environ.get("CFLOW_FAST_ROUNDS", "11"))


@torch.no_grad()
def test_one_image_against_anomalib(benchmark: Any, record: Callable[..., None]) -> None:
    """Same encoder, random weights, hard permutations, fp32; anomalib in its default fibers of 64 vectors."""
    name = "anomalib.models.image.cflow.torch_model"
    theirs = pytest.importorskip(name, reason="the reference is anomalib: pip install anomalib")
    torch.manual_seed(0)
    reference = theirs.CflowModel(backbone="wide_resnet50_2", layers=list(LAYERS), pre_trained=False).eval()
    model = CFlowAD("wide_resnet50_2", LAYERS, pretrained=False, precision="fp32").eval()
    model.log_prob_max.zero_()  # no training is needed to time a map
    image = torch.rand(1, 3, 256, 256)
    reference(image)
    model(image)
    reference_seconds: list[float] = []

    def time_reference() -> None:
        reference_seconds.append(seconds(lambda: reference(image)))

    benchmark.pedantic(lambda: model(image), setup=time_reference, rounds=ROUNDS, warmup_rounds=1)
    our_seconds = list(benchmark.stats.stats.data)
    ratio = ratio_of(reference_seconds[-len(our_seconds) :], our_seconds)
    label = "end to end, WideResNet-50, one image of 256 px"
    record(label, "fp32", "anomalib's Cflow", ratio, 1e3 * min(our_seconds), None)
    assert ratio.median >= 1.6
