"""A folded decoder's weights as the matrix-product kernels take them: padded, rounded, stacked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cflow_fast.kernels.bounds import Bounds
from cflow_fast.kernels.linear import Positions
from cflow_fast.kernels.operands import how_mixed, in_two_parts, is_scaled
from cflow_fast.kernels.torch_flow import PositionalTables
from cflow_fast.kernels.weights import FlowWeights, HardMixing, SoftMixing, round_to_tf32

PADDING = 64
"""Both halves and the hidden layer are padded to multiples of this: then no product masks its inputs."""


def operand_dtype(precision: str) -> torch.dtype:
    if is_scaled(precision):
        return torch.float16
    return torch.bfloat16 if precision == "bf16" else torch.float32


def sums_dtype(precision: str) -> torch.dtype:
    """Of what is added to sums or kept between blocks: operands, unless only a scale makes them hold it."""
    return torch.float32 if is_scaled(precision) else operand_dtype(precision)


@dataclass(frozen=True)
class PhaseWeights:
    """half: both halves padded to one width; m: the hidden layer padded. Vectors are float32, matrices operands.

    w1: a block's first layer (m, half); where a rotation follows and `joined`, below it V1 (half, half).
    merged: whether every w1 but the first block's, and its bias, are of `merging`: (m + 2 half, 2 half).
    low: where factors are taken in two parts, the same of what rounding left of every matrix.
    scale, bounds: with scaled operands, the power of two () that every matrix was divided by, and what their sums
    are at most.
    """

    weights: FlowWeights
    precision: str
    w1: list[Tensor]
    w1_condition: Tensor | None  # (K, m, C padded)
    bias: list[Tensor]  # (m,), or (m + half,) with V1's offset below
    w2: Tensor  # (K, 2 half, m): s, then t
    b2: Tensor  # (K, 2 half)
    norm_active: tuple[Tensor, Tensor]  # scale and offset (half,) of the last y2's share of u
    norm_passive: tuple[Tensor, Tensor] | None  # the same of the last x1; None after a rotation, unless merged
    soft: SoftMixing | None  # padded
    hard: HardMixing | None  # passive and active as (K, half) int32, gain and shift as (K, half)
    low: PhaseWeights | None = None
    scale: Tensor | None = None
    bounds: Bounds | None = None
    merged: bool = False

    @classmethod
    def prepare(cls, weights: FlowWeights, precision: str) -> PhaseWeights:
        low, bounds, scale = None, None, None
        if is_scaled(precision):
            scale, bounds = _matrices_scale(weights), Bounds.of(weights)
        if in_two_parts(precision):
            operands = Operands(precision, low=True, cut_off=cut_off_by(weights.device, precision), scale=scale)
            low = cls._prepare(weights, operands)
        return replace(cls._prepare(weights, Operands(precision, scale=scale)), low=low, scale=scale, bounds=bounds)

    @classmethod
    def _prepare(cls, weights: FlowWeights, operands: Operands) -> PhaseWeights:
        half, hidden, precision = _padded(weights.passive), _padded(weights.hidden), operands.precision
        soft = weights.mixing if isinstance(weights.mixing, SoftMixing) else None
        w1 = [operands(matrix, hidden, half) for matrix in weights.w1]
        bias = list(pad(weights.b1.float(), hidden))
        padded_soft = None
        if soft is not None:
            padded_soft = _soft(soft, operands, weights.passive, half)
        if padded_soft is not None and is_joined(precision):
            for rotation, (v1, offset) in enumerate(zip(padded_soft.passive, padded_soft.passive_offset, strict=True)):
                block = padded_soft.matrices + rotation
                w1[block], bias[block] = torch.cat([w1[block], v1]), torch.cat([bias[block], offset])
        active, passive = _norm(weights, half)
        condition = weights.w1_condition
        return cls(
            weights=weights,
            precision=precision,
            w1=w1,
            w1_condition=None if condition is None else operands(condition, hidden, _padded(weights.condition)),
            bias=bias,
            w2=operands.halves(weights.w2, weights.active, half, hidden),
            b2=pad_halves(weights.b2.float(), weights.active, half),
            norm_active=active,
            norm_passive=passive,
            soft=padded_soft,
            hard=_hard(weights.mixing, half) if isinstance(weights.mixing, HardMixing) else None,
        )

    def positions(self, tables: PositionalTables) -> list[Positions]:
        """Every block's tables, padded; beside them what a bias adds to b1: it has no position and is not rounded."""
        positions = []
        for block, bias in enumerate(self.bias):
            rows, columns = (pad(table[block], len(bias)) for table in (tables.rows, tables.columns))
            offset = bias - pad(self.weights.b1[block].float(), len(bias))
            positions.append(Positions(rows, columns, offset if len(bias) > self.hidden else None))
        return positions

    @property
    def half(self) -> int:
        return self.w2.shape[1] // 2

    @property
    def hidden(self) -> int:
        return self.w2.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.w2.dtype

    @property
    def device(self) -> torch.device:
        return self.w2.device


def is_joined(precision: str) -> bool:
    """Whether a rotation's V1 is one product with w1, which takes their common factor as V1 has to."""
    return how_mixed(precision) is None


CUT_OFF = {"tf32x3": 1.2e-7, "fp16x3": 7.5e-8}
"""Share of a sum that Hopper's matrix units cut off while they add up a part of one (`lang`), 32 inputs by instructions
of eight in tf32 and of sixteen in fp16: each drops what no longer fits 24 bits. Counted from that alone it is 1.0e-7
and 6.3e-8; what soft permutations lost on an H100 in tf32x3 was 1.2 times as much as so emulated, which is expected of
fp16x3 too, but was not measured. On that card it took tf32x3's error from 2.5e-6 to 1.0e-6 (RMS, WideResNet-50's
decoders in bench/results); emulated, less is left."""


