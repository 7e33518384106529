"""What is fused between the plain path's products: its formulas, its memory, and the flow that is made of it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from flows import rough_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_guards import guarded
from torch import Tensor

from cflow_fast.kernels import pointwise
from cflow_fast.kernels.configs import PointwiseConfig
from cflow_fast.kernels.pointwise import coupled, coupled_launch, rotated, rotated_launch
from cflow_fast.kernels.products import FusedProducts
from cflow_fast.kernels.torch_flow import TorchFlow
from cflow_fast.positional import encoding_factors

CLAMP = 1.9
DTYPES = (torch.float32, torch.bfloat16)
SMALL = PointwiseConfig(4, 16, 1)
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-3},
}
shapes = given(features=st.integers(1, 9), rows=st.integers(1, 37), dtype=st.sampled_from(DTYPES))
few = settings(max_examples=12, deadline=None)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "POINTWISE", SMALL)


def expected_of(s_and_t: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    s, t = s_and_t.double().chunk(2)
    j = CLAMP * s.tanh()
    return x2.double() * j.exp() + t, j.sum(0)


@few
@shapes
def test_coupled_is_its_formula_at_every_edge(features: int, rows: int, dtype: torch.dtype) -> None:
    s_and_t, x2 = torch.randn(2 * features, rows).to(dtype), torch.randn(features, rows).to(dtype)
    y2, sums = torch.empty(features, rows), torch.empty(-(-features // SMALL.block_features), rows)
    with guarded() as guard:
        coupled_launch(s_and_t, x2, CLAMP, y2, sums).run()
    guard.written_once(y2, sums)
    for ours, expected in zip((y2, sums.sum(0)), expected_of(s_and_t, x2), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@few
@shapes
def test_rotated_is_its_formula_at_every_edge(features: int, rows: int, dtype: torch.dtype) -> None:
    v, w, angle = torch.randn(features, rows).to(dtype), torch.randn(features, rows).to(dtype), torch.randn(features)
    q, turned = torch.empty_like(v), torch.empty_like(w)
    with guarded() as guard:
        rotated_launch(v, w, angle.cos(), angle.sin(), q, turned).run()
    guard.written_once(q, turned)
    cosine, sine = angle.double().cos()[:, None], angle.double().sin()[:, None]
    expected = v.double() * cosine - w.double() * sine, v.double() * sine + w.double() * cosine
    for ours, exact in zip((q, turned), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, **TOLERANCES[dtype])


def test_no_rows_are_no_launch() -> None:
    y2, sums = coupled(torch.empty(6, 0), torch.empty(3, 0), CLAMP)
    assert (y2.shape, sums.shape) == ((3, 0), (0,))
    assert [x.shape for x in rotated(*torch.empty(2, 3, 0), *torch.empty(2, 3))] == [(3, 0)] * 2


def test_nan_stays_in_its_row() -> None:
    s_and_t, x2 = torch.randn(6, 20), torch.randn(3, 20)
    s_and_t[1, 7] = torch.nan
    y2, sums = coupled(s_and_t, x2, CLAMP)
    assert (y2.isnan().any(0) | sums.isnan()).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("operand", DTYPES)
@pytest.mark.parametrize("permute_soft", [False, True])
@pytest.mark.parametrize("features", [24, 25])
def test_the_fused_flow_is_the_plain_one(features: int, permute_soft: bool, operand: torch.dtype) -> None:
    decoder = rough_decoder(features, permute_soft=permute_soft)
    weights = decoder.fold("bf16" if operand == torch.bfloat16 else "fp32").weights
    exact = TorchFlow(weights, torch.float32, packed=False)
    fused, plain = (TorchFlow(weights, operand, packed=False, fused=fused, state=operand) for fused in (True, False))
    maps, encoding = torch.randn(2, features, 3, 5), encoding_factors(8, 3, 5)
    expected = exact.log_prob_map(maps, encoding)
    ours, theirs = ((each.log_prob_map(maps, encoding) - expected).abs().max() / features for each in (fused, plain))
    assert ours <= max(1.5 * theirs, 2e-6)
    z, c = torch.randn(9, features), torch.randn(9, 8)
    for ours, theirs in zip(fused.rows(z, c, want_u=True), exact.rows(z, c, want_u=True), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-4 if operand == torch.float32 else 1.5)


def test_every_block_takes_one_product_for_s_and_t_and_one_launch_after_it() -> None:
    weights = rough_decoder(24, permute_soft=True).fold("fp32").weights
    flow = TorchFlow(weights, torch.float32, packed=False, fused=True)
    made: list[str] = []
    product, run = FusedProducts.product, pointwise.Launch.run

    def counted_product(self: Any, name: str, *args: Any, **options: Any) -> Tensor:
        made.append(name)
        return product(self, name, *args, **options)

    def counted_launch(launch: pointwise.Launch) -> None:
        made.append(launch.kernel.__name__)
        run(launch)

    with (
        mock.patch.object(FusedProducts, "product", counted_product),
        mock.patch.object(pointwise.Launch, "run", counted_launch),
    ):
        flow.log_prob_map(torch.randn(1, 24, 3, 5), encoding_factors(8, 3, 5))
    block = ["w1", "w2", "coupled_kernel", "passive", "active"]
    mixed = ["rotated_kernel", "output"]
    assert made == (block + mixed) * (weights.blocks - 1) + block
