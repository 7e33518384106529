"""A folded decoder's weights as the whole-decoder kernel reads them: padded to tiles and stacked, once.

A half of the features (passive or active) becomes H = main + side places, both powers of two (80 features: 64 + 16;
side may be 0); hidden units become M, a multiple of every config's chunk. All that is padded is zero, so that padded
places hold zeros throughout: every product brings zeros there and tanh(0), exp(0) - 1 and the shift are zero too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cflow_fast.kernels.torch_flow import PositionalTables
from cflow_fast.kernels.weights import FlowWeights, HardMixing, SoftMixing, round_to_tf32

PRECISIONS = ("ieee", "tf32", "bf16")
SMALLEST_TILE = 16
"""What a matrix instruction takes at least, in features."""
HIDDEN_MULTIPLE = 32
CHANNEL_MULTIPLE = 16


@dataclass(frozen=True)
class WholeFlowWeights:
    """K blocks, h places a half, M hidden units, C condition channels (padded); S matrix and R rotation blocks.

    Matrices are in the operand dtype (bf16 or float32, rounded to tf32 where that is the precision), vectors float32.
    """

    weights: FlowWeights
    precision: str
    main: int
    side: int
    w1: Tensor  # (K, M, h)
    w1_condition: Tensor | None  # (K, M, C)
    b1: Tensor  # (K, M)
    w2: Tensor  # (K, 2 h, M): s and t, paired
    b2: Tensor  # (K, 2 h)
    place: Tensor  # (2, h) int32: which feature of u a place holds after the last block
    matrix: Tensor | None = None  # (S, 2, 2 h, h): input half, both output halves paired
    offset: Tensor | None = None  # (S, 2 h)
    rotation: Tensor | None = None  # (R, 3, h, h): passive, active, output
    angle: Tensor | None = None  # (R, 4, h): passive offset, active offset, cosine, sine
    passive_output: Tensor | None = None  # (1, h, h)
    index: Tensor | None = None  # (K, 2, h) int32: where in the state a block's features are
    pending: Tensor | None = None  # (K, 2, h): gain and shift of a block's active features
    final: Tensor | None = None  # (2, 2, h): gain and shift after the last block, by half

    @classmethod
    def prepare(cls, weights: FlowWeights, precision: str) -> WholeFlowWeights:
        """Raises ValueError for an unknown precision, TypeError for weights folded in float64."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
        if weights.state_dtype != torch.float32:
            raise TypeError(f"the kernels compute in float32, these weights were folded in {weights.state_dtype}")
        main, side = tiles(weights.passive)
        h, m = main + side, _multiple(weights.hidden, HIDDEN_MULTIPLE)
        condition = weights.w1_condition
        channels = _multiple(weights.condition, CHANNEL_MULTIPLE)
        halves = weights.w2.unflatten(1, (2, weights.active))
        return cls(
            weights,
            precision,
            main,
            side,
            w1=as_operand(_padded(weights.w1, m, h), precision),
            w1_condition=None if condition is None else as_operand(_padded(condition, m, channels), precision),
            b1=_padded(weights.b1, m),
            w2=as_operand(paired(_padded(halves, h, m), main), precision),
            b2=paired(_padded(weights.b2.unflatten(1, (2, weights.active)), h), main),
            **_mixing(weights, h, main, precision),
        )

    @property
    def hidden(self) -> int:
        return self.w1.shape[1]

    @property
    def hard(self) -> bool:
        return self.index is not None

    def operands(self, condition: Tensor) -> Tensor:
        """Conditions of loose rows (N, C) as the kernel reads them: operands, padded."""
        assert self.w1_condition is not None
        return as_operand(_padded(condition, self.w1_condition.shape[2]), self.precision).contiguous()

    def tables(self, tables: PositionalTables) -> Tensor:
        """The positional tables as the kernel reads them, (K, H + W, M): lines, then columns, in operands."""
        return as_operand(_padded(torch.cat([tables.rows, tables.columns], 1), self.hidden), self.precision)


