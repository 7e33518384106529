"""What `make gpu` is going to launch, about in the order of its steps and without a card: to be compiled beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cflow_fast import parity
from cflow_fast.bench.headline import TIMED_ALONE, Headline, decoder_launches, headlines, rows_launches, tail_launches
from cflow_fast.bench.specimens import META, specimen_weights
from cflow_fast.bench.tune_targets import candidate_launches, targets
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.pointwise import coupled_launch, rotated_launch
from cflow_fast.kernels.registration import most_at_once
from cflow_fast.kernels.triton_flow import CHUNK_ROWS
from cflow_fast.ops import KERNEL_PRECISIONS

FIRST_SIZES = (64, 512)
"""Of the decoders that are compared with float64 before anything else: one that runs whole in a kernel, one that does
not."""
NARROW_SIZES, WIDE_SIZES = (41, 112, 160, 320), (1024, 2048)
"""The rest of `parity.SIZES`, in two parts that are compared side by side."""
TUNED = (("wide_resnet50_2",), ("bf16",), (256,), (1, 8, 32))
"""What the suite tunes: encoders, precisions, sizes, batches."""
CONDITION = 128
WIDE, NARROW = ("wide_resnet50_2",), ("resnet18", "mobilenetv3_large_100")
SMALL_FEATURES, SMALL_BLOCKS, SMALL_ROWS = (41, 64, 160, 320), 2, 5
SMALL_PRECISIONS = ("fp32", "tf32x3", "fp16x3", "tf32", "fp16", "bf16")
SMALL_MAPS = ((1, 7, 8), (2, 16, 17))
"""Decoders of every kind for a memory checker, on maps (B, H, W) that end inside a tile and on loose rows."""
TESTED_BLOCKS = 4
TESTED = (((41, 64, 160, 512), ((1, 8), (4, 32))), ((2048,), ((1, 8), (8, 8), (32, 8))))
"""Features, and batches and sides of maps, of decoders that tests on a card ask for the same bits again and again."""
BLOCK_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))
"""Of the plain path between its products: what a product gave, and the state."""


def planned_launches(chip: Chip) -> Iterator[Launch]:
    """Features are in fp32 as the benchmark's cases have them, and as encoders give them."""
    yield from _parity((*FIRST_SIZES, *NARROW_SIZES, *WIDE_SIZES), chip)
    yield from _small(chip)
    yield from _tested(chip)
    yield from _decoders(WIDE, 256, (1, 8, 32), chip)
    for size in (256, 512):
        yield from tail_launches(size, (1, 32), (3,))
    for line in headlines(WIDE, TIMED_ALONE, (256,), (1, 32)):  # one by one, on maps as encoders give them
        yield from line.launches(chip)
    yield from _decoders(WIDE, 512, (1, 8), chip)
    yield from _decoders(NARROW, 256, (1, 32), chip)
    yield from _whole_models((*WIDE, "resnet18"), 256, (1, 32), chip)
    yield from _loose_rows(WIDE, 256, (1, 32), chip)
    yield from candidate_launches(targets(*TUNED), chip)  # which tuning compiles too, as far as there is time


def _decoders(encoders: tuple[str, ...], size: int, batches: tuple[int, ...], chip: Chip) -> Iterator[Launch]:
    """On maps (B, D, H, W) in fp32, by the kernels and by the plain path."""
    for line in headlines(encoders, sizes=(size,), batches=batches):
        yield from replace(line, channels_last=False).launches(chip)
        yield from _pointwise(line.features, line.batch * line.side**2)


def _parity(sizes: Sequence[int], chip: Chip) -> Iterator[Launch]:
    for features in sizes:
        with torch.device(META):
            maps = parity.random_case(features, device=META).features
        for permutations in ("hard", "soft"):
            for precision in parity.precisions(torch.device("cuda")):
                yield from _on(maps, permutations, KERNEL_PRECISIONS[precision], chip)
        yield from _pointwise(features, maps[:, 0].numel())


def _whole_models(encoders: tuple[str, ...], size: int, batches: tuple[int, ...], chip: Chip) -> Iterator[Launch]:
    """Their decoders, on what their encoders give; and in every precision on what the encoder gives in fp32, by which
    they are judged."""
    for line in headlines(encoders, ("bf16", "ieee"), (size,), batches):
        if line.permutations == "hard":
            yield from line.launches(chip)
            yield from _on(_maps(line), line.permutations, line.precision, chip)


def _loose_rows(encoders: tuple[str, ...], size: int, batches: tuple[int, ...], chip: Chip) -> Iterator[Launch]:
    """FrEIA's modules after one line: the same positions as feature vectors with a condition each, in bf16, and in the
    parts that graphs take."""
    for line in headlines(encoders, ("bf16",), (size,), batches):
        weights = specimen_weights(line.features, line.permutations == "soft", torch.bfloat16)
        rows = line.batch * line.side**2
        most = min(CHUNK_ROWS, most_at_once(line.features + CONDITION, loose=True))
        for count in dict.fromkeys((min(rows, most), rows % most or most)):
            yield from rows_launches(weights, _empty(count, line.features), _empty(count, CONDITION), "bf16", chip)


def _small(chip: Chip) -> Iterator[Launch]:
    for features in SMALL_FEATURES:
        z, condition = _empty(SMALL_ROWS, features), _empty(SMALL_ROWS, CONDITION)
        for soft in (False, True):
            for precision in map(KERNEL_PRECISIONS.__getitem__, SMALL_PRECISIONS):
                weights = specimen_weights(features, soft, _storage(precision), CONDITION, SMALL_BLOCKS)
                for batch, height, width in SMALL_MAPS:
                    yield from decoder_launches(weights, _empty(batch, features, height, width), precision, chip)
                yield from rows_launches(weights, z, condition, precision, chip)


def _tested(chip: Chip) -> Iterator[Launch]:
    for wanted, maps in TESTED:
        for features, soft, name in itertools.product(wanted, (False, True), SMALL_PRECISIONS):
            precision = KERNEL_PRECISIONS[name]
            weights = specimen_weights(features, soft, _storage(precision), CONDITION, TESTED_BLOCKS)
            for batch, side in maps:
                yield from decoder_launches(weights, _empty(batch, features, side, side), precision, chip)


def _maps(line: Headline) -> Tensor:
    maps = torch.empty(line.batch, line.features, line.side, line.side, device=META)
    return maps.contiguous(memory_format=torch.channels_last)


def _on(maps: Tensor, permutations: str, precision: str, chip: Chip) -> list[Launch]:
    weights = specimen_weights(maps.shape[1], permutations == "soft", _storage(precision))
    return decoder_launches(weights, maps, precision, chip)


def _storage(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _pointwise(features: int, rows: int) -> Iterator[Launch]:
    half = features // 2
    for given, kept in BLOCK_DTYPES:
        s_and_t, sums = _empty(2 * half, rows, dtype=given), _empty(half, rows)
        yield coupled_launch(s_and_t, _empty(half, rows, dtype=kept), 1.9, _empty(half, rows), sums)
        if given == kept:
            state, angle = _empty(half, rows, dtype=kept), _empty(half)
            yield rotated_launch(state, state, angle, angle, state, state)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)
