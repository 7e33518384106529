"""Decoders of one encoder run side by side: what is fastest alone may take from the others more than it gains.

Smaller tiles and splits finish a single product sooner and pull more through the L2 cache. So a configuration is
taken for what it does to all decoders beside it: none of the sets of decoders that launch it may be predicted slower,
and where none gets faster it must not take more of the card.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cflow_fast.bench.prediction import Prediction
from cflow_fast.bench.tune import TIE
from cflow_fast.kernels.configs import Problem

MOST_PASSES = 8


class Load(NamedTuple):
    """Of some launches one after another: seconds, and seconds of each resource of the whole card."""

    seconds: float
    matrix: float
    issue: float
    l2: float
    memory: float

    @property
    def busy(self) -> float:
        return max(self[1:])


NO_LOAD = Load(0.0, 0.0, 0.0, 0.0, 0.0)

Decoder = Mapping[Problem, Mapping[int, Load]]
"""What a decoder's launches of every problem take, by place among the candidates; the rule's is 0."""


def load_of(predictions: Iterable[Prediction]) -> Load:
    parts = ("seconds", "matrix_seconds", "issue_seconds", "l2_seconds", "memory_seconds")
    return together(Load(*(getattr(prediction, part) for part in parts)) for prediction in predictions)


def together(loads: Iterable[Load]) -> Load:
    return Load(*map(sum, zip(NO_LOAD, *loads, strict=True)))


def side_by_side_seconds(decoders: Sequence[Load]) -> float:
    """As `prediction.predict_together`: the longest, or all their work on the whole card."""
    return max(max(load.seconds for load in decoders), together(decoders).busy)


def choose_together(groups: Sequence[Sequence[Decoder]]) -> dict[Problem, int]:
    """Each problem's place, settled problem by problem, from the rules on, until nothing gets better."""
    chosen = {problem: 0 for group in groups for decoder in group for problem in decoder}
    users = {p: [group for group in groups if any(p in decoder for decoder in group)] for p in chosen}
    for _ in range(MOST_PASSES):
        before = dict(chosen)
        for problem, its_groups in users.items():
            chosen[problem] = _best(problem, its_groups, chosen)
        if chosen == before:
            break
    return chosen


def _best(problem: Problem, groups: Sequence[Sequence[Decoder]], chosen: dict[Problem, int]) -> int:
    uses = [decoder[problem] for group in groups for decoder in group if problem in decoder]
    places = sorted(set.intersection(*(set(options) for options in uses)))
    alone = {place: together(options[place] for options in uses) for place in places}
    now = [_seconds(group, chosen) for group in groups]
    best, best_gains = chosen[problem], (0.0, -alone[chosen[problem]].seconds)
    for place in places:
        then = [_seconds(group, chosen | {problem: place}) for group in groups]
        if any(after > (1 + 1e-9) * before for before, after in zip(now, then, strict=True)):
            continue
        gained = sum(now) - sum(then)
        faster = gained > 1e-9 * sum(now)
        if not faster and alone[place].busy > (1 + TIE) * alone[0].busy:
            continue
        gains = (gained if faster else 0.0, -alone[place].seconds)
        if gains > best_gains:
            best, best_gains = place, gains
    return best


def _seconds(group: Sequence[Decoder], chosen: Mapping[Problem, int]) -> float:
    return side_by_side_seconds([together(options[chosen[p]] for p, options in decoder.items()) for decoder in group])
