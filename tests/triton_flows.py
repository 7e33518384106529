"""What the tests of decoders on Triton share: one as Triton runs it and as float64 has it, in tiles that it crosses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flows import rough_decoder
from torch import Tensor

from cflow_fast.folding import cast_weights, fold_weights
from cflow_fast.kernels import phases, triton_flow
from cflow_fast.kernels.configs import CouplingConfig, LinearConfig
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.kernels.triton_flow import TritonFlow
from cflow_fast.positional import encoding_factors

CPU = torch.device("cpu")
BLOCKS, CONDITION = 3, 8
MIXINGS = {"hard": None, "matrices": BLOCKS, "rotations": 0, "a matrix, then rotations": 1}
TOLERANCES = {"ieee": 1e-6, "tf32x3": 1e-6, "fp16x3": 1e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}
"""Of log p / D, against float64."""
each_mixing = pytest.mark.parametrize("mixing", MIXINGS)


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases whatever the width, in tiles that a narrow decoder still crosses, their inputs split in two."""
    monkeypatch.setattr(phases, "select_linear", lambda *_, **__: LinearConfig(64, 64, 64, 4, 2, split_k=2))
    monkeypatch.setattr(phases, "select_coupling", lambda *_: CouplingConfig(64, 32, 64, 4, 2, split_k=2))
    monkeypatch.setattr(triton_flow, "select_whole_flow", lambda *_: None)


class Flows:
    """One decoder as TritonFlow, and as TorchFlow in float64."""

    def __init__(
        self, mixing: str, precision: str = "ieee", features: int = 72, condition: int = CONDITION, **options: Any
    ) -> None:
        self.features, self.condition = features, condition
        decoder = rough_decoder(
            features, condition, permute_soft=mixing != "hard", **({"coupling_blocks": BLOCKS} | options)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cflow_fast.folding.matrix_blocks", lambda *_: MIXINGS[mixing])
            exact = fold_weights(decoder.double(), torch.float64)
        storage = torch.bfloat16 if precision == "bf16" else torch.float32
        self.triton = TritonFlow(cast_weights(exact, storage, CPU), precision)
        self.exact = TorchFlow(exact, torch.float64, packed=False)

    def maps(self, batch: int, height: int, width: int) -> Tensor:
        return torch.randn(batch, self.features, height, width)

    def rows(self, count: int) -> tuple[Tensor, Tensor | None]:
        return torch.randn(count, self.features), torch.randn(count, self.condition) if self.condition else None

    def encoding(self, maps: Tensor) -> tuple[Tensor, Tensor] | None:
        return encoding_factors(self.condition, *maps.shape[2:]) if self.condition else None

    def log_prob(self, maps: Tensor) -> Tensor:
        return self.triton.log_prob_map(maps, self.encoding(maps))

    def error(self, maps: Tensor) -> float:
        """Largest deviation of log p / D from float64."""
        exact = self.exact.log_prob_map(maps.double(), self.encoding(maps))
        return float((self.log_prob(maps) - exact).abs().max() / self.features)

    def exact_rows(self, z: Tensor, c: Tensor | None) -> FlowResult:
        return self.exact.rows(z.double(), None if c is None else c.double(), want_u=True)

    def check_rows(self, tolerance: float) -> None:
        """Loose rows agree with float64, u too, and do not depend on whether it is wanted."""
        z, c = self.rows(37)
        ours, exact = self.triton.rows(z, c, want_u=True), self.exact_rows(z, c)
        assert (ours.log_prob - exact.log_prob).abs().max() / self.features < tolerance
        assert (ours.log_det - exact.log_det).abs().max() / self.features < tolerance
        assert ours.u is not None
        assert exact.u is not None
        assert (ours.u - exact.u).abs().max() < 5 * tolerance
        assert torch.equal(self.triton.rows(z, c, want_u=False).log_prob, ours.log_prob)
