"""Maps and training, timed beside their peers; there is no bar for them but that they agree with float64."""

from __future__ import annotations

from collections.abc import Callable

from cflow_fast.bench import maps, training
from cflow_fast.bench.cases import ENCODERS
from cflow_fast.bench.results import Row


def test_map_against_eager(measure: Callable[..., Row]) -> None:
    measure(maps.MapCase("resnet18", ENCODERS["resnet18"], 256, 8), maps.CONTENDERS, "eager")


def test_training_against_the_published_steps(measure: Callable[..., Row]) -> None:
    case = training.TrainingCase("resnet18", ENCODERS["resnet18"], 256, 2, "soft")
    measure(case, training.CONTENDERS, "cflow-ad-loop", beside=["freia"])
