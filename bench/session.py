"""A run of the benchmark over its cases: who takes part, what it is measured on, the rows so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

import torch

from cflow_fast.bench.cases import Case
from cflow_fast.bench.contenders import IN_THREE, OURS, Contender, device_precisions
from cflow_fast.bench.machine import commit, describe_machine, versions
from cflow_fast.bench.measurement import Effort, matrix_rate, take_turns
from cflow_fast.bench.results import Results, Row
from cflow_fast.bench.runner import SILENT, Entrant, OnProgress, Turns, measure_case


@dataclass
class Session:
    """A run of the benchmark: what it is measured on, and the rows so far, which outlive an interruption."""

    command: str
    device: torch.device
    seed: int = 0
    effort: Effort = field(default_factory=Effort)
    peak_flops: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False

    def measure_rates(self) -> None:
        """The device's matrix rate in every precision that it has: the best so far, since other work disturbs it."""
        for precision in device_precisions(self.device):
            if precision not in IN_THREE:
                rate = matrix_rate(precision, self.device)
                self.peak_flops[precision] = max(rate, self.peak_flops.get(precision, 0.0))
        for precision, product in IN_THREE.items():
            if product in self.peak_flops:
                self.peak_flops[precision] = self.peak_flops[product] / 3

    def measure(
        self,
        case: Case,
        entrants: Sequence[Entrant],
        baseline: Entrant | None,
        on_progress: OnProgress = SILENT,
        turns: Turns = take_turns,
    ) -> None:
        """Add a row for each entrant. The speed-up is over the baseline, an entrant too or timed beside them.

        The matrix rate is measured before the first case and after every one.
        """
        if not self.peak_flops:
            on_progress("the device's matrix rate", 0.0)
            self.measure_rates()
        for row in measure_case(case, entrants, baseline, self.effort, on_progress, turns):
            self.rows.append(row)
        self.measure_rates()

    def results(self) -> Results:
        return Results(
            command=self.command,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=describe_machine(self.device),
            versions=versions(),
            seed=self.seed,
            commit=commit(),
            peak_flops=dict(self.peak_flops),
            rows=[self._with_share(row) for row in self.rows],
            interrupted=self.interrupted,
        )

    def _with_share(self, row: Row) -> Row:
        peak = self.peak_flops.get(row.precision)
        return row if row.tflops is None or not peak else replace(row, share_of_peak=1e12 * row.tflops / peak)


def line_up(
    contenders: Mapping[str, Contender], against: Sequence[str], precisions: Sequence[str]
) -> tuple[list[Entrant], Entrant | None]:
    """Ours and the peers named in every precision, and the baseline: the first peer in its first precision.

    "cflow-fast" among the peers adds nothing to the table: it makes the baseline ours, built once more.
    """
    first = precisions[0]
    names = [OURS, *(name for name in against if name != OURS)]
    entrants = [
        Entrant(contenders[name], precision)
        for name in names
        for precision in precisions
        if contenders[name].reduced or precision == first
    ]
    if not against:
        return entrants, None
    if against[0] == OURS:
        return entrants, Entrant(contenders[OURS], first)
    return entrants, next(entrant for entrant in entrants if entrant.contender.name == against[0])
