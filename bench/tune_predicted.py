"""Choosing by prediction, where there is no card: how the shipped tables are made.

Candidates that no machine code could make faster than the rule's choice are left out by counting alone. The others
are compiled; what must not ship (`aot.faults`) is out, and so is what is not clearly faster alone by `prediction`. Of
what is left, that is taken which makes decoders side by side faster (`tune_together`); otherwise the rule's choice.
The same candidates and compiler give the same table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import triton

from cflow_fast.bench.aot import CAPABILITIES, Kernel, Key, compile_all, compile_key, faults
from cflow_fast.bench.compiled import Compiled
from cflow_fast.bench.plain_floor import plain_at_least
from cflow_fast.bench.prediction import Card, predict, predict_at_least, predict_together
from cflow_fast.bench.tune import TIE
from cflow_fast.bench.tune_targets import Target, groups_of, most_frequent, problem_of, trials
from cflow_fast.bench.tune_together import Decoder, Load, choose_together, load_of
from cflow_fast.kernels import tuning
from cflow_fast.kernels.configs import Config, Problem, candidates, select_whole_flow
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.tuning_table import Choice, Entry, Table

CAPABILITY = 90
ARCHITECTURE = "sm_90"
CHIP = CAPABILITIES[CAPABILITY]
INFINITE = float("inf")

Compile = Callable[[Sequence[Kernel]], Iterable[Compiled | str]]
Options = list[list[Launch]]
"""By candidate, the rule's first: a problem's launches in one decoder."""
Places = dict[Problem, list[int]]
"""Of candidates that are left."""


class Predictor:
    """Compiles what has to be known, each machine code once."""

    def __init__(self, card: Card, compile_kernels: Compile = compile_all) -> None:
        self.card, self.compile_kernels = card, compile_kernels
        self.found: dict[Key, Compiled | str] = {}

    def compile(self, launches: Iterable[Launch]) -> None:
        wanted = {compile_key(launch, CAPABILITY): Kernel(launch, CAPABILITY) for launch in launches}
        missing = {key: kernel for key, kernel in wanted.items() if key not in self.found}
        self.found |= zip(missing, self.compile_kernels(list(missing.values())), strict=True)

    def code(self, launch: Launch) -> Compiled | None:
        """Of a launch that was compiled; None where it must not ship."""
        code = self.found[compile_key(launch, CAPABILITY)]
        return None if isinstance(code, str) or faults(Kernel(launch, CAPABILITY), code) else code

    def seconds(self, launch: Launch) -> float:
        """Infinite where it must not ship."""
        code = self.code(launch)
        return INFINITE if code is None else predict(launch, code, self.card).seconds

    def total(self, launches: Sequence[Launch]) -> float:
        return sum(map(self.seconds, launches))

    def side_by_side(self, decoders: Sequence[Sequence[Launch]]) -> float:
        """Seconds of decoders' launches, which are compiled where they are not yet; infinite as above."""
        self.compile(launch for decoder in decoders for launch in decoder)
        chains = []
        for decoder in decoders:
            codes = [(launch, self.code(launch)) for launch in decoder]
            chain = [predict(launch, code, self.card) for launch, code in codes if code is not None]
            if len(chain) < len(codes):
                return INFINITE
            chains.append(chain)
        return predict_together(chains, self.card)


def choose_by_prediction(
    card: Card,
    wanted: Sequence[Target],
    compile_kernels: Compile = compile_all,
    report: Callable[[str], None] = lambda words: None,
) -> Table:
    """The table of the decoders' kernels, and of each decoder's prediction beside the least that the plain path takes.

    Raises ValueError where not even the rule's choice may ship.
    """
    predictor = Predictor(card, compile_kernels)
    problems = dict(_problems(wanted))
    report(f"{len(problems)} problems, {sum(map(len, problems.values()))} candidates")
    predictor.compile(launch for options in problems.values() for launch in options[0])
    for problem, options in problems.items():
        if predictor.total(options[0]) == INFINITE:
            raise ValueError(f"the rule's choice for {problem} must not ship: see `make aot`")
    left = {problem: _worth_compiling(options, predictor) for problem, options in problems.items()}
    report(f"{sum(map(len, left.values()))} of them may be faster than the rules'")
    predictor.compile(problems[p][i][most_frequent(problems[p][0])] for p, places in left.items() for i in places)
    decoders = _decoders(wanted, problems, _faster_alone(problems, left, predictor), predictor)
    chosen = choose_together([[decoders[target] for target in group] for group in groups_of(wanted)])
    _return_to_rules(chosen, wanted, predictor)
    kernels = {}
    for problem, place in chosen.items():
        launches = problems[problem][place]
        predictor.compile(launches)
        seconds = predictor.total(launches) / len(launches)
        kernels[problem] = Entry(_candidates(problem)[place], round(1e6 * seconds, 2))
    backends = {t.problem: _backend(t, chosen, predictor) for t in wanted if not _left_to_the_dispatcher(t)}
    facts = {
        "predicted_for": card.name,
        "triton": triton.__version__,
        "command": f"cflow-fast tune --predict {card.name}",
    }
    return Table(ARCHITECTURE, card.multiprocessors, kernels, backends, facts)


