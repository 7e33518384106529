"""`cflow-fast demo`."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

from cflow_fast.cli.common import console, device_option, errors
from cflow_fast.demo.run import STEPS, run_demo


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-output"))
@click.option("--seed", type=int, default=0)
@click.option("--steps", type=click.IntRange(1), default=STEPS, help="Training steps for each scale.")
@device_option
def demo(output: Path, seed: int, steps: int, device: torch.device) -> None:
    """Show defects being found: three materials, made, trained on and tested, with a result page."""
    start = time.perf_counter()
    with errors.status("making the images") as status:
        run_demo(
            output,
            seed,
            steps,
            device,
            say=lambda text: console.print(text, markup=False, soft_wrap=True),
            on_progress=lambda category, done: status.update(f"training on {category}: {done:.0%}"),
        )
    console.print(f"{time.perf_counter() - start:.0f} s in all; open {output}/index.html", markup=False, soft_wrap=True)
