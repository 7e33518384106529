"""Timing two things against each other on a machine that is never quiet: round by round, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """How many times faster one thing is than another, from rounds in which both were timed."""

    median: float
    low: float  # 95% interval of the median, by the binomial distribution of order statistics
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def ratio_of(reference_seconds: Sequence[float], our_seconds: Sequence[float]) -> Ratio:
    """The median over the rounds of reference / ours, each round's pair timed one right after the other."""
    ratios = sorted(r / o for r, o in zip(reference_seconds, our_seconds, strict=True))
    n = len(ratios)
    reach = 0.98 * n**0.5  # 1.96 standard deviations of a binomial(n, 1/2), in ranks
    low, high = max(0, round(n / 2 - reach)), min(n - 1, round(n / 2 + reach))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype, size: int = 2048, rounds: int = 7) -> float:
    """This machine's matrix rate in FLOP/s: the best of a few square products, as PyTorch makes them."""
    a, b = torch.randn(2, size, size).to(dtype)
    with torch.no_grad():
        torch.mm(a, b)
        return 2 * size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(rounds))
