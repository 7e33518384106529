"""The launches that matter, without a card: every decoder size at the sizes of image and batch that people run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cflow_fast.bench.cases import BATCHES, ENCODERS, SIZES
from cflow_fast.bench.specimens import META, specimen_weights
from cflow_fast.kernels.anomaly_tail import plan_tail
from cflow_fast.kernels.chip import Chip
from cflow_fast.kernels.flow import FlowResult
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.merging import is_merged, merge
from cflow_fast.kernels.operands import in_one_kernel
from cflow_fast.kernels.phase_weights import PhaseWeights
from cflow_fast.kernels.phases import Phases
from cflow_fast.kernels.pointwise import coupled_launch, rotated_launch
from cflow_fast.kernels.rows import loose_rows, map_rows
from cflow_fast.kernels.torch_flow import PositionalTables
from cflow_fast.kernels.triton_flow import chunks
from cflow_fast.kernels.tuning import select_tail, select_whole_flow
from cflow_fast.kernels.weights import FlowWeights, HardMixing
from cflow_fast.kernels.whole_flow import map_launch, rows_launch
from cflow_fast.kernels.whole_flow_weights import WholeFlowWeights

PRECISIONS = ("bf16", "fp16", "tf32", "fp16x3", "tf32x3", "ieee")
TIMED_ALONE = ("bf16", "fp16", "fp16x3", "tf32", "ieee")
"""Precisions in which every launch is timed by itself."""


@dataclass(frozen=True)
class Headline:
    """One decoder of an encoder at one size of image and batch, in one precision."""

    encoder: str
    scale: int
    features: int
    permutations: str
    precision: str
    size: int
    batch: int
    activation: str = "relu"
    channels_last: bool = True  # as encoders give their maps, in bf16 beside bf16 decoders; else (B, D, H, W) in fp32

    @property
    def side(self) -> int:
        """Height and width of the feature map."""
        return ENCODERS[self.encoder].sides(self.size)[self.scale]

    @property
    def decoders(self) -> str:
        """The decoders that run beside this one have the same name."""
        return f"{self.encoder}, {self.permutations}, {self.precision}, {self.batch} x {self.size} px"

    def launches(self, chip: Chip) -> list[Launch]:
        """What runs on such a card, with tensors on the meta device."""
        storage = torch.bfloat16 if self.precision == "bf16" else torch.float32
        weights = specimen_weights(self.features, self.permutations == "soft", storage, activation=self.activation)
        features = _meta(self.batch, self.features, self.side, self.side)
        if self.channels_last:
            features = features.to(storage).contiguous(memory_format=torch.channels_last)
        return decoder_launches(weights, features, self.precision, chip)


def decoder_launches(weights: FlowWeights, features: Tensor, precision: str, chip: Chip) -> list[Launch]:
    """What a decoder of such weights launches for such maps (B, D, H, W); all of it may be on the meta device."""
    batch, _, height, width = features.shape
    tables = None
    if weights.condition:
        sides = (height, width)
        tables = PositionalTables(*(_meta(weights.blocks, n, weights.hidden, dtype=weights.w1.dtype) for n in sides))
    log_prob = _meta(batch, height, width)
    hard = isinstance(weights.mixing, HardMixing)
    whole_precision = in_one_kernel(precision)
    config = select_whole_flow(chip, weights.features, log_prob.numel(), whole_precision, hard=hard)
    if config is not None:
        whole = WholeFlowWeights.prepare(weights, whole_precision)
        return [map_launch(features, whole, None if tables is None else whole.tables(tables), log_prob, config)]
    prepared = _prepared_for(weights, precision, log_prob.numel(), chip)
    positions = None if tables is None else prepared.positions(tables)
    launches: list[Launch] = []
    for images, lines in chunks(batch, height, width):
        rows = map_rows(features[images, :, lines])
        one, two = (_meta(rows.count) for _ in range(2))
        launches += Phases(prepared, rows.count, chip).launches(rows, positions, one, two)
    return launches


_prepared = lru_cache(16)(PhaseWeights.prepare)
"""Of the last few decoders: tuning asks for one's launches with every candidate."""


@lru_cache(16)
def _merged(weights: FlowWeights, precision: str) -> PhaseWeights:
    return merge(_prepared(weights, precision))


def _prepared_for(weights: FlowWeights, precision: str, rows: int, chip: Chip) -> PhaseWeights:
    """As TritonFlow has them."""
    prepared = _prepared(weights, precision)
    return _merged(weights, precision) if is_merged(prepared, rows, chip) else prepared


def rows_launches(weights: FlowWeights, z: Tensor, condition: Tensor, precision: str, chip: Chip) -> list[Launch]:
    """The same for loose feature vectors (N, D) under a condition (N, C) each, u included."""
    log_prob, log_det = (_meta(len(z)) for _ in range(2))
    hard = isinstance(weights.mixing, HardMixing)
    whole_precision = in_one_kernel(precision)
    config = select_whole_flow(chip, weights.features, len(z), whole_precision, own_condition=True, hard=hard)
    if config is not None:
        whole = WholeFlowWeights.prepare(weights, whole_precision)
        out = FlowResult(log_prob, log_det, _meta(*z.shape))
        return [rows_launch(z, whole.operands(condition), whole, out, config)]
    phases = Phases(_prepared_for(weights, precision, len(z), chip), len(z), chip)
    return list(phases.launches(loose_rows(z), condition, log_prob, log_det, want_u=True))


def headlines(
    encoders: tuple[str, ...] = tuple(ENCODERS),
    precisions: tuple[str, ...] = PRECISIONS,
    sizes: tuple[int, ...] = SIZES,
    batches: tuple[int, ...] = BATCHES,
) -> Iterator[Headline]:
    for encoder in encoders:
        for permutations in ("soft", "hard"):
            for precision in precisions:
                for size in sizes:
                    for batch in batches:
                        for scale, features in enumerate(ENCODERS[encoder].channels):
                            yield Headline(encoder, scale, features, permutations, precision, size, batch)


def tail_launches(
    size: int = 256, batches: tuple[int, ...] = BATCHES, scale_counts: tuple[int, ...] = (2, 3, 8)
) -> list[Launch]:
    """The anomaly map of so many scales, their maxima given."""
    launches = []
    for scales in scale_counts:
        for batch in batches:
            sides = [max(1, size // 4 >> scale) for scale in range(1, scales + 1)]
            maps = [_meta(batch, side, side) for side in sides]
            config = select_tail(scales, batch, size, size, Chip())
            score = _meta(batch, dtype=torch.int32)
            launches.append(plan_tail(maps, [0.0] * scales, None, _meta(batch, size, size), score, config))
    return launches


def pointwise_launches() -> list[Launch]:
    """Between the plain path's products: a wide decoder's, in both precisions that it keeps between them."""
    features, rows, launches = 512, 1024, []
    for dtype in (torch.float32, torch.bfloat16):
        half = _meta(features, rows, dtype=dtype)
        sums, angle = _meta(features // 16, rows), _meta(features)
        launches.append(coupled_launch(_meta(2 * features, rows, dtype=dtype), half, 1.9, _meta(features, rows), sums))
        launches.append(rotated_launch(half, half, angle, angle, half, half))
    return launches


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)
