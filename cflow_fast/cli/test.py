"""`cflow-fast test`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import click
import torch
from rich.table import Table
from rich.text import Text

from cflow_fast.cli.common import Skipped, console, loading_options, model_argument, progress_bar
from cflow_fast.datasets import MVTecCategory
from cflow_fast.evaluation import Evaluation, evaluate
from cflow_fast.files import write_text
from cflow_fast.model import CFlowAD
from cflow_fast.page import write_page
from cflow_fast.report import category_result


@click.command()
@model_argument
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Write metrics and a page there."
)
@loading_options
def test(model: Path, data: Path, output: Path | None, device: torch.device, batch_size: int, workers: int) -> None:
    """Measure MODEL on DATA, a category in MVTec AD's layout: AUROC of images and pixels, AUPRO, thresholds.

    An image or mask that cannot be used is left out; the exit code is 1 then.
    """
    loaded = CFlowAD.load(model, device)
    category = MVTecCategory(data)
    skipped = Skipped()
    done = 0
    with progress_bar(f"testing {category.name}", len(category.test)) as update:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            update(done, "")

        evaluation = evaluate(loaded, category.test, batch_size, workers, skipped, advance)
    console.print(_table(evaluation, loaded, category.name))
    if skipped.paths:
        console.print(f"{len(skipped.paths)} image(s) were skipped")
    if output:
        facts = {name: None if math.isnan(value) else value for name, value in evaluation.metrics().items()}
        write_text(output / "metrics.json", json.dumps(facts, indent=2) + "\n")
        write_page(
            output / "index.html", f"{category.name}: test", [category_result(category.name, evaluation, loaded)], []
        )
        console.print(f"wrote {output}/metrics.json and {output}/index.html", markup=False, soft_wrap=True)
    sys.exit(1 if skipped.paths else 0)


def _table(evaluation: Evaluation, model: CFlowAD, name: str) -> Table:
    title = f"{name}: {evaluation.good} good and {evaluation.defective} defective images"
    table = Table(title=Text(title), show_header=False)
    for label, value in (
        ("image AUROC", evaluation.image_auroc),
        ("pixel AUROC", evaluation.pixel_auroc),
        ("AUPRO (FPR up to 0.3)", evaluation.aupro),
    ):
        table.add_row(label, f"{value:.4f}")
    if model.image_threshold is not None and model.pixel_threshold is not None:
        alarms = f"{evaluation.false_alarms} false alarms, {evaluation.missed} missed"
        table.add_row(
            "stored thresholds", f"image {model.image_threshold:.4f}, pixel {model.pixel_threshold:.4f}: {alarms}"
        )
    table.add_row("F1-optimal image threshold", f"{evaluation.image_f1_threshold:.4f} (F1 {evaluation.image_f1:.4f})")
    table.add_row("F1-optimal pixel threshold", f"{evaluation.pixel_f1_threshold:.4f} (F1 {evaluation.pixel_f1:.4f})")
    table.add_row("images/s without reading", f"{1 / evaluation.seconds_per_image:.1f}")
    return table
