"""`make bench-cpu`: the decoders against FrEIA, with the bars they have to reach.

What is done once comes first: in a process that has taken much of the memory, fresh pages take longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cflow_fast.bench.cases import ENCODERS, DecoderCase
from cflow_fast.bench.contenders import FLOOR, PLAIN
from cflow_fast.bench.decoder import CONTENDERS
from cflow_fast.bench.results import Row
from cflow_fast.decoder import FlowDecoder
from cflow_fast.precision import cpu_has, multiplies_bf16

ENCODER = "wide_resnet50_2"
CASE = DecoderCase(ENCODER, ENCODERS[ENCODER], 256, 1, "soft")


@pytest.mark.parametrize("permute_soft", [True, False], ids=["soft", "hard"])
def test_the_widest_decoder_is_built_in_under_five_seconds(benchmark: Any, permute_soft: bool) -> None:
    benchmark.pedantic(FlowDecoder, (2048,), {"permute_soft": permute_soft}, rounds=2)
    assert benchmark.stats.stats.min < 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_decoders_with_soft_permutations_are_folded_in_under_ten_seconds(benchmark: Any, precision: str) -> None:
    decoders = CASE.decoders()
    benchmark.pedantic(lambda: [decoder.fold(precision) for decoder in decoders], rounds=2)
    assert benchmark.stats.stats.min < 10


def bar(permutations: str, batch: int, precision: str) -> float:
    """The least speed-up over FrEIA in fp32 that is asked for on this kind of CPU."""
    if permutations == "hard":
        return 1.4 if batch == 1 else 1.35
    if not cpu_has("avx512"):
        return 1.22 if batch == 1 else 1.1
    return 2.7 if precision == "bf16" else 1.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("permutations", ["soft", "hard"])
def test_decoders_against_freia(measure: Callable[..., Row], permutations: str, batch: int, precision: str) -> None:
    if precision == "bf16" and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bf16: such decoders run in fp32")
    case = replace(CASE, batch=batch, permutations=permutations)
    peers = ["freia-compile"] if precision == "fp32" else ["freia", "freia-compile"]
    row = measure(case, CONTENDERS, "freia", precision, beside=[PLAIN, FLOOR, *peers])
    assert row.speedup is not None
    over_the_floor = 1 / row.extra["speedups"][f"{FLOOR} {precision}"]["median"]
    beside = f"it takes {over_the_floor:.2f} times as long as PyTorch's matrix products alone"
    assert row.speedup.median >= bar(permutations, batch, precision), beside
