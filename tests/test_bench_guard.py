"""A guard on ratios: ours against FrEIA in one run. It fails only where the machine's noise cannot explain it."""

from __future__ import annotations

import pytest

from cflow_fast.bench.cases import ENCODERS, DecoderCase
from cflow_fast.bench.contenders import OURS
from cflow_fast.bench.decoder import CONTENDERS
from cflow_fast.bench.measurement import Effort
from cflow_fast.bench.runner import Entrant, measure_case


@pytest.mark.parametrize(("permutations", "bar"), [("hard", 1.1), ("soft", 1.0)])
def test_folded_decoders_are_faster_than_freia(permutations: str, bar: float) -> None:
    case = DecoderCase("resnet18", ENCODERS["resnet18"], 256, 1, permutations)
    entrants = [Entrant(CONTENDERS[OURS], "fp32"), Entrant(CONTENDERS["freia"], "fp32")]
    ours, theirs = measure_case(case, entrants, entrants[1], Effort(seconds=8.0))
    assert (ours.status, theirs.status) == ("ok", "ok"), (ours.note, theirs.note)
    ratio = ours.speedup
    assert ratio is not None
    assert ratio.high >= bar, f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] is under {bar}x for certain"
