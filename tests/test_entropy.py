"""The paper's own claim (eq. 6): a trained flow's likelihood approaches the data's, its loss falls to the entropy.

    -E[log p_flow(z)] = H(p) + KL(p || p_flow) >= H(p)

On Gaussian vectors with a known covariance S the entropy is (D ln(2 pi e) + ln det S) / 2.
"""

from __future__ import annotations

import math

import pytest
import torch

from cflow_fast import FlowDecoder

FEATURES = 8
STEPS = 400


def gaussian(seed: int) -> torch.distributions.MultivariateNormal:
    """Standard deviations from 0.3 to 2 along random axes, about a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)).Q
    deviations = torch.logspace(math.log10(0.3), math.log10(2.0), FEATURES, dtype=torch.float64)
    covariance = (axes * deviations**2) @ axes.T
    mean = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(mean.float(), covariance.float())


def train(decoder: FlowDecoder, data: torch.distributions.MultivariateNormal) -> list[float]:
    """Adam with a cosine schedule on fresh vectors; the loss of every step in nats."""
    optimiser = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = -decoder.log_prob(data.sample((1024,))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def mean_over(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("permute_soft", [False, True])
def test_trained_flow_approaches_the_analytic_likelihood_and_its_loss_the_entropy(permute_soft: bool) -> None:
    data = gaussian(seed=0)
    torch.manual_seed(0)
    decoder = FlowDecoder(FEATURES, condition=0, coupling_blocks=4, permute_soft=permute_soft, hidden=32)
    entropy = 0.5 * (FEATURES * math.log(2 * math.pi * math.e) + torch.logdet(data.covariance_matrix.double()).item())

    losses = train(decoder, data)
    assert losses[0] - entropy > 5, "untrained, it is far away"
    assert abs(mean_over(losses[-20:]) - entropy) < 0.08

    fresh = data.sample((20_000,))
    with torch.no_grad():
        ours, analytic = decoder.log_prob(fresh).double(), data.log_prob(fresh).double()
    assert abs(ours.mean().item() + entropy) < 0.08
    assert 0 < (analytic - ours).mean().item() < 0.06, "KL(p || p_flow) in nats"
    assert torch.corrcoef(torch.stack([ours, analytic]))[0, 1] > 0.98
    mass = (ours - analytic).exp().mean().item()  # E_p[p_flow / p]: a density adds up to one
    assert abs(mass - 1) < 0.03
