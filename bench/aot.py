"""`make aot`: every kernel and configuration that is shipped, compiled for cards that are not there.

    python -m cflow_fast.bench.aot [--quick] [--json FILE] [--predictions FILE]   (without TRITON_INTERPRET)

Fails on what would make a kernel slow on the card without any error: spills inside a matrix loop, serialized wgmma,
more shared memory than there is, bf16 products for sm_90 without wgmma unless the tile has too few rows for it. Then
it prints what the machine code lets expect of the decoders (see `prediction`), and can write both down.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import triton
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cflow_fast.bench.compiled import Compiled, compile_launch
from cflow_fast.bench.headline import Headline, headlines, pointwise_launches, tail_launches
from cflow_fast.bench.prediction import CARDS, Card, Prediction, predict, predict_together
from cflow_fast.bench.processes import in_processes
from cflow_fast.files import write_text
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch

if TYPE_CHECKING:
    from cflow_fast.bench.tune_targets import Target

CAPABILITIES = {80: Chip((8, 0), 108), 90: Chip((9, 0), 132)}
QUICK = (
    (("wide_resnet50_2", "resnet18"), ("bf16", "tf32"), (256,), (1, 32)),
    (("wide_resnet50_2",), ("fp16", "fp16x3"), (256,), (1, 32)),
)
FEWEST_WGMMA_ROWS = 64
"""A warp group multiplies 64 rows at once; tiles of fewer, for a handful of vectors, use the older instruction."""
SHAPES = ("IMAGES", "LINES", "COLUMNS", "BLOCKS", "CHANNELS")
"""Constants of a kernel that change loop bounds and addresses but not what is kept in registers."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class Kernel:
    """One kernel in one configuration, as compiled for one architecture."""

    launch: Launch
    capability: int

    @property
    def name(self) -> str:
        c, options = self.launch.constexprs, self.launch.options
        tile = " x ".join(str(c[name]) for name in TILE if name in c)
        extra = [f"split {c['SPLIT_K']}"] if c.get("SPLIT_K", 1) > 1 else []
        extra += [str(c[name]) for name in ("EPILOGUE",) if name in c]
        extra += [f"{2 * (c['MAIN'] + c['SIDE'])} places"] if "MAIN" in c else []
        extra += ["hard"] if c.get("HARD") or c.get("INDEXED") else []
        warps = f"{options['num_warps']} warps, {options.get('num_stages', 1)} stages"
        words = [self.launch.kernel.__name__.removesuffix("_kernel"), str(c.get("PRECISION", "")), tile, *extra, warps]
        return ", ".join(word for word in words if word)


TILE = ("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_HIDDEN", "BLOCK_K", "ROWS", "BLOCK_TILES")


def compile_key(launch: Launch, capability: int) -> Key:
    """Launches with one key are the same machine code, but for addresses and bounds."""
    arguments = tuple(
        (name, str(value.dtype) if isinstance(value, Tensor) else len(value) if isinstance(value, tuple) else None)
        for name, value in launch.args.items()
        if value is None or isinstance(value, (Tensor, tuple))
    )
    constants = tuple(sorted((k, str(v)) for k, v in launch.constexprs.items() if k not in SHAPES))
    return (capability, launch.kernel.__name__, arguments, constants, tuple(sorted(launch.options.items())))


def faults(kernel: Kernel, compiled: Compiled) -> list[str]:
    """What must not ship."""
    found = compiled.faults(kernel.capability)
    constants = kernel.launch.constexprs
    halves = constants.get("PRECISION") in ("bf16", "fp16", "fp16x3")
    wants_wgmma = kernel.capability == 90 and halves and bool(compiled.loops)
    if wants_wgmma and not compiled.uses_wgmma and constants["BLOCK_ROWS"] >= FEWEST_WGMMA_ROWS:
        found.append(f"{constants['PRECISION']} products without wgmma")
    return found