def tiles(features: int) -> tuple[int, int]:
    """The smallest main + side that holds a half: one power of two, or two where that is a tenth less."""
    single = max(SMALLEST_TILE, 1 << (features - 1).bit_length())
    main = single // 2
    side = max(SMALLEST_TILE, 1 << max(features - main - 1, 0).bit_length())
    return (main, side) if main > SMALLEST_TILE and main + side <= 0.9 * single else (single, 0)


def paired(halves: Tensor, main: int) -> Tensor:
    """(K, 2, h, ...) to (K, 2 h, ...): the outputs of two products that are made as one, main tile then side tile.

    In a matrix instruction's result a thread owns columns 2 q and 2 q + 1 of every eight, q its number in a group of
    four. Feature 8 g + 2 q + e of both halves goes to columns 16 g + 8 e + 2 q and the next one, so that the thread
    finds the two halves apart where it would own feature 8 g + 2 q + e of a product of one half.
    """
    parts = []
    for part in (halves[:, :, :main], halves[:, :, main:]):
        places = part.unflatten(2, (-1, 4, 2)).movedim(1, 4)  # (K, g, q, e, half, ...)
        parts.append(places.transpose(2, 3).flatten(1, 4))
    return torch.cat(parts, 1)


def as_operand(matrix: Tensor, precision: str) -> Tensor:
    """A matrix as it is multiplied."""
    if precision == "bf16":
        return matrix.bfloat16()
    matrix = matrix.float()
    return round_to_tf32(matrix) if precision == "tf32" else matrix


def _mixing(weights: FlowWeights, h: int, main: int, precision: str) -> dict[str, Any]:
    if isinstance(weights.mixing, SoftMixing):
        return _soft(weights.mixing, weights.passive, h, main, precision)
    return _hard(weights.mixing, weights.passive, h)


def _soft(soft: SoftMixing, passive: int, h: int, main: int, precision: str) -> dict[str, Any]:
    def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return x.narrow(dim, 0, passive), x.narrow(dim, passive, x.shape[dim] - passive)

    quarters = [torch.stack([_padded(q, h, h) for q in halves(by_input, 1)], 1) for by_input in halves(soft.matrix, 2)]
    products = [_padded(m, h, h) for m in (soft.passive, soft.active, soft.output)]
    vectors = [_padded(v, h) for v in (soft.passive_offset, soft.active_offset, soft.cosine, soft.sine)]
    vectors[2][:, soft.cosine.shape[1] : passive] = 1.0  # an odd D's last passive feature has no partner
    places = torch.arange(2 * passive, dtype=torch.int32, device=soft.matrix.device).view(2, passive)
    return {
        "place": _padded(places, h),
        "matrix": as_operand(torch.stack([paired(q, main) for q in quarters], 1), precision),
        "offset": paired(torch.stack([_padded(half, h) for half in halves(soft.offset, 1)], 1), main),
        "rotation": as_operand(torch.stack(products, 1), precision),
        "angle": torch.stack(vectors, 1),
        "passive_output": as_operand(_padded(soft.passive_output, h, h), precision),
    }


def _hard(hard: HardMixing, passive: int, h: int) -> dict[str, Any]:
    last = hard.passive[-1].long(), hard.active[-1].long()
    place_of = hard.order.argsort()
    final = [torch.stack([_padded(v[i], h) for v in (hard.output_gain, hard.output_shift)]) for i in last]
    return {
        "place": torch.stack([_padded(place_of[i].int(), h) for i in last]),
        "index": torch.stack([_padded(hard.passive, h), _padded(hard.active, h)], 1),
        "pending": torch.stack([_padded(hard.gain, h), _padded(hard.shift, h)], 1),
        "final": torch.stack(final),
    }


def _padded(x: Tensor, *sizes: int) -> Tensor:
    """The last dimensions filled up with zeros to these sizes."""
    widths = [
        width
        for dim, size in zip(range(-1, -len(sizes) - 1, -1), reversed(sizes), strict=True)
        for width in (0, size - x.shape[dim])
    ]
    return F.pad(x, widths)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
