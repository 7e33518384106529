"""`cflow-fast bench`: the benchmark's commands, one module for each kind."""

from __future__ import annotations

import click

from cflow_fast.cli.bench_ablation import ablation
from cflow_fast.cli.bench_accuracy import accuracy
from cflow_fast.cli.bench_complexity import complexity
from cflow_fast.cli.bench_report import report
from cflow_fast.cli.bench_scaling import scaling
from cflow_fast.cli.bench_stages import stages
from cflow_fast.cli.bench_timed import decoder, end_to_end, maps, training


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def bench() -> None:
    """Measure: who is faster, how exact, where the time goes. What was not measured is written so."""


for command in (decoder, maps, end_to_end, training, stages, scaling, complexity, accuracy, ablation, report):
    bench.add_command(command)
