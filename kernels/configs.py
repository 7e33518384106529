"""Tile shapes of every kernel, chosen by shape, precision and architecture. Nothing else in `kernels` fixes a number.

A configuration is a frozen dataclass; a `select_*` function is the rule that returns the one to launch with.
`candidates` are all that may be launched with instead; `tuning` has the tables of those that turned out faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import cdiv, early_option, power_of_two

TAIL_WARPS = 4 * 132
"""Warps that a card of Hopper's size needs before any of them is worth making longer."""

# Anomaly map.


@dataclass(frozen=True)
class TailConfig:
    """A strip of the map is `rows` by `columns`; its source rows are fetched anew for every strip."""

    rows: int
    columns: int
    warps: int
    block: int = 1024  # elements a program of the published normalisation's extra launches takes at a time
    block_warps: int = 4
    peak_programs: int = 64


def select_tail(scales: int, batch: int, height: int, width: int) -> TailConfig:
    """The tallest strips that still give every multiprocessor's four schedulers a warp.

    A thread has four columns of up to four scales, two of more: registers hold two source rows of every scale.
    """
    columns = min(128, max(32, power_of_two(width)))
    warps = 1 if scales <= 4 else max(1, columns // 64)
    strips = batch * cdiv(width, columns) * warps
    rows = next((rows for rows in (32, 16, 8) if strips * cdiv(height, rows) >= TAIL_WARPS), 4)
    return TailConfig(rows, columns, warps)


# Matrix products of wide decoders.

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB that a program may take, by compute capability; 99 where it is not listed."""


@dataclass(frozen=True)
class ProductConfig:
    """A tile of a persistent matrix product, and how its programs share the work.

    block_out: columns of the result; of s and of t each for a coupling layer. block_k: a divisor of the inputs.
    split_k: programs that share one tile's inputs. group: row tiles that pass all outputs together.
    programs: per multiprocessor; two of them overlap one's epilogue with the other's products.
    """

    block_rows: int
    block_out: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    group: int = 8
    programs: int = 1

    def constexprs(self) -> dict[str, int]:
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_OUT": self.block_out,
            "BLOCK_K": self.block_k,
            "SPLIT_K": self.split_k,
            "GROUP": self.group,
        }

    def options(self, early: bool = False) -> dict[str, int | bool]:
        options: dict[str, int | bool] = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options | early_option(early)


class LinearConfig(ProductConfig):
    """Of kernels/linear.py."""


class CouplingConfig(ProductConfig):
    """Of kernels/coupling.py."""


@dataclass(frozen=True)
class ReductionConfig:
    """Of kernels/reduction.py: tiles and rows that a program takes at a time."""

    block_tiles: int
    block_rows: int
    warps: int = 4


def select_reduction(rows: int) -> ReductionConfig:
    """Of few rows a program asks for many tiles at once: 288 of them, 16 at a time, took an H200 5 us, nearly all of it
    waiting (bench/results/nvidia-h200/kernels.json, one image at D = 1024 and 2048).
    """
    return ReductionConfig(128, 16, 8) if rows <= 2048 else ReductionConfig(16, 64)


@dataclass(frozen=True)
class PointwiseConfig:
    """Of kernels/pointwise.py: a tile of features by consecutive rows."""

    block_features: int
    block_rows: int
    warps: int


POINTWISE = PointwiseConfig(16, 128, 4)
"""Sixteen numbers a thread and array, read in whole lines of memory."""


@dataclass(frozen=True)
class PackingConfig:
    """Of kernels/packing.py: a tile of rows by features."""

    block_rows: int = 64
    block_features: int = 64
    warps: int = 4


@dataclass(frozen=True)
class ScalingConfig:
    """Of kernels/scaling.py: a tile of rows by features."""

    block_rows: int
    block_features: int
    warps: int = 8


def select_scaling(width: int) -> ScalingConfig:
    """Whole rows at once, unless they are very long; 32 numbers a thread."""
    block_features = min(4096, max(128, power_of_two(width)))
    return ScalingConfig(8192 // block_features, block_features)


@dataclass(frozen=True)
class LayingConfig:
    """Whether hard permutations lay x1 down row by row, in a launch of its own, for the product that takes it."""

    row_by_row: bool


def select_laying(rows: int, half: int, precision: str) -> LayingConfig:
    """Matrix units take factors of tf32 row by row alone. Read by index, where features lie one after another, such a
    product took 1.3 to 4.3 times as long on an H200 as the same one of rows (bench/results/nvidia-h200, WideResNet-50).
    In bf16, with 32 images at D = 512, 1024 and 2048, it took longer by 6, 4.5 and 7.4 us; a launch that lays x1 down
    is expected to take about 9, 4 and 3.
    """
    return LayingConfig(precision == "tf32" or (precision == "bf16" and half >= 1024 and rows >= 1024))


@dataclass(frozen=True)
class MergingConfig:
    """Whether a soft permutation and the next block's first layer are one product (`merging`)."""

    in_one: bool


MOST_MERGED_ROWS, MOST_MERGED = 4096, 8e8
"""Rows, and multiply-adds that one such product may have more than a matrix and a first layer, for 132 multiprocessors:
two of their microseconds, about what is predicted to be gained (bench/prediction). For one image at 256 px it should
take 7.2, 8.2 and 9.6 us at D = 512, 1024 and 2048, the others 8.7, 9.1 and 12.2, or 10.6 and 13.2 with a rotation."""


def select_merging(rows: int, hidden: int, half: int, precision: str, chip: Chip) -> MergingConfig:
    """Predicted for Hopper cards alone."""
    share = chip.multiprocessors / 132
    few = rows <= share * MOST_MERGED_ROWS and rows * hidden * half <= share * MOST_MERGED
    return MergingConfig(few and precision == "bf16" and chip.capability[0] == 9)


Tile = tuple[int, int, int, int, int]
"""Rows, outputs, inputs a step, warps, stages; of a coupling layer the outputs are columns of s and of t together."""

_TILES: dict[tuple[str, bool], list[Tile]] = {
    ("bf16", True): [
        *((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4)),
        *((64, 32, 128, 4, 4), (64, 16, 128, 4, 6)),
    ],
    ("bf16", False): [(128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3)],
    ("tf32", True): [(128, 256, 32, 8, 3), (128, 128, 32, 8, 3), (64, 64, 32, 4, 4)],
    ("tf32", False): [(128, 128, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("tf32x3", True): [(128, 128, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("tf32x3", False): [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("fp16", True): [
        *((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 4)),
        *((64, 32, 128, 4, 4), (64, 16, 128, 4, 4)),
    ],
    ("fp16", False): [(128, 128, 64, 8, 2), (64, 64, 64, 4, 3)],
    ("fp16x3", True): [(128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4), (64, 32, 32, 4, 6)],
    ("fp16x3", False): [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3)],
    ("ieee", True): [(128, 128, 16, 8, 2), (64, 64, 16, 4, 3)],
    ("ieee", False): [(128, 128, 16, 8, 2), (64, 64, 16, 4, 3)],
}
"""From large to small, by precision and by whether a program may take over 200 KiB, as on the cards with wgmma. Where
sums are added up part by part, a step is 32 inputs: `phase_weights.CUT_OFF` is what such a part loses."""

MAX_SPLITS = 4
"""Sums of more splits cost more traffic than they save time."""
LEAST_SPLIT = 16
"""Steps of a product that is split: until the sums of fewer have come together (bench/prediction) it would be done."""

LEAST_OF_BOTH = 32
"""Columns of s and of t together: Triton 3.6 multiplies fewer than 16 of either without wgmma."""

BUSY = 0.45
"""Share of the multiprocessors that must have a tile before a larger one, with less traffic from L2, is preferred."""


EARLY_ROWS = 2048
"""Launches for up to so many rows begin before those that they wait for have ended (see `tiles`). Of more rows there is
no room for two launches at once, and what waits would keep another decoder's programs out."""


def begins_early(rows: int, chip: Chip) -> bool:
    return rows <= EARLY_ROWS and chip.capability >= (9, 0)


def select_linear(
    rows: int, inputs: int, outputs: int, precision: str, chip: Chip, second: bool = False
) -> LinearConfig:
    """second: an epilogue or sums with a second tile, which leaves no registers for the widest one."""
    tiles = [tile for tile in _tiles(precision, chip) if tile[1] <= (128 if second else 256)]
    tile, split_k = _select(tiles, rows, inputs, outputs, chip)
    return LinearConfig(*tile, split_k, programs=_programs(tile))


def select_coupling(rows: int, inputs: int, half: int, precision: str, chip: Chip) -> CouplingConfig:
    tiles = [tile for tile in _tiles(precision, chip) if tile[1] >= LEAST_OF_BOTH]
    tile, split_k = _select(tiles, rows, inputs, 2 * half, chip)
    block_rows, block_out, block_k, warps, stages = tile
    return CouplingConfig(block_rows, block_out // 2, block_k, warps, stages, split_k, programs=_programs(tile))


def _tiles(precision: str, chip: Chip) -> list[Tile]:
    return _TILES[precision, SHARED_MEMORY.get(chip.capability, 99) > 200]


def _select(tiles: list[Tile], rows: int, inputs: int, outputs: int, chip: Chip) -> tuple[Tile, int]:
    """The largest tile that keeps the card busy; where none does, the smallest, its inputs split if they are many."""
    tiles = [tile for tile in tiles if inputs % tile[2] == 0]

    def count(tile: Tile) -> int:
        return cdiv(rows, tile[0]) * cdiv(outputs, tile[1])

    tile = next((tile for tile in tiles if count(tile) >= BUSY * chip.multiprocessors), tiles[-1])
    if tile != tiles[-1]:
        return tile, 1
    steps = cdiv(inputs, tile[2])
    if steps < LEAST_SPLIT:
        return tile, 1
    splits = min(MAX_SPLITS, steps, max(1, round(0.75 * chip.multiprocessors / count(tile))))
    return tile, cdiv(steps, cdiv(steps, splits))


def _programs(tile: Tile) -> int:
    """How many share a multiprocessor: as many as there is room for sums in registers, one of the large tiles."""
    return max(1, 128 * 128 // (tile[0] * tile[1]))


# Whole decoders of few features.


@dataclass(frozen=True)
class WholeFlowConfig:
    """Of kernels/whole_flow.py: rows a program carries through all blocks, hidden units it makes at a time.

    own_condition: whether the registers also hold what loose rows with a condition each need.
    hard: whether for hard permutations alone, where soft ones need more registers.
    """

    block_rows: int
    block_hidden: int
    warps: int
    stages: int
    own_condition: bool = True
    hard: bool = False


ENOUGH_PROGRAMS = 96
"""Smaller tiles are taken until there are so many: most multiprocessors have one, and weights are read no oftener."""

_WholeFlowTiles = dict[int, tuple[WholeFlowConfig, ...]]
"""Width of a decoder's half that a tuple serves at most, to configurations by falling rows."""

# The state (a half twice) and the sums of s and t fill the registers: rows x half decides what fits, and nothing here
# spills inside the chunk loop. Weights come from L2 once per program, and 128 rows in bf16 ask for about what L2 gives
# at the full matrix rate, 64 for twice that. At 128 rows 4 warps leave room for two programs a multiprocessor, one's
# epilogue beside the other's products, up to halves of 32; above, 8 warps and one program. Halves over 96 leave room
# for 64 rows with hard permutations alone: with soft ones a few launches a block are predicted to be faster. 16 rows
# use warp-level instructions: for few rows only. fp32 operands double the state and the bytes, so that tf32 has 64
# rows, and soft permutations, which it multiplies by twice, only in halves of up to 64; without matrix units a thread's
# own products take what is left. tf32x3 would need every matrix twice.
_WHOLE_FLOW_HOPPER: dict[str, _WholeFlowTiles] = {
    "bf16": {
        32: (WholeFlowConfig(128, 32, 4, 2), WholeFlowConfig(64, 32, 4, 2), WholeFlowConfig(16, 64, 4, 2)),
        64: (
            WholeFlowConfig(128, 32, 8, 2, own_condition=False),
            WholeFlowConfig(64, 32, 4, 2),
            WholeFlowConfig(16, 64, 4, 2),
        ),
        96: (
            WholeFlowConfig(128, 32, 8, 2),
            WholeFlowConfig(64, 32, 4, 2, own_condition=False),
            WholeFlowConfig(16, 32, 4, 2),
        ),
        128: (WholeFlowConfig(64, 32, 8, 2, hard=True), WholeFlowConfig(16, 32, 4, 2, hard=True)),
    },
    "tf32": {
        32: (WholeFlowConfig(64, 32, 4, 2), WholeFlowConfig(16, 32, 4, 2)),
        64: (WholeFlowConfig(64, 16, 4, 2, own_condition=False), WholeFlowConfig(32, 32, 4, 2)),
        96: (WholeFlowConfig(64, 32, 8, 2, own_condition=False, hard=True),),
    },
    "ieee": {32: (WholeFlowConfig(32, 16, 4, 1), WholeFlowConfig(16, 32, 4, 1))},
}
# Results of matrix instructions are spread over fewer threads there: half the rows.
_WHOLE_FLOW_AMPERE: dict[str, _WholeFlowTiles] = {
    "bf16": {
        64: (WholeFlowConfig(64, 32, 4, 2), WholeFlowConfig(32, 32, 4, 2), WholeFlowConfig(16, 32, 4, 2)),
        96: (WholeFlowConfig(64, 32, 8, 2, hard=True), WholeFlowConfig(16, 32, 4, 2)),
        128: (WholeFlowConfig(32, 32, 8, 2), WholeFlowConfig(16, 32, 4, 2)),
    },
    "tf32": {64: (WholeFlowConfig(32, 32, 4, 2), WholeFlowConfig(16, 32, 4, 2))},
    "ieee": _WHOLE_FLOW_HOPPER["ieee"],
}


MOST_ROWS_WITHOUT_MATRIX_UNITS = 4096
"""In fp32 more rows are left to the library's products: at D = 40 an H200 takes twice as long for 32,768 whole in one
kernel, and less for 1,024."""


def select_whole_flow(
    capability: tuple[int, int],
    features: int,
    rows: int,
    precision: str,
    own_condition: bool = False,
    hard: bool = False,
) -> WholeFlowConfig | None:
    """The tallest tile that gives most multiprocessors a program; None where the state does not fit the registers."""
    configs = _whole_flow_tiles(capability, features, precision, own_condition, hard)
    fewest = configs[-1] if configs else None
    return next((c for c in configs if rows >= ENOUGH_PROGRAMS * c.block_rows), fewest)


def _whole_flow_tiles(
    capability: tuple[int, int], features: int, precision: str, own_condition: bool, hard: bool
) -> list[WholeFlowConfig]:
    half = features - features // 2
    tiles = (_WHOLE_FLOW_HOPPER if capability[0] == 9 else _WHOLE_FLOW_AMPERE).get(precision, {})
    widest = min((width for width in tiles if width >= half), default=0)
    return [c for c in tiles.get(widest, ()) if (c.own_condition or not own_condition) and (hard or not c.hard)]


# What may be chosen from where it is predicted or measured.

Config = LinearConfig | CouplingConfig | LayingConfig | MergingConfig | WholeFlowConfig | TailConfig


class Problem(NamedTuple):
    """What a configuration is chosen by. `numbers` are those that NUMBERS names, flags as 0 and 1."""

    kernel: str
    precision: str
    rows: int  # images of a tail
    numbers: tuple[int, ...]


NUMBERS = {
    "linear": ("inputs", "outputs", "second"),
    "coupling": ("inputs", "half"),
    "laying": ("half",),
    "merging": ("inputs", "half"),
    "whole_flow": ("features", "own_condition", "hard"),
    "tail": ("scales", "height", "width"),
}
TAIL_PRECISION = "fp32"

_MORE_TILES: dict[tuple[str, bool], list[Tile]] = {
    ("bf16", True): [
        *((128, 256, 64, 8, 4), (64, 256, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 64, 4, 4)),
        *((64, 64, 128, 4, 3), (64, 64, 128, 4, 5), (64, 32, 128, 4, 6), (64, 16, 128, 4, 4), (32, 64, 128, 4, 3)),
    ],
    ("tf32", True): [(128, 64, 32, 4, 4), (64, 128, 32, 4, 4)],
    ("tf32x3", True): [(128, 64, 32, 4, 3), (64, 128, 32, 4, 3)],
    ("fp16", True): [(64, 256, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 128, 4, 3)],
    ("fp16x3", True): [(128, 128, 32, 8, 5), (64, 128, 32, 4, 4), (64, 64, 32, 4, 6), (64, 32, 32, 4, 8)],
    ("ieee", True): [(128, 64, 16, 8, 3)],
}
"""Beside _TILES: what no rule takes."""


def rule(problem: Problem, chip: Chip) -> Config | None:
    """What is launched where no table says otherwise."""
    rows, numbers, precision = problem.rows, problem.numbers, problem.precision
    match problem.kernel:
        case "linear":
            inputs, outputs, second = numbers
            return select_linear(rows, inputs, outputs, precision, chip, bool(second))
        case "coupling":
            inputs, half = numbers
            return select_coupling(rows, inputs, half, precision, chip)
        case "laying":
            (half,) = numbers
            return select_laying(rows, half, precision)
        case "merging":
            hidden, half = numbers
            return select_merging(rows, hidden, half, precision, chip)
        case "whole_flow":
            features, own_condition, hard = numbers
            return select_whole_flow(chip.capability, features, rows, precision, bool(own_condition), bool(hard))
        case "tail":
            scales, height, width = numbers
            return select_tail(scales, rows, height, width)
    raise ValueError(f"kernel is one of {', '.join(NUMBERS)}, got {problem.kernel!r}")


def candidates(problem: Problem, chip: Chip) -> list[Config]:
    """Every configuration that a table may name for a problem: the rule's first, each once, all fit the chip."""
    first = rule(problem, chip)
    if first is None:
        return []
    rows, numbers, precision = problem.rows, problem.numbers, problem.precision
    found: list[Config] = [first]
    match problem.kernel:
        case "linear":
            inputs, outputs, second = numbers
            for tile, split_k, programs in _product_candidates(rows, inputs, outputs, precision, chip):
                if tile[1] <= (128 if second else 256):
                    found.append(LinearConfig(*tile, split_k, programs=programs))
        case "coupling":
            inputs, half = numbers
            for tile, split_k, programs in _product_candidates(rows, inputs, 2 * half, precision, chip):
                block_rows, block_out, block_k, warps, stages = tile
                if block_out < LEAST_OF_BOTH:
                    continue
                config = CouplingConfig(block_rows, block_out // 2, block_k, warps, stages, split_k, programs=programs)
                found.append(config)
        case "laying":
            found += [LayingConfig(row_by_row) for row_by_row in (False, True) if precision == "bf16"]
        case "merging":
            found += [MergingConfig(in_one) for in_one in (False, True) if precision == "bf16"]
        case "whole_flow":
            features, own_condition, hard = numbers
            found += _whole_flow_tiles(chip.capability, features, precision, bool(own_condition), bool(hard))
        case "tail":
            assert isinstance(first, TailConfig)
            for height in (4, 8, 16, 32):
                for warps in (1, 2, 4):
                    if 32 * warps <= first.columns:
                        found.append(TailConfig(height, first.columns, warps))
    return list(dict.fromkeys(found))


def _product_candidates(
    rows: int, inputs: int, outputs: int, precision: str, chip: Chip
) -> Iterator[tuple[Tile, int, int]]:
    """Tiles with splits of their inputs and programs per multiprocessor."""
    limit = 1024 * SHARED_MEMORY.get(chip.capability, 99)
    more = _MORE_TILES.get((precision, limit > 200 * 1024), [])
    for tile in _tiles(precision, chip) + more:
        shared = _shared_bytes(tile, precision)
        if shared > limit or inputs % tile[2] or (tile[0] > 64 and tile[0] >= 2 * rows):
            continue
        tiles = cdiv(rows, tile[0]) * cdiv(outputs, tile[1])
        programs = {_programs(tile)}
        if tile[0] * tile[1] <= 128 * 128 and 2 * shared <= limit:
            programs.add(2)
        for split_k in range(1, MAX_SPLITS + 1):
            if split_k == 1 or (tiles * split_k <= 2 * chip.multiprocessors and _no_idle(inputs, tile, split_k)):
                yield from ((tile, split_k, count) for count in sorted(programs))


OPERAND_BYTES = {"bf16": (2, 2), "fp16": (4, 2), "fp16x3": (4, 4), "tf32x3": (4, 8)}
"""Of an element of a factor and of one of the weights where it is not 4 of both, in as many parts as are taken at
most."""


def _no_idle(inputs: int, tile: Tile, split_k: int) -> bool:
    """Whether every split has a share of the inputs."""
    steps = cdiv(inputs, tile[2])
    return cdiv(steps, cdiv(steps, split_k)) == split_k


def _shared_bytes(tile: Tile, precision: str) -> int:
    """Of the operands that are on their way."""
    block_rows, block_out, block_k, _, stages = tile
    x, w = OPERAND_BYTES.get(precision, (4, 4))
    return (x * block_rows + w * block_out) * block_k * stages
