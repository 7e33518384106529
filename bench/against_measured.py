"""How well `prediction` tells what was measured: launches by configuration that were timed alone on a card.

    python -m cflow_fast.bench.against_measured bench/results/nvidia-h100-80gb-hbm3/candidates.json

Every launch is compiled for the card, predicted, and compared; `make gpu` and `cflow-fast tune` find what is fastest by
measuring, but what is shipped for cards and decoders that nobody measured is chosen by prediction alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from cflow_fast.bench.aot import Kernel, compile_all, compile_key
from cflow_fast.bench.prediction import CARDS, Card, predict
from cflow_fast.bench.tune import decoder_launch
from cflow_fast.bench.tune_targets import most_frequent, targets
from cflow_fast.kernels import tuning
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.configs import NUMBERS, Config, CouplingConfig, LinearConfig, Problem
from cflow_fast.kernels.launch import Launch

CAPABILITY = 90
MEASURED = (("wide_resnet50_2",), ("bf16",), (256,), (1, 32))
"""Whose decoders' launches the file may have: encoders, precisions, sizes, batches."""
FEW_ROWS = 1024
CONFIGS: dict[str, type[LinearConfig] | type[CouplingConfig]] = {"linear": LinearConfig, "coupling": CouplingConfig}

Group = tuple[str, Problem]
"""Permutations, and what a configuration is chosen by."""


class Pair(NamedTuple):
    group: Group
    predicted: float  # seconds
    measured: float

    @property
    def deviation(self) -> float:
        return math.log(self.predicted / self.measured)


def pairs(path: Path, card: Card) -> list[Pair]:
    """Of the last run that timed a problem. What spills is left out: it would not ship."""
    timed = _timed(json.loads(path.read_text()))
    launches = list(_launches(timed))
    distinct = {compile_key(launch, CAPABILITY): Kernel(launch, CAPABILITY) for _, _, launch in launches}
    codes = dict(zip(distinct, compile_all(list(distinct.values())), strict=True))
    found = []
    for group, config, launch in launches:
        code = codes[compile_key(launch, CAPABILITY)]
        if not isinstance(code, str) and not code.spills:
            found.append(Pair(group, predict(launch, code, card).seconds, timed[group][config]))
    return found


def _timed(rows: Sequence[dict[str, Any]]) -> dict[Group, dict[Config, float]]:
    """Seconds by problem and configuration."""
    runs: dict[Group, dict[int, dict[Config, float]]] = {}
    for row in rows:
        numbers = tuple(row[name] for name in NUMBERS[row["kernel"]])
        group = row["permutations"], Problem(row["kernel"], row["precision"], row["rows"], numbers)
        config = CONFIGS[row["kernel"]](**row["config"])
        runs.setdefault(group, {}).setdefault(row["run"], {})[config] = 1e-6 * row["microseconds"]
    return {group: of_runs[max(of_runs)] for group, of_runs in runs.items()}


def _launches(timed: dict[Group, dict[Config, float]]) -> Iterator[tuple[Group, Config, Launch]]:
    chip = Chip()
    for target in targets(*MEASURED):
        with tuning.trying({}):
            launches = target.launches(chip)
        for problem, same in launches.items():
            group = target.permutations, problem
            for config in timed.get(group, {}):
                launch = decoder_launch(target, chip, most_frequent(same), problem, config)
                yield group, config, _not_early(launch)


def _not_early(launch: Launch) -> Launch:
    """As they were timed."""
    options = {name: value for name, value in launch.options.items() if name != "launch_pdl"}
    return replace(launch, constexprs=launch.constexprs | {"EARLY": False}, options=options)


def summary(found: Sequence[Pair]) -> str:
    """The deviations, and how much longer what is predicted fastest takes than the fastest."""
    deviations = [pair.deviation for pair in found]
    mean, rms = sum(deviations) / len(found), math.sqrt(sum(d * d for d in deviations) / len(found))
    lines = [f"{len(found)} launches: predicted over measured {math.exp(mean):.2f}, within {rms:.1%} (RMS)"]
    groups: dict[Group, list[Pair]] = {}
    for pair in found:
        groups.setdefault(pair.group, []).append(pair)
    for name, few in (("few rows", True), ("many rows", False)):
        lost = [_lost(group) for (_, problem), group in groups.items() if (problem.rows <= FEW_ROWS) == few]
        if lost:
            what = f"{len(lost)} problems of {name}: what is predicted fastest takes"
            lines.append(f"{what} {sum(lost) / len(lost):.1%} longer than the fastest, at most {max(lost):.1%}")
    return "\n".join(lines)


def _lost(group: Sequence[Pair]) -> float:
    chosen = min(group, key=lambda pair: pair.predicted)
    return chosen.measured / min(pair.measured for pair in group) - 1


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path, dir_okay=False))
def main(path: Path) -> None:
    """Compare predictions for an H100 with launches that were measured on one."""
    found = pairs(path, CARDS[0])
    if not found:
        raise click.ClickException(f"{path} has no launch of {', '.join(MEASURED[0])}'s decoders in bf16 at 256 px")
    print(summary(found))


if __name__ == "__main__":
    main()