def cut_off_by(device: torch.device, precision: str) -> float:
    """The share that weights in two parts make up for: known of one generation of cards, none where all is exact."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return 0.0
    return CUT_OFF[precision] if torch.cuda.get_device_capability(device)[0] == 9 else 0.0


class Operands:
    """Pads matrices with zeros and rounds them to what the matrix units take, divided by `scale` if they are scaled.

    low: to what rounding left of them, and the share that is going to be cut off.
    """

    def __init__(self, precision: str, low: bool = False, cut_off: float = 0.0, scale: Tensor | None = None) -> None:
        self.precision, self.low, self.cut_off, self.scale = precision, low, cut_off, scale

    def __call__(self, matrix: Tensor, rows: int, columns: int) -> Tensor:
        matrix = pad(matrix, rows, columns)
        if self.scale is not None:
            matrix = matrix.float() / self.scale
        rounded = self._rounded(matrix)
        if not self.low:
            return rounded
        return self._rounded((matrix.double() * (1 + self.cut_off) - rounded).float())

    def _rounded(self, matrix: Tensor) -> Tensor:
        if self.precision in ("tf32", "tf32x3"):
            return round_to_tf32(matrix.float())
        return matrix.to(operand_dtype(self.precision))

    def halves(self, matrix: Tensor, first: int, half: int, columns: int) -> Tensor:
        """Rows of two halves, the first of `first` rows, each padded to `half`."""
        return self(pad_halves(matrix.mT, first, half).mT, 2 * half, columns).contiguous()


def _matrices_scale(weights: FlowWeights) -> Tensor:
    """The power of two () that leaves the largest number of all matrices under 2^15."""
    families = [weights.w1, weights.w2, weights.w1_condition]
    if isinstance(weights.mixing, SoftMixing):
        soft = weights.mixing
        families += [soft.matrix, soft.passive, soft.active, soft.output, soft.passive_output]
    largest = torch.stack([m.abs().amax().float() for m in families if m is not None and m.numel()]).amax()
    exponent = torch.frexp(largest).exponent.clamp(-64, 64) - 15
    return ((exponent + 127) << 23).view(torch.float32)


def _padded(width: int) -> int:
    return -(-width // PADDING) * PADDING


def pad(x: Tensor, *shape: int, value: float = 0.0) -> Tensor:
    """The last dimensions widened to `shape`."""
    missing = [size - have for size, have in zip(shape, x.shape[-len(shape) :], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [amount for size in reversed(missing) for amount in (0, size)], value=value)


def pad_halves(x: Tensor, first: int, half: int) -> Tensor:
    """The last dimension's two parts, [:first] and [first:], each widened to `half`."""
    if x.shape[-1] == 2 * half and first == half:
        return x
    return torch.cat([pad(x[..., :first], half), pad(x[..., first:], half)], -1)


def _soft(mixing: SoftMixing, operands: Operands, passive: int, half: int) -> SoftMixing:
    """With an odd D the passive feature without a partner meets a cosine of 1 and a sine of 0, as padding does."""
    return SoftMixing(
        matrix=operands.halves(pad_halves(mixing.matrix, passive, half), passive, half, 2 * half),
        offset=pad_halves(mixing.offset.float(), passive, half),
        passive=operands(mixing.passive, half, half),
        passive_offset=pad(mixing.passive_offset.float(), half),
        active=operands(mixing.active, half, half),
        active_offset=pad(mixing.active_offset.float(), half),
        output=operands(mixing.output, half, half),
        cosine=pad(mixing.cosine.float(), half, value=1.0),
        sine=pad(mixing.sine.float(), half),
        passive_output=operands(mixing.passive_output, half, half),
    )


def _hard(mixing: HardMixing, half: int) -> HardMixing:
    """Inputs beyond the passive half read some feature: their weights are 0."""
    return HardMixing(
        passive=pad(mixing.passive, half),
        active=pad(mixing.active, half),
        gain=pad(mixing.gain.float(), half),
        gain_rest=pad(mixing.gain_rest.float(), half),
        shift=pad(mixing.shift.float(), half),
        output_gain=mixing.output_gain.float(),
        output_gain_rest=mixing.output_gain_rest.float(),
        output_shift=mixing.output_shift.float(),
        order=mixing.order,
    )


def _norm(weights: FlowWeights, half: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Scale and offset of the last y2 and x1 on their way to u, without the permutation that only turns them."""
    mixing, h = weights.mixing, weights.passive
    if isinstance(mixing, HardMixing):
        gain, shift = mixing.output_gain, mixing.output_shift
        active, passive = mixing.active[-1].long(), mixing.passive[-1].long()
        return _padded_pair(gain[active], shift[active], half), _padded_pair(gain[passive], shift[passive], half)
    if mixing.matrices == weights.blocks:
        gain, shift = _unturned(mixing.matrix[-1], mixing.offset[-1])
        return _padded_pair(gain[h:], shift[h:], half), _padded_pair(gain[:h], shift[:h], half)
    return _padded_pair(*_unturned(mixing.active[-1], mixing.active_offset[-1]), half), None


def _padded_pair(gain: Tensor, shift: Tensor, half: int) -> tuple[Tensor, Tensor]:
    return pad(gain.float(), half), pad(shift.float(), half)


def _unturned(matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """sigma and o of a matrix P diag(sigma) and an offset P o: P is orthogonal."""
    matrix = matrix.double()
    sigma = matrix.norm(dim=0)
    return sigma, (matrix / sigma.clamp(min=torch.finfo(torch.float64).tiny)).T @ offset.double()
