"""Choosing by measurement: the engine of `cflow-fast tune` (by prediction: `tune_predicted`).

Candidates for each kernel that a decoder launches are timed alone, the rule's and the shipped one first, then those
that are counted fastest; after that in their place, decoders side by side, where a larger tile that is slower alone may
leave the others more of the L2 cache, and where alone it shows whether laying a factor down first pays, or two products
in one; at last each decoder as a whole through Triton and through the plain path, in a CUDA graph each. What a card
says comes from a `Timer`, so that everything here runs without one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, Protocol

from cflow_fast.bench.headline import tail_launches
from cflow_fast.bench.measurement import Ratio
from cflow_fast.bench.prediction import CARDS, l2_bytes, predict_at_least
from cflow_fast.bench.tune_targets import Target, families_of, most_frequent, other_way, problem_of
from cflow_fast.errors import CFlowFastError
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import NUMBERS, TAIL_PRECISION, Config, Problem, candidates, rule
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.tuning import bucket
from cflow_fast.kernels.tuning_table import Choice, DecoderProblem, Entry, Table

TIE = 0.02
"""A configuration has to be faster than the rule's by this share to take its place: tables stay as they are."""
PATIENCE = 8
"""Candidates in a row that are no faster than the best so far, until no more of a problem's are timed."""
LIGHT = 3
"""Candidates that move least through the L2 cache are timed whatever they are counted."""
SIDE_BY_SIDE_TIE = 0.005
"""Decoders side by side have to be faster by this share with another configuration."""
PASSES = 2
"""Over all problems of decoders side by side."""
FARTHEST = 2.5
"""What takes so many times as long alone is not tried side by side."""


class LostCardError(CFlowFastError):
    """The card answers nothing any more: there is no next candidate in this process."""


class Timer(Protocol):
    """What a card says; in tests anything. Raises LostCardError, or whatever a candidate fails with."""

    def launch(self, launch: Launch) -> float:
        """Seconds of a launch on the meta device, once it has memory."""

    def decoder(self, target: Target, chosen: dict[Problem, Config]) -> Times:
        """Seconds of the whole decoder, its kernels so configured, and of the plain path."""

    def together(self, group: Sequence[Target]) -> Callable[[Mapping[Problem, Config]], float]:
        """Seconds of decoders side by side, their kernels so configured: to be asked many times."""

    def side_by_side(
        self, group: Sequence[Target], standard: dict[Problem, Config], chosen: dict[Problem, Config]
    ) -> Ratio:
        """How many times faster decoders side by side are, configured as chosen rather than as by the standard."""


class Times(NamedTuple):
    triton: float
    plain: float
    faster: Ratio  # how many times faster the plain path is


class Finding(NamedTuple):
    """One line of what was found: about a kernel, about a decoder, or why there is nothing to say."""

    target: str
    kernel: tuple[Problem, Entry] | None = None
    decoder: tuple[DecoderProblem, Choice] | None = None
    note: str = ""


def choose_by_measurement(
    wanted: Sequence[Target],
    chip: Chip,
    timer: Timer,
    until: float,
    shipped: Table | None = None,
    tails: Sequence[tuple[int, int, int]] = (),
) -> Iterator[Finding]:
    """Findings as they are made, so that an interruption keeps those before it; a later one about the same replaces it.

    until: time.monotonic() at which it stops. shipped: the predictions to stand beside. tails: batch, scales, size of
    the square anomaly maps. A problem is left half-tried rather than the time overrun: what was timed counts.
    """
    search = _Search(chip, timer, until, shipped)
    for family in families_of(wanted, chip):
        for group in family:
            for target in group:
                for problem, same in search.launches(target).items():
                    if search.is_over:
                        return
                    launch_of = partial(decoder_launch, target, chip, most_frequent(same))
                    yield from search.try_all(problem, target.label, launch_of)
        if search.is_over:
            return
        yield from search.refine(family)
        if search.is_over:
            return
        yield from search.side_by_side(family)
        for target in (target for group in family for target in group):
            if search.is_over:
                return
            yield search.backend(target)
    for batch, scales, size in tails:
        if search.is_over:
            return
        problem = Problem("tail", TAIL_PRECISION, bucket(batch), (scales, size, size))
        label = f"anomaly map, {scales} scales, {batch} x {size} px"
        yield from search.try_all(problem, label, partial(_tail_launch, batch, scales, size))


