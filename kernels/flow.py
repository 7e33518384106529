"""The folded decoder in plain PyTorch: the one place that says what every faster implementation computes.

Per coupling block, with the scalings, offsets and permutations already folded into the weights (see `weights`):

    hidden  = act(w1 x1 + bias)               bias: the positional tables' sum, or w1_condition c + b1
    s, t    = w2 hidden + b2
    j       = alpha tanh(s)
    y2      = x2 exp(j) + t
    x1, x2  = mixing(x1, y2)                  a permutation: indices, a matrix or rotations
    log_det += sum(j)

and at the end log p = -(||u||^2 + D ln 2 pi) / 2 + log_det                       (CFLOW-AD, eq. 8).
The last permutation changes no norm: as indices or rotations it is left out unless u itself is asked for.

The loop does not know how a product is made or how the state lies in memory; a `Products` does (see `products`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cflow_fast.kernels.weights import FlowWeights, HardMixing, SoftMixing


class Products(Protocol):
    """The matrix products of one folded decoder, in one memory layout."""

    weights: FlowWeights
    feature_dim: int
    """0 when a state tensor is (features, rows), 1 when it is (rows, features)."""

    def product(self, name: str, block: int, x: Tensor, add: Tensor | None = None, activation: str = "none") -> Tensor:
        """activation(matrix[name, block] x + its bias + add): a new tensor; `add` may be overwritten."""
        ...

    def coupled(self, block: int, hidden: Tensor, x2: Tensor, log_det: Tensor) -> Tensor:
        """y2 = x2 exp(j) + t in the state's precision, with j = clamp tanh(s); adds the sums of j to log_det."""
        ...

    def rotated(self, v: Tensor, w: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """cosine v - sine w and sine v + cosine w; the angles (features,)."""
        ...


HiddenBias = Callable[[int], Tensor]
"""Block number to the bias of its hidden layer, in the layout and operand precision of the products."""


class FlowResult(NamedTuple):
    log_prob: Tensor  # (N,) nats
    log_det: Tensor  # (N,) nats
    u: Tensor | None  # in the layout of the products


def run_flow(
    products: Products, x1: Tensor, x2: Tensor, hidden_bias: HiddenBias | None, want_u: bool = False
) -> FlowResult:
    """Send rows through every block.

    x1, x2: passive and active halves of the features, in the products' layout; they are not changed.
    hidden_bias: None for an unconditional decoder, whose bias is b1 alone.
    """
    weights = products.weights
    rows = x1.shape[1 - products.feature_dim]
    state = _STATES[type(weights.mixing)](products, x1, x2)
    log_det = torch.full((rows,), weights.log_scale, dtype=weights.state_dtype, device=x1.device)
    for block in range(weights.blocks):
        x1, x2 = state.read(block)
        bias = None if hidden_bias is None else hidden_bias(block)
        hidden = products.product("w1", block, x1, add=bias, activation=weights.activation)
        y2 = products.coupled(block, hidden, x2, log_det)
        state.write(block, x1, y2, last=block == weights.blocks - 1)
    norm = state.squared_norm()
    log_prob = log_det - 0.5 * (norm + weights.features * math.log(2 * math.pi))
    return FlowResult(log_prob, log_det, state.u() if want_u else None)


class _State(ABC):
    """What lies between two blocks. `read` gives a block its halves, `write` takes them back and mixes them."""

    def __init__(self, products: Products, x1: Tensor, x2: Tensor) -> None:
        self.products = products
        self.x1, self.x2 = x1, x2

    @abstractmethod
    def read(self, block: int) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def write(self, block: int, x1: Tensor, y2: Tensor, last: bool) -> None: ...

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """||u||^2 of every row, in the state's precision."""

    @abstractmethod
    def u(self) -> Tensor: ...

    def per_feature(self, values: Tensor) -> Tensor:
        """A vector over features, shaped to broadcast over rows."""
        return values.unsqueeze(1 - self.products.feature_dim)

    def squares(self, x: Tensor) -> Tensor:
        return x.to(self.products.weights.state_dtype).square().sum(self.products.feature_dim)


class _HardState(_State):
    """The state stays where it is; a permutation is an index on reading, only y2 is written."""

    mixing: HardMixing

    def __init__(self, products: Products, x1: Tensor, x2: Tensor) -> None:
        super().__init__(products, x1, x2)
        self.mixing = products.weights.mixing  # type: ignore[assignment]
        self.v = torch.cat([x1, x2], products.feature_dim)

    def read(self, block: int) -> tuple[Tensor, Tensor]:
        if block == 0:
            return self.x1, self.x2
        dim = self.products.feature_dim
        x2 = self.v.index_select(dim, self.mixing.active[block])
        gain, shift = self.per_feature(self.mixing.gain[block]), self.per_feature(self.mixing.shift[block])
        return self.v.index_select(dim, self.mixing.passive[block]), torch.addcmul(shift, x2, gain)

    def write(self, block: int, x1: Tensor, y2: Tensor, last: bool) -> None:
        self.v.index_copy_(self.products.feature_dim, self.mixing.active[block].long(), y2.to(self.v.dtype))

    def scaled(self) -> Tensor:
        gain, shift = self.per_feature(self.mixing.output_gain), self.per_feature(self.mixing.output_shift)
        return torch.addcmul(shift, self.v, gain)

    def squared_norm(self) -> Tensor:
        return self.squares(self.scaled())

    def u(self) -> Tensor:
        return self.scaled().index_select(self.products.feature_dim, self.mixing.order)


class _SoftState(_State):
    """Blocks with a matrix leave x1 and x2, those with a rotation leave q in x1's place (see SoftMixing).

    After the last block no mixing is needed for the norm: v and w have that of u.
    """

    mixing: SoftMixing

    def __init__(self, products: Products, x1: Tensor, x2: Tensor) -> None:
        super().__init__(products, x1, x2)
        self.mixing = products.weights.mixing  # type: ignore[assignment]

    def read(self, block: int) -> tuple[Tensor, Tensor]:
        return self.x1, self.x2

    def write(self, block: int, x1: Tensor, y2: Tensor, last: bool) -> None:
        rotation = block - self.mixing.matrices
        if rotation < 0:
            y = torch.cat([x1.to(y2.dtype), y2], self.products.feature_dim)
            self.x1 = self.products.product("matrix_passive", block, y)
            self.x2 = self.products.product("matrix_active", block, y)
            return
        self.v = self.products.product("passive", rotation, x1)
        self.w = self.products.product("active", rotation, y2)
        if not last:
            self.x1, rotated = self.rotate(rotation)
            self.x2 = self.products.product("output", rotation, rotated)

    def rotate(self, rotation: int) -> tuple[Tensor, Tensor]:
        dim = self.products.feature_dim
        paired = self.v.narrow(dim, 0, self.w.shape[dim])
        q, rotated = self.products.rotated(paired, self.w, self.mixing.cosine[rotation], self.mixing.sine[rotation])
        if paired.shape != self.v.shape:
            q = torch.cat([q, self.v.narrow(dim, -1, 1)], dim)
        return q, rotated

    @property
    def ends_in_matrix(self) -> bool:
        return self.mixing.matrices == self.products.weights.blocks

    def squared_norm(self) -> Tensor:
        halves = (self.x1, self.x2) if self.ends_in_matrix else (self.v, self.w)
        return self.squares(halves[0]) + self.squares(halves[1])

    def u(self) -> Tensor:
        halves = [self.x1, self.x2]
        if not self.ends_in_matrix:
            last = len(self.mixing.cosine) - 1
            q, rotated = self.rotate(last)
            halves = [self.products.product("passive_output", 0, q), self.products.product("output", last, rotated)]
        return torch.cat(halves, self.products.feature_dim)


_STATES: dict[type, type[_State]] = {HardMixing: _HardState, SoftMixing: _SoftState}
