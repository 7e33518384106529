"""`make bench-cpu`: the decoders against FrEIA, with the bars they have to reach.

Reference and ours take turns, round by round; a ratio compares what was timed side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cflow_fast.bench.decoders import decoder_case, folded_run, freia_run
from cflow_fast.bench.timing import matrix_rate, ratio_of, seconds
from cflow_fast.precision import cpu_has, multiplies_bf16

CPU = torch.device("cpu")
ROUNDS = int(os.environ.get("CFLOW_FAST_ROUNDS", "11"))


def bar(permute_soft: bool, batch: int, precision: str) -> float:
    """The least speed-up over FrEIA in fp32 that is asked for on this kind of CPU."""
    if not permute_soft:
        return 1.4 if batch == 1 else 1.35
    if not cpu_has("avx512"):
        return 1.22 if batch == 1 else 1.1
    return 2.7 if precision == "bf16" else 1.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("permute_soft", [True, False], ids=["soft", "hard"])
def test_decoders_against_freia(
    benchmark: Any, record: Callable[..., None], permute_soft: bool, batch: int, precision: str
) -> None:
    if precision == "bf16" and not multiplies_bf16(CPU):
        pytest.skip("this CPU does not multiply bf16: such decoders run in fp32")
    pytest.importorskip("FrEIA", reason="the reference is FrEIA: pip install FrEIA==0.2")
    case = decoder_case(permute_soft, batch)
    reference, ours = freia_run(case), folded_run(case, precision)
    for decoder, theirs, mine in zip(case.decoders, reference(), ours(), strict=True):
        tolerance = decoder.features * (1e-2 if precision == "bf16" else 2e-5)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
    reference_seconds: list[float] = []
    benchmark.group = case.label
    benchmark.pedantic(ours, setup=lambda: reference_seconds.append(seconds(reference)), rounds=ROUNDS, warmup_rounds=1)
    our_seconds = list(benchmark.stats.stats.data)
    ratio = ratio_of(reference_seconds[-len(our_seconds) :], our_seconds)
    rate = matrix_rate(torch.float32 if precision == "fp32" else torch.bfloat16)
    share = case.flop() / min(our_seconds) / rate
    record(case.label, precision, "FrEIA in fp32", ratio, 1e3 * min(our_seconds), share)
    assert ratio.median >= bar(permute_soft, batch, precision)
