"""Gradients are FrEIA's, and those of the function itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flows import rough_decoder, rows_for
from torch import Tensor, nn

from cflow_fast.decoder import gaussian_log_prob

VARIANTS: list[dict[str, Any]] = [
    {},
    {"permute_soft": True},
    {"condition": 0},
    {"condition": 0, "permute_soft": True, "activation": "softplus"},
    {"activation": "softplus", "global_affine_type": "SIGMOID"},
    {"global_affine_type": "EXP", "permute_soft": True},
]
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: ", ".join(map(str, o.values())) or "default")


def gradients(flow: nn.Module, z: Tensor, c: list[Tensor] | None, rev: bool) -> dict[str, Tensor]:
    """Of a loss that u and log_det both enter, by every parameter and input, each vector flattened."""
    wanted: dict[str, Tensor] = {name: p for name, p in flow.named_parameters() if p.requires_grad}
    wanted |= {"z": z} | ({"c": c[0]} if c else {})
    u, log_det = flow(z, c, rev=rev)
    loss = -(gaussian_log_prob(u) + log_det).mean()
    return {name: g.flatten() for name, g in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)}


def relative_errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((ours[name] - g).norm() / g.norm()).item() for name, g in exact.items()}


def as_freia_names_them(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("blocks.", "module_list.", 1): tensor for name, tensor in named.items()}


@each_variant
@pytest.mark.parametrize("rev", [False, True])
def test_gradients_are_freias_in_float64(options: dict[str, Any], rev: bool) -> None:
    decoder = rough_decoder(33, **options).double()
    freia = decoder.to_freia()
    z, c = rows_for(decoder, 40, requires_grad=True)
    ours, exact = as_freia_names_them(gradients(decoder, z, c, rev)), gradients(freia, z, c, rev)
    assert ours.keys() == exact.keys()
    errors = relative_errors(ours, exact)
    assert max(errors.values()) < 1e-10, errors


@each_variant
def test_fp32_gradients_are_freias_in_float64(options: dict[str, Any]) -> None:
    decoder = rough_decoder(33, **options)
    z, c = rows_for(decoder, 40, requires_grad=True)
    ours = as_freia_names_them(gradients(decoder, z, c, rev=False))
    freia = decoder.double().to_freia()
    wide = [tensor.detach().double().requires_grad_() for tensor in (z, *(c or []))]
    errors = relative_errors(ours, gradients(freia, wide[0], wide[1:] or None, rev=False))
    assert max(errors.values()) < 1e-5, errors


@each_variant
@pytest.mark.parametrize("rev", [False, True])
def test_gradients_are_those_of_finite_differences(options: dict[str, Any], rev: bool) -> None:
    decoder = rough_decoder(5, **(options | {"coupling_blocks": 2})).double()
    z, c = rows_for(decoder, 3, requires_grad=True)
    parameters = [p for p in decoder.parameters() if p.requires_grad]

    def flow(z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        condition = [rest[0]] if decoder.condition else None
        return decoder(z, condition, rev=rev)

    assert torch.autograd.gradcheck(flow, (z, *(c or []), *parameters), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("permute_soft", [False, True])
def test_gradients_of_a_maps_likelihood_reach_features_and_parameters(permute_soft: bool) -> None:
    decoder = rough_decoder(6, permute_soft=permute_soft).double()
    features = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decoder.log_prob, (features,), atol=1e-6)
    decoder.log_prob(features).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_permutations_are_not_trained() -> None:
    for permute_soft in (False, True):
        names = {name.split(".")[-1] for name, _ in rough_decoder(permute_soft=permute_soft).named_parameters()}
        assert names == {"global_scale", "global_offset", "weight", "bias"}