def distinct(lines: Iterable[Headline], capability: int) -> dict[Key, Kernel]:
    kernels: dict[Key, Kernel] = {}
    chip, lines = CAPABILITIES[capability], list(lines)
    of_decoders = [launch for line in lines for launch in line.launches(chip)]
    for launch in [*of_decoders, *_other_ways(lines, chip), *tail_launches(), *pointwise_launches()]:
        kernels.setdefault(compile_key(launch, capability), Kernel(launch, capability))
    return kernels


def _other_ways(lines: Iterable[Headline], chip: Chip) -> Iterator[Launch]:
    """What decoders with a choice of ways launch where a card's own table does not take the rule's."""
    from cflow_fast.bench.tune_targets import other_way, shipped_configs  # which names kernels by this module

    shipped = shipped_configs(chip)
    for target in _targets(lines):
        yield from other_way(target, chip, shipped)


def _targets(lines: Iterable[Headline]) -> list[Target]:
    from cflow_fast.bench.tune_targets import Target

    return [
        Target(line.features, line.side, line.side, line.batch, line.permutations, line.precision) for line in lines
    ]


def _compile(kernel: Kernel) -> Compiled:
    return compile_launch(kernel.launch, kernel.capability)


def compile_all(
    kernels: Sequence[Kernel], processes: int | None = None, until: float = math.inf
) -> Iterator[Compiled | str]:
    """In order; a string is why a kernel could not be compiled. processes, until: see `in_processes`."""
    return in_processes(_compile, kernels, processes, until)


def predicted(lines: Iterable[Headline], found: dict[Key, Compiled], card: Card) -> Iterator[dict[str, Any]]:
    """For every set of decoders: each one's launches, and the time of all side by side."""
    groups: dict[str, list[Headline]] = {}
    for line in lines:
        groups.setdefault(line.decoders, []).append(line)
    for name, group in groups.items():
        chains = [list(_predicted(line, found, card)) for line in group]
        if not all(chains):
            continue
        seconds = predict_together(chains, card)
        yield {
            "decoders": name,
            "card": card.name,
            "microseconds": round(1e6 * seconds, 1),
            "images_per_second": round(group[0].batch / seconds),
            "each": {str(line.features): _chain(chain) for line, chain in zip(group, chains, strict=True)},
        }


def _predicted(line: Headline, found: dict[Key, Compiled], card: Card) -> Iterator[Prediction]:
    launches = line.launches(CAPABILITIES[90])
    keys = [compile_key(launch, 90) for launch in launches]
    if all(key in found for key in keys):
        for launch, key in zip(launches, keys, strict=True):
            yield predict(launch, found[key], card)


def _chain(chain: Sequence[Prediction]) -> dict[str, Any]:
    longest = max(chain, key=lambda p: p.seconds)
    through_l2 = sum(p.work.units * (p.work.steps * p.work.step_bytes + p.work.unit_bytes) for p in chain)
    parts = ("matrix_seconds", "issue_seconds", "l2_seconds", "memory_seconds")
    return {
        "microseconds": round(1e6 * sum(p.seconds for p in chain), 1),
        "launches": len(chain),
        "gflop": round(sum(p.work.flop for p in chain) / 1e9, 2),
        "l2_megabytes": round(through_l2 / 1e6, 1),
        "memory_megabytes": round(sum(p.work.memory_bytes for p in chain) / 1e6, 1),
        **{part.replace("seconds", "microseconds"): _microseconds(chain, part) for part in parts},
        "longest": {
            "microseconds": round(1e6 * longest.seconds, 2),
            "bound": longest.bound,
            "waves": round(longest.waves, 2),
            "resident": longest.resident,
        },
    }


def _microseconds(chain: Sequence[Prediction], part: str) -> float:
    return round(1e6 * sum(getattr(p, part) for p in chain), 1)