def table_of(findings: Sequence[Finding], card: str, multiprocessors: int, facts: dict[str, Any]) -> Table:
    kernels = dict(finding.kernel for finding in findings if finding.kernel)
    decoders = dict(finding.decoder for finding in findings if finding.decoder)
    return Table(card, multiprocessors, kernels, decoders, facts)


class _Search:
    def __init__(self, chip: Chip, timer: Timer, until: float, shipped: Table | None) -> None:
        self.chip, self.timer, self.until = chip, timer, until
        self.shipped = {} if shipped is None else shipped.kernels
        self.seconds: dict[Problem, dict[Config, float]] = {}
        self.bytes: dict[Problem, dict[Config, float]] = {}
        self.chosen: dict[Problem, Config] = {}

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until

    def launches(self, target: Target) -> dict[Problem, list[Launch]]:
        """By the rules."""
        with tuning.trying({}):
            return target.launches(self.chip)

    def try_all(
        self, problem: Problem, label: str, launch_of: Callable[[Problem, Config], Launch]
    ) -> Iterator[Finding]:
        if problem in self.seconds:
            return
        seconds = self.seconds[problem] = {}
        found = candidates(problem, self.chip)
        launches = {config: launch_of(problem, config) for config in found}
        first = [config for config in (rule(problem, self.chip), self._standard(problem)) if config in found]
        counted = {config: predict_at_least(launch, CARDS[0]) for config, launch in launches.items()}
        moved = self.bytes[problem] = {config: l2_bytes(launch, CARDS[0]) for config, launch in launches.items()}
        light = sorted(found, key=lambda config: moved[config])[:LIGHT]
        in_vain = 0
        for config in dict.fromkeys([*first, *light, *sorted(found, key=lambda config: counted[config])]):
            if (seconds and self.is_over) or in_vain == PATIENCE:
                break
            least = min(seconds.values(), default=math.inf)
            try:
                seconds[config] = self.timer.launch(launches[config])
            except LostCardError:
                raise
            except Exception as error:  # out of resources, or whatever a compiler says: the others are worth trying
                yield Finding(label, note=f"{problem.kernel}: {config} was left out: {_reason(error)}")
                continue
            in_vain = 0 if seconds[config] < least or config in light else in_vain + 1
        if seconds:
            best, usual = min(seconds, key=lambda config: seconds[config]), rule(problem, self.chip)
            keeps = usual is not None and usual in seconds and seconds[best] > (1 - TIE) * seconds[usual]
            yield self._choose(problem, usual if keeps and usual else best, label)

    def refine(self, family: Sequence[Sequence[Target]]) -> Iterator[Finding]:
        """Other configurations in their place, one after another: what makes decoders side by side faster is taken.

        A problem of several sets of decoders is settled for all of them, by the product of their times. It takes no
        more than half of the time that is left: the decoders have to be compared with the plain path, too.
        """
        until = time.monotonic() + (self.until - time.monotonic()) / 2
        sets = []
        for group in family:
            alone = len(group) < 2 and all(problem in self.bytes for problem in self._problems(group))
            if alone or time.monotonic() > until:
                continue
            try:
                sets.append(self._timed_set(group))
            except LostCardError:
                raise
            except Exception as error:
                yield Finding(_label(group), note=f"decoders were not timed side by side: {_reason(error)}")
        for _ in range(PASSES):
            before = dict(self.chosen)
            for problem in sorted({problem for one in sets for problem in one.problems}):
                users = [one for one in sets if problem in one.problems]
                for config in self._alternatives(problem):
                    if time.monotonic() > until:
                        return
                    usual, before_it = self._configs([problem]), users[0].seconds
                    if self._is_faster_with(problem, config, users):
                        if problem not in self.seconds:  # no launch alone told
                            self.seconds[problem] = dict.fromkeys(usual.values(), before_it)
                        self.seconds[problem].setdefault(config, users[0].seconds)
                        yield self._choose(problem, config, _label(users[0].group))
            if self.chosen == before:
                break

    def _timed_set(self, group: Sequence[Target]) -> _Set:
        one = _Set(group, self.timer.together(group), self._problems(group), self._all_problems(group))
        one.seconds = one.time(self._configs(one.either_way))
        return one

    def _is_faster_with(self, problem: Problem, config: Config, users: Sequence[_Set]) -> bool:
        """Whether decoders are, and still are when what they had is timed anew: clocks change in the meantime."""
        try:
            with_it = [one.time(self._configs(one.either_way) | {problem: config}) for one in users]
            if not _is_gain([one.seconds for one in users], with_it):
                return False
            for one in users:
                one.seconds = one.time(self._configs(one.either_way))
        except LostCardError:
            raise
        except Exception:  # a launch of few, which the one that was timed alone stands for, asks for too much
            return False
        if not _is_gain([one.seconds for one in users], with_it):
            return False
        for one, seconds in zip(users, with_it, strict=True):
            one.seconds = seconds
        return True

    def _alternatives(self, problem: Problem) -> list[Config]:
        """Those that none of the timed ones beats both alone and in what it moves, the fastest first; all of a problem
        that no launch alone poses."""
        if problem not in self.bytes:
            current = self.chosen.get(problem) or self._standard(problem)
            return [config for config in candidates(problem, self.chip) if config != current]
        seconds, moved = self.seconds.get(problem, {}), self.bytes.get(problem, {})
        found: list[Config] = []
        for config in sorted(seconds, key=lambda config: (seconds[config], moved[config])):
            lighter = not found or moved[config] < min(moved[other] for other in found)
            if lighter and seconds[config] <= FARTHEST * min(seconds.values()):
                found.append(config)
        return [config for config in found if config != self.chosen.get(problem)]

    def side_by_side(self, family: Sequence[Sequence[Target]]) -> Iterator[Finding]:
        """Beside what was launched before anything was measured: what makes decoders slower is given back, unless
        others that launch the same gain more."""
        compared: list[tuple[str, set[Problem], Ratio]] = []
        for group in family:
            standard = {problem: self._standard(problem) for problem in self._all_problems(group)}
            changed = {p for p in standard if p in self.chosen and self.chosen[p] != standard[p]}
            if not changed or self.is_over:
                continue
            try:
                usual = {problem: config for problem, config in standard.items() if config}
                found = self.timer.side_by_side(group, usual, self._configs(standard))
            except LostCardError:
                raise
            except Exception as error:
                yield Finding(_label(group), note=f"decoders were not timed side by side: {_reason(error)}")
                continue
            compared.append((_label(group), changed, found))
        lost = set()
        for problem in set[Problem]().union(*(changed for _, changed, _ in compared)):
            ratios = [found for _, changed, found in compared if problem in changed]
            if any(ratio.high < 1 for ratio in ratios) and math.prod(ratio.median for ratio in ratios) < 1:
                lost.add(problem)
        for label, changed, found in compared:
            if found.high < 1 and changed & lost:
                yield Finding(label, note=f"side by side what is faster alone is slower, {found}: given back")
        for problem in sorted(lost):
            config = self._standard(problem)
            if config in self.seconds[problem]:
                yield self._choose(problem, config, problem.kernel)

    def backend(self, target: Target) -> Finding:
        try:
            times = self.timer.decoder(target, self._configs(self._all_problems([target])) | self.chosen)
        except LostCardError:
            raise
        except Exception as error:  # the plain path may run out of memory where the kernels do not
            return Finding(target.label, note=f"Triton and the plain path were not compared: {_reason(error)}")
        backend = "plain" if times.faster.low > 1 else "triton"
        triton_us, plain_us = (round(1e6 * seconds, 1) for seconds in times[:2])
        tie = times.faster.low <= 1 <= times.faster.high
        why = f"plain {plain_us} us, Triton {triton_us} us{', a tie' if tie else ''}: {backend}"
        return Finding(target.label, decoder=(target.problem, Choice(backend, why, "measured", triton_us, plain_us)))

    def _choose(self, problem: Problem, config: Config, label: str) -> Finding:
        self.chosen[problem] = config
        expected = self.shipped.get(problem)
        predicted = expected.predicted_us if expected and expected.config == config else None
        return Finding(label, kernel=(problem, Entry(config, predicted, round(1e6 * self.seconds[problem][config], 2))))

    def _standard(self, problem: Problem) -> Config | None:
        """What is launched before anything is measured."""
        expected = self.shipped.get(problem)
        return expected.config if expected else rule(problem, self.chip)

    def _configs(self, problems: Iterable[Problem]) -> dict[Problem, Config]:
        found = {problem: self.chosen.get(problem) or self._standard(problem) for problem in problems}
        return {problem: config for problem, config in found.items() if config}

    def _problems(self, group: Sequence[Target]) -> list[Problem]:
        found = {problem for target in group for problem in self.launches(target)}
        found |= {problem for target in group if (problem := target.way(self.chip)) is not None}
        return sorted(found)

    def _all_problems(self, group: Sequence[Target]) -> list[Problem]:
        """Those of either way. What is launched the other way alone is not tuned, and launched as usual."""
        found = set(self._problems(group))
        for target in group:
            found |= {problem for launch in other_way(target, self.chip) if (problem := problem_of(launch))}
        return sorted(found)


