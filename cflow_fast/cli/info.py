"""`cflow-fast info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cflow_fast.cli.common import console, model_argument
from cflow_fast.model import CFlowAD


@click.command()
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(model: Path, as_json: bool) -> None:
    """Print what MODEL is: encoder, decoders, calibration, sizes."""
    facts = describe(CFlowAD.load(model), model)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        console.print(f"{name:<{width}}  {text}", markup=False, soft_wrap=True)


def describe(model: CFlowAD, path: Path) -> dict[str, Any]:
    rate = float(model.false_alarm_rate)
    folded = model.folded()
    maxima = [round(value, 4) for value in model.log_prob_max.tolist()]
    return model.options | {
        "channels": list(model.encoder.channels),
        "strides": list(model.encoder.strides),
        "decoder parameters": sum(p.numel() for p in model.decoders.parameters()),
        "arithmetic here": str(folded[0].arithmetic),
        "folded MiB": round(sum(b.numel() * b.element_size() for f in folded for b in f.buffers()) / 2**20, 1),
        "file MiB": round(path.stat().st_size / 2**20, 1),
        "largest log p / D": maxima if model.is_calibrated else None,
        "image threshold": model.image_threshold,
        "pixel threshold": model.pixel_threshold,
        "promised false alarm rate": None if rate != rate else round(rate, 6),
    }
