"""What lies between two coupling blocks, and how it is mixed: the permutations' part of `phases`.

soft   row-major (N, [passive | active]), twice, since no product writes where others still read
hard   feature-major (D, N), once: y2 is written over x2, and nothing else ever moves
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cflow_fast.kernels.coupling import Halves, Pending, Target
from cflow_fast.kernels.launch import Launch
from cflow_fast.kernels.linear import Beyond, Rotation
from cflow_fast.kernels.rows import Rows
from cflow_fast.kernels.weights import SoftMixing

if TYPE_CHECKING:
    from cflow_fast.kernels.phases import Phases


class HardState:
    """Block k reads its halves by index; the first reads the features and lays them down."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        assert phases.prepared.hard is not None
        self.mixing = phases.prepared.hard
        self.v = phases.empty(phases.prepared.weights.features, phases.padded_rows)

    def source(self, block: int) -> Halves:
        weights = self.phases.prepared.weights
        return Halves(
            self._indexed(self.mixing.passive[block], weights.passive),
            self._indexed(self.mixing.active[block], weights.active),
        )

    def target(self, block: int) -> Target:
        halves = self.source(block)
        return Target(halves.active, halves.passive if block == 0 else None)

    def pending(self, block: int) -> Pending:
        return Pending(self.mixing.gain[block], self.mixing.shift[block])

    def beyond(self, block: int, kept: bool, last: bool) -> None:
        return None

    def mix(self, block: int) -> Iterator[Launch]:
        return iter(())

    turn_into_u = mix

    def u(self) -> Tensor:
        v = self.v[:, : self.phases.rows].t().float()
        return torch.addcmul(self.mixing.output_shift, v, self.mixing.output_gain)[:, self.mixing.order.long()]

    def _indexed(self, index: Tensor, features: int) -> Rows:
        return Rows(self.v, self.phases.rows, features, 1, self.v.stride(0), index=index)


class SoftState:
    """A matrix takes a state from one buffer to the other. A rotation leaves x2 in its buffer and q in either."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        assert phases.prepared.soft is not None
        self.mixing: SoftMixing = phases.prepared.soft
        width = 2 * phases.prepared.half
        self.with_passive, self.other = (phases.empty(phases.padded_rows, width) for _ in range(2))
        self.with_active, self.scratch = self.with_passive, self.other
        self.wanted_u: Tensor | None = None

    def source(self, block: int) -> Halves:
        return Halves(self._rows(self._passive(self.with_passive)), self._rows(self._active(self.with_active)))

    def target(self, block: int) -> Target:
        halves = self.source(block)
        return Target(halves.active, halves.passive if block == 0 and self.mixing.matrices else None)

    def pending(self, block: int) -> None:
        return None

    def beyond(self, block: int, kept: bool, last: bool) -> Beyond | None:
        """v of a rotation, in the half-buffer where q will be."""
        rotation = block - self.mixing.matrices
        if rotation < 0:
            return None
        return Beyond(
            values=self._passive(self.other) if kept else None,
            squares=self.phases.v_squares() if last else None,
        )

    def mix(self, block: int) -> Iterator[Launch]:
        rotation = block - self.mixing.matrices
        if rotation < 0:
            yield self._product(self.with_active, "matrix", block, self.other, self.mixing.offset[block])
            self.with_passive, self.other = self.other, self.with_passive
            self.with_active, self.scratch = self.with_passive, self.other
            return
        yield self._rotate(rotation)
        yield self._product(self._active(self.scratch), "output", rotation, self._active(self.with_active))
        self.with_passive, self.other = self.other, self.with_passive

    def turn_into_u(self, block: int) -> Iterator[Launch]:
        half = self.phases.prepared.half
        self.wanted_u = u = self.phases.empty(self.phases.padded_rows, 2 * half, dtype=torch.float32)
        rotation = block - self.mixing.matrices
        if rotation < 0:
            yield self._product(self.with_active, "matrix", block, u, self.mixing.offset[block], rounded=False)
            return
        yield self._rotate(rotation)
        yield self._product(self._passive(self.other), "passive_output", 0, self._passive(u), rounded=False)
        yield self._product(self._active(self.scratch), "output", rotation, self._active(u), rounded=False)

    def u(self) -> Tensor:
        assert self.wanted_u is not None
        rows, weights, u = self.phases.rows, self.phases.prepared.weights, self.wanted_u
        return torch.cat([self._passive(u)[:rows, : weights.passive], self._active(u)[:rows, : weights.active]], 1)

    def _rotate(self, rotation: int) -> Launch:
        """w from y2, and with v elementwise to q', in v's place, and to what the output matrix takes to x2."""
        parts = Rotation(self.mixing.cosine[rotation], self.mixing.sine[rotation], self._active(self.scratch))
        return self._product(
            self._active(self.with_active),
            "active",
            rotation,
            self._passive(self.other),
            self.mixing.active_offset[rotation],
            rotation=parts,
        )

    def _product(
        self, x: Tensor, name: str, block: int, y: Tensor, bias: Tensor | None = None, **options: object
    ) -> Launch:
        return self.phases.linear(self._rows(x), getattr(self.mixing, name)[block], y, bias, **options)

    def _rows(self, x: Tensor) -> Rows:
        return Rows(x, self.phases.rows, x.shape[1], x.stride(0), 1)

    def _passive(self, x: Tensor) -> Tensor:
        return x[:, : self.phases.prepared.half]

    def _active(self, x: Tensor) -> Tensor:
        return x[:, self.phases.prepared.half :]