def _is_gain(before: Sequence[float], after: Sequence[float]) -> bool:
    gained = sum(math.log(a / b) for a, b in zip(before, after, strict=True))
    return gained > SIDE_BY_SIDE_TIE * len(before)


def _label(group: Sequence[Target]) -> str:
    return group[0].beside or group[0].label


@dataclass
class _Set:
    """Decoders that run side by side."""

    group: Sequence[Target]
    time: Callable[[Mapping[Problem, Config]], float]
    problems: list[Problem]
    either_way: list[Problem]
    seconds: float = math.inf


def decoder_launch(target: Target, chip: Chip, place: int, problem: Problem, config: Config) -> Launch:
    with tuning.trying({problem: config}):
        return target.launches(chip)[problem][place]


def _tail_launch(batch: int, scales: int, size: int, problem: Problem, config: Config) -> Launch:
    with tuning.trying({problem: config}):
        return tail_launches(size, (batch,), (scales,))[0]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def in_words(table: Table) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Headings and rows of what a table says about kernels, and of what it says about decoders."""
    kernels = "kernel", "configuration", "predicted us", "measured us", "ratio"
    decoders = "decoder", "the dispatcher takes"
    return [
        (kernels, [_kernel_row(problem, entry) for problem, entry in sorted(table.kernels.items())]),
        (decoders, [_decoder_row(decoder, choice) for decoder, choice in sorted(table.decoders.items())]),
    ]


def _kernel_row(problem: Problem, entry: Entry) -> tuple[str, ...]:
    names = zip(NUMBERS[problem.kernel], problem.numbers, strict=True)
    what = [problem.kernel, problem.precision, f"{problem.rows} rows", *(f"{name} {number}" for name, number in names)]
    times = (entry.predicted_us, entry.measured_us, entry.ratio)
    return ", ".join(what), _short(entry.config), *("" if time is None else f"{time:g}" for time in times)


def _decoder_row(decoder: DecoderProblem, choice: Choice) -> tuple[str, ...]:
    what = f"D {decoder.features}, {decoder.permutations}, {decoder.precision}, {decoder.rows} rows"
    return what, choice.why


def _short(config: Config) -> str:
    """Its numbers by name, those at their usual values left out."""
    usual = {f.name: f.default for f in fields(config)}
    values = {name: value for name, value in vars(config).items() if value != usual[name]}
    return ", ".join(f"{name.removeprefix('block_')} {value}" for name, value in values.items())