def outdated(table: Table, wanted: Sequence[Target], found: dict[Key, Compiled], card: Card) -> tuple[int, int]:
    """How many of a table's entries for these decoders are now predicted otherwise than they say, and of how many.

    found: the decoders' kernels as compiled; nothing else is.
    """
    predictor = Predictor(card)
    predictor.found |= found
    now: dict[Problem, float] = {}
    for target in wanted:
        for problem, launches in target.launches(CHIP).items():
            entry = table.kernels.get(problem)
            predicted = entry is not None and entry.predicted_us is not None
            if predicted and all(compile_key(launch, CAPABILITY) in found for launch in launches):
                now.setdefault(problem, 1e6 * predictor.total(launches) / len(launches))
    expected = {problem: table.kernels[problem].predicted_us or INFINITE for problem in now}
    return sum(abs(us - expected[problem]) > TIE * us for problem, us in now.items()), len(now)


def _problems(wanted: Sequence[Target]) -> Iterator[tuple[Problem, Options]]:
    seen: set[Problem] = set()
    for target in wanted:
        options: dict[Problem, Options] = {}
        for trial in trials(target, CHIP, seen):
            for problem, launches in trial.items():
                options.setdefault(problem, []).append(launches)
        yield from options.items()


def _worth_compiling(options: Options, predictor: Predictor) -> list[int]:
    place = most_frequent(options[0])
    bar = (1 - TIE) * predictor.seconds(options[0][place])
    return [i for i in range(1, len(options)) if predict_at_least(options[i][place], predictor.card) < bar]


def _faster_alone(problems: dict[Problem, Options], left: Places, predictor: Predictor) -> Places:
    """By the launch that stands for the others; the rules' are places too."""
    found = {}
    for problem, places in left.items():
        options, stands = problems[problem], most_frequent(problems[problem][0])
        bar = (1 - TIE) * predictor.seconds(options[0][stands])
        found[problem] = [0, *(i for i in places if predictor.seconds(options[i][stands]) < bar)]
    return found


def _decoders(
    wanted: Sequence[Target], problems: dict[Problem, Options], places: Places, predictor: Predictor
) -> Mapping[Target, Decoder]:
    """What each candidate makes of each decoder, by the code of the launch that stands for the others."""
    found: dict[Target, dict[Problem, dict[int, Load]]] = {}
    for target in wanted:
        with tuning.trying({}):
            own = list(target.launches(CHIP))
        loads: dict[Problem, dict[int, Load]] = {}
        for i in range(max(len(places[problem]) for problem in own)):
            tried = {problem: places[problem][i] for problem in own if i < len(places[problem])}
            with tuning.trying(_configs(tried)):
                launches = target.launches(CHIP)
            for problem, place in tried.items():
                options = problems[problem]
                code = predictor.code(options[place][most_frequent(options[0])])
                assert code is not None
                predictions = [predict(launch, code, predictor.card) for launch in launches[problem]]
                loads.setdefault(problem, {})[place] = load_of(predictions)
        found[target] = loads
    return found


def _return_to_rules(chosen: dict[Problem, int], wanted: Sequence[Target], predictor: Predictor) -> None:
    """Where decoders side by side turn out slower than by the rules, or a launch of theirs has a fault.

    Until now one launch stood for the others, which read maps or leave sums.
    """
    groups = groups_of(wanted)
    predictor.compile(launch for target in wanted for places in ({}, chosen) for launch in _under(target, places))
    usual = [predictor.side_by_side([_under(target, {}) for target in group]) for group in groups]
    returned = True
    while returned:
        returned = False
        for group, bar in zip(groups, usual, strict=True):
            launches = [_under(target, chosen) for target in group]
            if predictor.side_by_side(launches) > (1 + 1e-9) * bar:
                for problem in {problem_of(launch) for decoder in launches for launch in decoder}:
                    if problem is not None and chosen.get(problem):
                        chosen[problem], returned = 0, True


def _backend(target: Target, chosen: dict[Problem, int], predictor: Predictor) -> Choice:
    seconds = predictor.total(_under(target, chosen))
    floor = plain_at_least(target.weights(), target.maps(), predictor.card)
    triton_us, plain_us = (round(1e6 * value, 1) for value in (seconds, floor))
    sure = "" if seconds <= floor else ", which only a measurement can tell"
    why = f"predicted: Triton {triton_us} us, plain {plain_us} us at least: triton{sure}"
    return Choice("triton", why, "predicted", triton_us, None)


def _left_to_the_dispatcher(target: Target) -> bool:
    """Wide decoders in fp32 without the matrix units: of those a card takes several times as long as is counted."""
    if target.precision != "ieee":
        return False
    rows, hard = target.batch * target.height * target.width, target.permutations == "hard"
    return select_whole_flow(CHIP.capability, target.features, rows, "ieee", hard=hard) is None


def _under(target: Target, chosen: dict[Problem, int]) -> list[Launch]:
    with tuning.trying(_configs(chosen)):
        return target.all_launches(CHIP)


def _configs(chosen: dict[Problem, int]) -> dict[Problem, Config]:
    return {problem: _candidates(problem)[place] for problem, place in chosen.items() if place}


@functools.cache
def _candidates(problem: Problem) -> list[Config]:
    return candidates(problem, CHIP)