@click.command()
@click.option("--quick", is_flag=True, help="The usual decoders in the usual precisions, 1 and 32 x 256 px, sm_90.")
@click.option("--no-predictions", is_flag=True, help="Only compile and check.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the kernels there.")
@click.option("--predictions", type=click.Path(path_type=Path, dir_okay=False), help="Write the predictions there.")
def main(quick: bool, no_predictions: bool, path: Path | None, predictions: Path | None) -> None:
    """Compile every shipped kernel for sm_80 and sm_90 and say what its machine code lets expect."""
    if triton.knobs.runtime.interpret:
        raise click.UsageError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    lines = [line for some in QUICK for line in headlines(*some)] if quick else list(headlines())
    kernels: dict[Key, Kernel] = {}
    for capability in (90,) if quick else tuple(CAPABILITIES):
        kernels |= distinct(lines, capability)
    found: dict[Key, Compiled] = {}
    rows, failed = [], 0
    for (key, kernel), compiled in zip(kernels.items(), compile_all(list(kernels.values())), strict=True):
        wrong = [compiled] if isinstance(compiled, str) else faults(kernel, compiled)
        failed += bool(wrong)
        row: dict[str, Any] = {"kernel": kernel.name, "capability": kernel.capability, "faults": wrong}
        if isinstance(compiled, Compiled):
            found[key] = compiled
            row |= asdict(compiled)
        rows.append(row)
    console.print(_kernel_table(rows))
    expected: list[dict[str, Any]] = []
    if not no_predictions:
        expected = [entry for card in CARDS for entry in predicted(lines, found, card)]
        console.print(_prediction_table(expected))
        console.print(_shipped_choices(lines, found))
    if path:
        write_text(path, json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    if predictions:
        command = "make aot AOT=--quick" if quick else "make aot"
        facts = {"triton": triton.__version__, "measured": False, "command": command, "decoders": expected}
        write_text(predictions, json.dumps(facts).replace('{"decoders": "', '\n{"decoders": "') + "\n")  # one a line
    console.print(f"triton {triton.__version__}: {len(rows)} kernels, {failed} with faults")
    sys.exit(1 if failed else 0)


def _shipped_choices(lines: Sequence[Headline], found: dict[Key, Compiled]) -> str:
    """Whether the shipped table is still what prediction says; choosing anew would compile every candidate."""
    from cflow_fast.bench.tune_predicted import outdated  # which compiles with this module
    from cflow_fast.kernels.tuning import shipped_table

    table = shipped_table(CAPABILITIES[90])
    if table is None:
        return "no tuning table is shipped for sm_90"
    card = next(card for card in CARDS if card.name == table.facts.get("predicted_for", CARDS[0].name))
    count, of = outdated(table, _targets(lines), found, card)
    words = f"{count} of {of} shipped choices are predicted otherwise than the table says"
    return words + (f"; `cflow-fast tune --predict {card.name}` chooses anew" if count else "")


def _kernel_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="compiled kernels", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("kernel", overflow="fold")
    for heading in ("sm", "registers", "KiB", "spills", "in loops", "instructions", "in loops", "hgmma"):
        table.add_column(heading, justify="right")
    table.add_column("faults", overflow="fold")
    for row in rows:
        loops = row.get("loops", ())
        numbers: list[object] = ["", "", "", "", "", "", ""]
        if "registers" in row:
            numbers = [row["registers"], -(-row["shared"] // 1024), row["spills"], sum(x["spills"] for x in loops)]
            numbers += [row["instructions"], sum(x["instructions"] for x in loops), sum(x["hgmma"] for x in loops)]
        table.add_row(row["kernel"], str(row["capability"]), *map(str, numbers), "; ".join(row["faults"]))
    return table


def _prediction_table(entries: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="predicted, not measured", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("decoders")
    for heading in ("card", "us", "images/s", "us each, bound by"):
        table.add_column(heading, justify="right")
    for entry in entries:
        each = ", ".join(f"{d}: {c['microseconds']:.0f} {c['longest']['bound']}" for d, c in entry["each"].items())
        table.add_row(
            entry["decoders"], entry["card"], f"{entry['microseconds']:.0f}", f"{entry['images_per_second']}", each
        )
    return table


if __name__ == "__main__":
    main()
