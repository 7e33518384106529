"""How long a kernel should take on a card, counted: what stands in a table until it can be measured.

Every launch is counted from its shapes, its tiles and its machine code:

    matrix   operations of all tiles, padding included, at the card's matrix rate
    issue    instructions of all warps, four a cycle and multiprocessor
    L2       bytes that tiles pull and push, at the rate of the L2 cache, of which one multiprocessor takes no more
             than its own
    latency  of a product's steps: so many are on their way as the pipeline has stages, less one
    memory   weights once, and activations where they do not fit the L2 cache

A unit (a tile, or a split of one) takes the longest of its matrix, issue and L2 times in its loop, and its epilogue
after it: that overlaps with another program's loop only where two programs share a multiprocessor. Units are dealt
out to multiprocessors in waves, none faster than its steps' latency, and a launch takes at least what its bytes take
from memory; and before that, until its programs have what they begin with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cflow_fast.bench.compiled import Compiled
from cflow_fast.kernels.launch import Launch

WARP_SLOTS, REGISTERS, SHARED_BYTES, RESERVED_SHARED = 64, 65536, 228 * 1024, 1024
"""Of one multiprocessor of a Hopper card."""


@dataclass(frozen=True)
class Card:
    """Rates of one card."""

    name: str
    multiprocessors: int
    hertz: float
    matrix: dict[str, float]  # FLOP/s by kernel precision
    memory: float  # bytes/s
    l2: float  # bytes/s
    l2_each: float  # bytes/s of one multiprocessor
    l2_bytes: float
    launch_seconds: float  # from one kernel of a captured graph to the next
    early_seconds: float  # the same of a launch that begins early
    start_seconds: float  # of a product, until its first operands are there
    latency_seconds: float  # of a step's operands, from the asking
    split_seconds: float  # until the last of a tile's splits has the others' sums


def _hopper(name: str, bf16: float, memory: float) -> Card:
    tf32 = 391e12
    return Card(
        *(name, 132, 1.755e9),
        matrix={"bf16": bf16, "fp16": bf16, "fp16x3": bf16 / 3, "tf32": tf32, "tf32x3": tf32 / 3, "ieee": 51e12},
        memory=memory,
        l2=7.5e12,
        l2_each=70e9,
        l2_bytes=50e6,
        launch_seconds=1.0e-6,
        early_seconds=0.5e-6,
        start_seconds=1.0e-6,
        latency_seconds=1.1e-6,
        split_seconds=2.0e-6,
    )


CARDS = (_hopper("H100", 798e12, 3.0e12), _hopper("H200", 790e12, 4.3e12))
"""The rates of bf16 products and of memory are the best that were measured on such cards, those of tf32, fp32, L2 and
between launches an H100's, fp16's are taken to be bf16's, and the clock is the maker's. What one multiprocessor takes
of the L2 cache, starts, latency and splits are what 531 bf16 launches on an H100 fit best, see `against_measured`:
none of an H200 was timed."""


@dataclass(frozen=True)
class Work:
    """One launch, counted."""

    flop: float  # that the result needs
    matrix_flop: float  # that the tiles make
    units: int
    steps: int  # of a unit's loop
    step_bytes: float  # through L2, of one step of one unit
    repeats: int  # of a unit's code outside its loops
    unit_bytes: float  # through L2, beside the loop
    memory_bytes: float


@dataclass(frozen=True)
class Prediction:
    """Seconds that a launch should take, and what bounds it."""

    seconds: float
    bound: str
    work: Work
    resident: int  # programs that share a multiprocessor
    waves: float
    matrix_seconds: float
    issue_seconds: float
    l2_seconds: float
    memory_seconds: float

    @property
    def busy_seconds(self) -> float:
        """Of all multiprocessors together, were every one of them kept at work."""
        return max(self.matrix_seconds, self.issue_seconds, self.l2_seconds, self.memory_seconds)


def predict(launch: Launch, compiled: Compiled, card: Card, cold_weights: bool = True) -> Prediction:
    """cold_weights: they come from memory; otherwise they are still in the L2 cache."""
    work = _COUNTED[launch.kernel.__name__](launch, card, cold_weights)
    precision = launch.constexprs.get("PRECISION", "ieee")
    warps = launch.options["num_warps"]
    launched = math.ceil(math.prod(launch.grid) / card.multiprocessors)  # a persistent kernel's grid may be one each
    resident = max(1, min(residents(compiled, warps), launched))
    share = 1 / card.multiprocessors  # what one multiprocessor has of a rate

    loop = sum(part.instructions for part in compiled.loops)
    rate = 4 * card.hertz / warps  # instructions of one program's code a second, alone on a multiprocessor
    pulled = min(card.l2_each, card.l2 / min(work.units, card.multiprocessors))
    matrix = work.matrix_flop / work.units / (card.matrix[precision] * share)
    issue = work.steps * loop / rate
    epilogue = work.repeats * (compiled.instructions - loop) / rate + work.unit_bytes / pulled
    l2 = work.steps * work.step_bytes / pulled
    unit = max(matrix, issue, l2) + (0.0 if resident > 1 else epilogue)
    unit = max(unit, issue + epilogue)
    late = _late_seconds(launch, work, card) + epilogue

    waves = work.units / (card.multiprocessors * resident)
    full = math.ceil(waves) * resident if work.units > card.multiprocessors else 1
    memory = work.memory_bytes / card.memory
    times = {"memory": memory, "latency": math.ceil(waves) * late, "work": full * unit}
    bound = max(times, key=lambda name: times[name])
    if bound == "work":
        parts = {"matrix": matrix, "issue": issue + epilogue, "L2": l2}
        bound = max(parts, key=lambda name: parts[name])
    whole = work.units / card.multiprocessors
    return Prediction(
        seconds=max(times.values()) + _outside_seconds(launch, card),
        bound=bound,
        work=work,
        resident=resident,
        waves=waves,
        matrix_seconds=whole * matrix,
        issue_seconds=whole * (issue + epilogue),
        l2_seconds=work.units * work.steps * work.step_bytes / card.l2,
        memory_seconds=memory,
    )


def predict_at_least(launch: Launch, card: Card, cold_weights: bool = True) -> float:
    """Seconds that no machine code for a launch could be predicted under: its instructions cost nothing."""
    work = _COUNTED[launch.kernel.__name__](launch, card, cold_weights)
    precision = launch.constexprs.get("PRECISION", "ieee")
    units = max(work.units, card.multiprocessors)
    matrix = units * work.matrix_flop / work.units / card.matrix[precision]
    l2 = work.steps * work.step_bytes * max(work.units / card.l2, 1 / card.l2_each)
    least = max(matrix, l2, work.memory_bytes / card.memory, _late_seconds(launch, work, card))
    return least + _outside_seconds(launch, card)


def l2_bytes(launch: Launch, card: Card) -> float:
    """What a launch moves through the L2 cache, as it is counted for a prediction."""
    work = _COUNTED[launch.kernel.__name__](launch, card, True)
    return work.units * (work.steps * work.step_bytes + work.unit_bytes)


def predict_together(decoders: Sequence[Sequence[Prediction]], card: Card) -> float:
    """Seconds of several decoders side by side: the longest chain of launches, or all their work on the whole card."""
    chains = [sum(p.seconds for p in chain) for chain in decoders]
    resources = ("matrix_seconds", "issue_seconds", "l2_seconds", "memory_seconds")
    everything = [p for chain in decoders for p in chain]
    shared = max(sum(getattr(p, name) for p in everything) for name in resources)
    return max(*chains, shared)


def _late_seconds(launch: Launch, work: Work, card: Card) -> float:
    """The least that a unit of a product waits for its operands."""
    if "SPLIT_K" not in launch.constexprs:
        return 0.0
    return work.steps * card.latency_seconds / max(1, launch.options["num_stages"] - 1)


def _outside_seconds(launch: Launch, card: Card) -> float:
    """Before a launch's work, and where splits wait for each other."""
    c = launch.constexprs
    seconds = card.early_seconds if c.get("EARLY") else card.launch_seconds
    if "SPLIT_K" in c:
        seconds += card.start_seconds + (card.split_seconds if c["SPLIT_K"] > 1 else 0.0)
    return seconds


