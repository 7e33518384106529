"""What every implementation of a folded decoder is given: tensors and numbers, nothing of modules or files.

Symbols: K coupling blocks, D features, h = D - D//2 of them passive and d = D//2 active, C condition channels,
m hidden units.
Matrices are stored in the operand precision (float64, float32 or bfloat16), vectors in float32 (float64 for float64);
those of a SoftMixing may be float32 where the others are bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

NARROW = 512
"""Decoders of fewer features than this keep more digits where rounding shows most: the fewer there are, the less of it
averages out."""


@dataclass(frozen=True)
class HardMixing:
    """Permutations by index: state v stays in place, feature f is gain[f] v[f] + shift[f], applied when it is read.

    A gain multiplies a feature in every block, so its rounding is kept beside it, for those who want more digits.
    """

    passive: Tensor  # (K, h) int32: where block k finds its passive features in the state
    active: Tensor  # (K, d) int32
    gain: Tensor  # (K, d) pending scale of the active features when block k reads them
    gain_rest: Tensor  # (K, d) what rounding left of it
    shift: Tensor  # (K, d) pending offset of the same
    output_gain: Tensor  # (D,) pending scale after the last block, in the state's order
    output_gain_rest: Tensor  # (D,) what rounding left of it
    output_shift: Tensor  # (D,)
    order: Tensor  # (D,) int32: u[i] is the state's feature order[i]


@dataclass(frozen=True)
class SoftMixing:
    """Soft permutations, scale and offset folded in: the first S blocks by matrices, the others by rotations.

    A matrix does it in one product, x' = matrix [x1; y2] + offset. A rotation is the cosine-sine decomposition
    P = [U1 0; 0 U2] [C -S; S C] [V1 0; 0 V2]: with the passive half carried as q, x1 = U1 q, a block needs three
    products of half the size instead of what amounts to four, and as much less storage:
    v = passive q + passive_offset, w = active y2 + active_offset, q' = C v - S w, x2' = output (S v + C w).
    With an odd D the last passive feature has no partner: its cosine is 1.
    """

    matrix: Tensor  # (S, D, D): P diag(sigma)
    offset: Tensor  # (S, D): P o
    passive: Tensor  # (K - S, h, h): V1 diag(sigma1) U1 of the block before
    passive_offset: Tensor  # (K - S, h)
    active: Tensor  # (K - S, d, d): V2 diag(sigma2)
    active_offset: Tensor  # (K - S, d)
    output: Tensor  # (K - S, d, d): U2
    cosine: Tensor  # (K - S, d)
    sine: Tensor  # (K - S, d)
    passive_output: Tensor  # (1, h, h): U1 of the last block; (0, h, h) when it has a matrix

    @property
    def matrices(self) -> int:
        """S, how many blocks have a matrix."""
        return self.matrix.shape[0]


Mixing = HardMixing | SoftMixing


@dataclass(frozen=True)
class FlowWeights:
    """A folded decoder. `log_scale` is the constant sum of ln sigma over all blocks and features, in nats."""

    activation: str  # "relu" or "softplus"
    clamp: float  # alpha of j = alpha tanh(s); whatever else scales s is folded into w2
    log_scale: float
    w1: Tensor  # (K, m, h)
    w1_condition: Tensor | None  # (K, m, C)
    b1: Tensor  # (K, m)
    w2: Tensor  # (K, 2d, m): rows of s, then rows of t
    b2: Tensor  # (K, 2d)
    mixing: Mixing

    @property
    def blocks(self) -> int:
        return self.w1.shape[0]

    @property
    def hidden(self) -> int:
        return self.w1.shape[1]

    @property
    def passive(self) -> int:
        return self.w1.shape[2]

    @property
    def active(self) -> int:
        return self.w2.shape[1] // 2

    @property
    def features(self) -> int:
        return self.passive + self.active

    @property
    def condition(self) -> int:
        return 0 if self.w1_condition is None else self.w1_condition.shape[2]

    @property
    def operand_dtype(self) -> torch.dtype:
        """What the subnets' matrices are stored in; accumulation is float32 at least."""
        return self.w1.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Precision of vectors, log-determinant and log-likelihood."""
        return self.b1.dtype

    @property
    def device(self) -> torch.device:
        return self.w1.device

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; those of the mixing carry the prefix `mixing_`."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        mixing = {f"mixing_{f.name}": getattr(self.mixing, f.name) for f in fields(self.mixing)}
        return {name: value for name, value in (own | mixing).items() if isinstance(value, Tensor)}


MIXINGS: dict[str, type[HardMixing] | type[SoftMixing]] = {"hard": HardMixing, "soft": SoftMixing}


def mixing_kind(mixing: Mixing) -> str:
    return next(kind for kind, cls in MIXINGS.items() if isinstance(mixing, cls))


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 with the mantissa rounded to nearest even at tf32's 10 bits, which matrix units would truncate to."""
    bits = x.view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)
