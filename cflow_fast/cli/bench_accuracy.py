"""`cflow-fast bench accuracy`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE
from rich.table import Table

from cflow_fast.bench import accuracy as bench
from cflow_fast.bench import paper
from cflow_fast.bench.baselines.maps import NotEnoughMemoryError
from cflow_fast.bench.contenders import OURS
from cflow_fast.bench.counting import MEGABYTE
from cflow_fast.bench.results import Row, compare
from cflow_fast.cli.bench_options import open_files
from cflow_fast.cli.bench_show import metric_changes, print_wide
from cflow_fast.cli.bench_tables import compare_option, exit_code, json_option, number, results_of, store
from cflow_fast.cli.common import Skipped, console, loading_options, progress_bar
from cflow_fast.datasets import MVTecCategory
from cflow_fast.encoders import Encoder
from cflow_fast.errors import EncoderError
from cflow_fast.recipes import PRESETS, SOFT_PRESETS, Recipe


def training_options(command: Callable[..., object]) -> Callable[..., object]:
    """Where the encoder's weights come from, and how CFLOW-AD is trained."""
    for option in (
        click.option("--steps", type=click.IntRange(1), default=None, help="In place of the preset's."),
        click.option("--preset", type=click.Choice(tuple(PRESETS)), default="fast", help="How CFLOW-AD is trained."),
        click.option("--pretrained/--untrained", default=True, help="ImageNet weights, or random ones."),
        click.option("--encoder-weights", type=click.Path(path_type=Path), help="A safetensors or pth file."),
        click.option("--layers", default=None, help="CFLOW-AD's taps, comma separated.  [default: strides 8, 16, 32]"),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--methods", default=",".join(bench.METHODS), help="Comma separated.")
@click.option("--runs", type=click.IntRange(1), default=1, help="Seeds, from --seed on; the paper has 4.")
@click.option("--encoder", default="wide_resnet50_2", help="A timm model.")
@click.option("--baseline-layers", default=None, help="PaDiM's and SPADE's taps.  [default: layer1 to 3 of a ResNet]")
@click.option("--image-size", type=click.IntRange(32), default=256, help="Images are resized to this square.")
@click.option("--seed", type=int, default=0)
@training_options
@json_option
@compare_option
@loading_options
def accuracy(
    data: Path,
    methods: str,
    runs: int,
    encoder: str,
    baseline_layers: str | None,
    image_size: int,
    seed: int,
    json_path: Path | None,
    old_path: Path | None,
    device: torch.device,
    **options: Any,
) -> None:
    """The paper's Table 3 row of DATA, a category in MVTec AD's layout: CFLOW-AD, PaDiM and SPADE.

    A test image that cannot be used is left out. Ctrl-C prints what has been measured; exits with 1 when nothing could.
    """
    chosen = method_names(methods)
    category = MVTecCategory(data)
    category.check()
    old = open_files(json_path, old_path, "accuracy")
    setting = setting_from(encoder, image_size, device, baseline_layers=taps(baseline_layers), **options)
    check_taps(chosen, setting)
    rows: list[Row] = []
    interrupted = _measure(category, chosen, setting, runs, seed, rows)
    print_wide(table(rows, category.name))
    console.print(paper.BEST_EPOCH)
    results = results_of(rows, device, seed, interrupted)
    if old is not None:
        print_wide(metric_changes(compare(old, results), old))
    store(json_path, results)
    sys.exit(exit_code(rows, interrupted))


def setting_from(
    encoder: str,
    image_size: int,
    device: torch.device,
    layers: str | None,
    encoder_weights: Path | None,
    pretrained: bool,
    preset: str,
    steps: int | None,
    batch_size: int,
    workers: int,
    baseline_layers: tuple[str, ...] | None = None,
) -> bench.Setting:
    return bench.Setting(
        encoder,
        _recipe(preset, steps),
        image_size,
        taps(layers),
        baseline_layers,
        encoder_weights,
        pretrained,
        permute_soft=preset in SOFT_PRESETS,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )


def method_names(text: str) -> list[str]:
    """Raises UsageError for a name that is no method's."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in bench.METHODS]
    if unknown or not names:
        what = f"unknown method {unknown[0]!r}" if unknown else "no method"
        raise click.UsageError(f"--methods: {what}; there are {', '.join(bench.METHODS)}")
    return names


def check_taps(methods: Sequence[str], setting: bench.Setting) -> None:
    """Find before anything is trained what would end it: UsageError for a baseline's taps, EncoderError otherwise."""
    Encoder(setting.encoder, setting.layers, pretrained=False)
    for layers in {bench.baseline_layers(method, setting) for method in methods if method != OURS} - {setting.layers}:
        try:
            Encoder(setting.encoder, layers, pretrained=False)
        except EncoderError as error:
            raise click.UsageError(f"--baseline-layers: {error}") from error


def taps(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(layer.strip() for layer in text.split(","))


def _recipe(preset: str, steps: int | None) -> Recipe:
    return PRESETS[preset] if steps is None else replace(PRESETS[preset], steps=steps)


def _measure(
    category: MVTecCategory, methods: Sequence[str], setting: bench.Setting, runs: int, seed: int, rows: list[Row]
) -> bool:
    """Append a row for each method; whether Ctrl-C ended it."""
    skip = SkippedOnce()
    plan = [(method, run) for method in methods for run in bench.seeds_of(method, runs, seed)]
    scores: dict[str, list[bench.Scores]] = {}
    seeds: dict[str, list[int]] = {}
    failed: list[Row] = []
    interrupted = False
    try:
        with progress_bar(f"accuracy on {category.name}", len(plan)) as update:
            for done, (method, run) in enumerate(plan):
                label = f"{method}, seed {run}"

                def show(text: str, done: int = done, label: str = label) -> None:
                    update(done, f"{label}: {text}")

                try:
                    scores.setdefault(method, []).append(bench.measure(method, category, setting, run, skip, show))
                    seeds.setdefault(method, []).append(run)
                except NotEnoughMemoryError as error:
                    failed.append(bench.failed_row(method, category.name, setting, error))
    except KeyboardInterrupt:
        interrupted = True
    rows += [bench.summary_row(m, category.name, setting, found, seeds[m]) for m, found in scores.items() if found]
    rows += failed
    if skip.paths:
        console.print(f"{len(skip.paths)} image(s) were skipped")
    return interrupted


class SkippedOnce(Skipped):
    """Says of a file once that it was left out, however many runs leave it out."""

    def __call__(self, path: Path, reason: str) -> None:
        if path not in self.paths:
            super().__call__(path, reason)


def table(rows: Sequence[Row], category: str) -> Table:
    """Percentages, mean and deviation over the seeds, the paper's beside them."""
    published = paper.TABLE_3.get(category)
    title = rows[0].case if rows else f"{category}: nothing measured"
    result = Table(title=f"Table 3: {title}", box=SIMPLE, padding=(0, 1, 0, 0))
    result.add_column("method", no_wrap=True)
    for heading in (*bench.METRICS.values(), "paper", "images/s", "fit, s", "MB"):
        result.add_column(heading, justify="right")
    for row in rows:
        if row.status != "ok":
            result.add_row(row.contender, f"{row.status}: {row.note}")
            continue
        figures = published.figures(row.contender, str(row.axes["encoder"])) if published else None
        result.add_row(
            row.contender + (" (1 run)" if row.note else ""),
            *(_percent(row, name) for name in bench.METRICS),
            _published(figures),
            number(row.images_per_second),
            number(row.extra.get("fit_seconds")),
            number(None if row.model_bytes is None else row.model_bytes / MEGABYTE),
        )
    result.caption = _caption(rows, category)
    return result


def _caption(rows: Sequence[Row], category: str) -> str:
    lines = ["an image's score is its map's maximum"]
    for row in rows:
        if row.extra.get("neighbour_auroc") is not None:
            own = _percent(row, "neighbour_auroc")
            lines.append(f"SPADE's image AUROC by its own score, the nearest images' distance: {own}")
    if category in paper.TABLE_3:
        lines.append("the paper's: image AUROC / pixel AUROC / AUPRO")
    return "; ".join([*lines, paper.conditions([category])])


def _percent(row: Row, name: str) -> str:
    mean, deviation = row.extra.get(name), row.extra.get(f"{name}_deviation")
    if mean is None:
        return "undefined"
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def _published(figures: paper.Accuracy | None) -> str:
    if figures is None:
        return paper.MISSING
    values = (figures.image_auroc, figures.pixel_auroc, figures.aupro)
    return " / ".join("-" if value is None else f"{value:.2f}" for value in values)