def residents(compiled: Compiled, warps: int) -> int:
    """Programs that fit one multiprocessor by registers, shared memory and warps; at least one is launched."""
    by_registers = REGISTERS // (math.ceil(compiled.registers / 8) * 8 * 32 * warps)
    by_shared = SHARED_BYTES // (compiled.shared + RESERVED_SHARED)
    return max(1, min(by_registers, by_shared, WARP_SLOTS // warps))


def _product_work(launch: Launch, card: Card, cold: bool, columns: int, outputs: int) -> Work:
    """A persistent product: columns of the weight matrix per tile, and in all.

    A factor that is taken as two operands is multiplied twice; three times beside weights in two parts, which the rates
    of tf32x3 and fp16x3 tell.
    """
    args, c = launch.args, launch.constexprs
    parts = 1 if args["w_low_ptr"] is None else 2
    products = 2 if c["TAKES"] in ("split", "parts") and parts == 1 else 1
    read = 2 if c["TAKES"] == "parts" else 1  # a factor's parts, where they lie in memory
    rows, inputs, splits = args["rows"], args["inputs"], c["SPLIT_K"]
    tiles = _ceil(rows, c["BLOCK_ROWS"]) * _ceil(outputs, columns)
    steps = _ceil(_ceil(inputs, c["BLOCK_K"]), splits)
    operand = args["w_ptr"].element_size()
    tile_elements = c["BLOCK_ROWS"] * columns
    stored = tile_elements * operand * read + (2 * 4 * tile_elements if splits > 1 else 0)
    activations = rows * (inputs + outputs) * operand * read
    memory = (parts * outputs * inputs * operand if cold else 0) + (activations if activations > card.l2_bytes else 0)
    return Work(
        flop=2.0 * rows * inputs * outputs,
        matrix_flop=2.0 * products * tiles * splits * steps * tile_elements * c["BLOCK_K"],
        units=tiles * splits,
        steps=steps,
        step_bytes=(read * c["BLOCK_ROWS"] + parts * columns) * c["BLOCK_K"] * operand,
        repeats=1,
        unit_bytes=stored,
        memory_bytes=memory,
    )


def _linear(launch: Launch, card: Card, cold: bool) -> Work:
    return _product_work(launch, card, cold, launch.constexprs["BLOCK_OUT"], launch.args["outputs"])


def _coupling(launch: Launch, card: Card, cold: bool) -> Work:
    return _product_work(launch, card, cold, 2 * launch.constexprs["BLOCK_OUT"], 2 * launch.args["half"])


def _whole_flow(launch: Launch, card: Card, cold: bool) -> Work:
    args, c = launch.args, launch.constexprs
    rows = args["images"] * args["height"] * args["width"]
    half, hidden, blocks = c["MAIN"] + c["SIDE"], c["HIDDEN"], c["BLOCKS"]
    mixing = 0 if c["HARD"] else c["MATRICES"] * 4 * half * half + (blocks - c["MATRICES"]) * 3 * half * half
    selected = {"tables": c["ENTRIES"], "rows": c["CHANNELS"], "none": 0}[c["CONDITION"]]
    conditional = blocks * hidden * selected
    per_row = blocks * 3 * half * hidden + (2 if c["PRECISION"] == "tf32" else 1) * mixing + conditional
    features = c["PASSIVE"] + c["ACTIVE"]
    needed = blocks * hidden * (c["PASSIVE"] + 2 * c["ACTIVE"])
    (programs,) = launch.grid
    weights = sum(_bytes(value) for name, value in args.items() if name not in ("features_ptr", "scratch_ptr"))
    steps = blocks * _ceil(hidden, c["BLOCK_HIDDEN"])
    own = c["BLOCK_ROWS"] * (features * args["features_ptr"].element_size() + 4)
    return Work(
        flop=2.0 * rows * (needed + mixing),
        matrix_flop=2.0 * programs * c["BLOCK_ROWS"] * per_row,
        units=programs,
        steps=steps,
        step_bytes=weights / steps,
        repeats=blocks,
        unit_bytes=own,
        memory_bytes=programs * own + (weights if cold else 0),
    )


def _streaming(launch: Launch, card: Card, cold: bool) -> Work:
    """No products: every argument is read or written once, and of what has an index only that."""
    args = launch.args
    moved = sum(map(_bytes, args.values()))
    for x, index in INDEXED:
        if args.get(f"{index}_ptr") is not None:
            source = args[f"{x}_ptr"]
            moved += args["rows"] * args[f"{x}_features"] * source.element_size() - _bytes(source)
    units = math.prod(launch.grid)
    memory = moved if moved > card.l2_bytes else 0.0
    return Work(0.0, 0.0, units, steps=1, step_bytes=0.0, repeats=1, unit_bytes=moved / units, memory_bytes=memory)


INDEXED = (("x", "index"), ("x1", "x1_index"), ("y1", "y1_index"))
"""What kernels without products read or write by index, and its index."""

_COUNTED = {
    "linear_kernel": _linear,
    "coupling_kernel": _coupling,
    "whole_flow_kernel": _whole_flow,
    "packing_kernel": _streaming,
    "scaling_kernel": _streaming,
    "reduction_kernel": _streaming,
    "tail_kernel": _streaming,
}


def _bytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
